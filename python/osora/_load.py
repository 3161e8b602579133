# SPDX-License-Identifier: Apache-2.0
"""Loads torch, then the extension, and says so in one sentence when they do not belong together."""

from importlib import import_module
from types import ModuleType

import torch


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_torch(compiled: str, installed: str) -> None:
    """Raise when the extension was compiled for another minor version of torch; its binary interface changes there."""
    wanted = _minor(compiled)
    if wanted != _minor(installed):
        raise ImportError(
            f"osora was compiled for torch {wanted}, but torch {installed} is installed: build osora again "
            f"(`pip install --force-reinstall --no-deps .` in its source tree) or `pip install torch=={wanted}.*`"
        )


def load() -> ModuleType:
    """Import osora._C, which registers torch.ops.osora."""
    try:
        # A file of its own, read first: opening the extension beside another torch can crash the process.
        check_torch(import_module("osora._compiled_for").TORCH, torch.__version__)
        return import_module("osora._C")
    except ModuleNotFoundError as error:
        raise ImportError("osora's compiled part is missing: run `pip install .` in its source tree") from error


extension = load()
