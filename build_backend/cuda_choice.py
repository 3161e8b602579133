# SPDX-License-Identifier: Apache-2.0
"""With CUDA or without, with which nvcc, for which cards: decided once, before CMake runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class BuildError(RuntimeError):
    """A wish that cannot be met; the message says what to do."""


@dataclass(frozen=True)
class Choice:
    nvcc: str | None  # path of the compiler; None builds without CUDA
    reason: str


def nvcc_candidates(environ: Mapping[str, str], nvidia: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, path), the explicit wishes first. `nvidia` is pip's site-packages/nvidia."""
    if path := shutil.which(environ.get("CUDACXX", "")):
        yield "from CUDACXX", path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (root := environ.get(variable)) and (path := shutil.which("nvcc", path=f"{root}/bin")):
            yield f"from {variable}", path
    if path := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        yield "on PATH", path
    for folder in sorted(nvidia.glob("cu[0-9]*/bin"), reverse=True):
        if path := shutil.which("nvcc", path=str(folder)):
            yield "from pip's nvidia-cuda-nvcc", path
    if path := shutil.which("nvcc", path="/usr/local/cuda/bin"):
        yield "from the default toolkit folder", path


def nvcc_version(path: str) -> str | None:
    """'13.0', or None when the compiler does not answer."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", answer)
    return found[1] if found else None


def choose(torch_version: str, torch_cuda: str | None, nvidia: Path, environ: Mapping[str, str] = os.environ) -> Choice:
    """CUDA needs a CUDA build of torch and an nvcc of the same major version; OSORA_CUDA=0/1 overrides."""
    wish = environ.get("OSORA_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"OSORA_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return Choice(None, "OSORA_CUDA=0")
    if torch_cuda is None:
        obstacle, cure = f"torch {torch_version} is a CPU build", "install a CUDA build of torch"
    else:
        major = torch_cuda.split(".")[0]
        others = []
        for where, path in nvcc_candidates(environ, nvidia):
            version = nvcc_version(path)
            if version is not None and version.split(".")[0] == major:
                asked = "OSORA_CUDA=1, " if wish else ""
                return Choice(path, f"{asked}torch {torch_version} is for CUDA {torch_cuda}, nvcc {version} {where}")
            others.append(f"nvcc {version or 'of unknown version'} {where}")
        seen = f"only {', '.join(others)}" if others else "no nvcc"
        obstacle = f"torch {torch_version} is for CUDA {torch_cuda}, found {seen}"
        cure = f"install nvcc {major}.x (docs/build.md) and name it in CUDACXX or CUDA_HOME"
    if wish == "1":
        raise BuildError(f"OSORA_CUDA=1, but {obstacle}: {cure}, or set OSORA_CUDA=0")
    return Choice(None, obstacle)


def architectures(visible: Sequence[tuple[int, int]], torch_flags: str, environ: Mapping[str, str] = os.environ) -> str:
    """The cards to compile for, in TORCH_CUDA_ARCH_LIST's own format: '8.0;9.0+PTX'.

    The user's list; else the cards in this machine; else those of torch (`torch_flags` is 'sm_80 sm_90 …'),
    the newest also as PTX, so that later cards can run it.
    """
    if wish := environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        names = [name for name in re.split(r"[;,\s]+", wish) if name]
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST must look like '8.0;9.0+PTX', got {name!r}")
        return ";".join(names)
    if visible:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(set(visible)))
    cards = sorted({int(number) for number in re.findall(r"sm_(\d+)", torch_flags)})
    if not cards:
        raise BuildError("torch names no CUDA architecture: set TORCH_CUDA_ARCH_LIST, for example '8.0;9.0+PTX'")
    return ";".join(f"{card // 10}.{card % 10}" for card in cards) + "+PTX"
