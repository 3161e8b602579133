# SPDX-License-Identifier: Apache-2.0
"""What a decomposition is asked for, refused in words where it cannot be had."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from osora.reference import FLOATS
from osora.svd.certificate import Unconverged

# SvdMethod of csrc/core/svd_plan.h, in order. The last five are cuSOLVER's drivers and, as "lowrank", for comparison.
METHOD_NAMES = ("lanczos", "gram", "full", "lowrank", "gesvd", "gesvdj", "gesvdp", "gesvda", "gesvdr")
SVD_METHODS = ("auto", *METHOD_NAMES)


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise TypeError for a dtype that cannot be decomposed."""
    if dtype not in FLOATS:
        cure = "dequantise it, or convert it with .float()"
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}: {cure}")


def check_matrix(weight: Tensor, name: str) -> None:
    """Raise a TypeError or ValueError that names ``weight`` and the cure if it cannot be decomposed.

    Its values are not looked at: the operator does that while it reads them.
    """
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values: load the weights before decomposing them, or ask "
            "osora.count_parameters for what would be trained"
        )
    check_dtype(weight.dtype, name)
    if weight.dim() < 2:
        raise ValueError(f"{name} must be a matrix [out_features, in_features], got shape {tuple(weight.shape)}")
    if 0 in weight.shape[-2:]:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")


def check_max_memory(max_memory: int | None) -> None:
    """Raise a TypeError or ValueError if ``max_memory`` is no positive number of bytes, nor None for no limit."""
    if max_memory is None:
        return
    if isinstance(max_memory, bool) or not isinstance(max_memory, int):
        raise TypeError(f"max_memory must be a number of bytes as an int, or None, got {max_memory!r}")
    if not 0 < max_memory < 2**63:
        raise ValueError(f"max_memory must be in 1 .. 2**63 - 1 bytes, got {max_memory}")


def check_rank_and_method(shape: Sequence[int], rank: int, method: str, name: str) -> None:
    """Raise TypeError or ValueError for a rank or method that a matrix of that shape cannot be decomposed with."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank must be in 1 .. min(out_features, in_features) = {min(shape)} for {name}, got {rank}")
    if method not in SVD_METHODS:
        raise ValueError(f"method must be one of {', '.join(SVD_METHODS)}, got {method!r}")


def check_arguments(shape: Sequence[int], rank: int, tol: float, seed: int, method: str, name: str) -> None:
    """Raise TypeError or ValueError for what is no rank, method, tolerance or seed of a decomposition."""
    check_rank_and_method(shape, rank, method, name)
    if not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a positive number, got {tol!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in 0 .. 2**63 - 1, got {seed!r}")


def check_unconverged(unconverged: Unconverged) -> None:
    """Raise ValueError for what says neither to warn nor to raise."""
    if unconverged not in ("warn", "raise"):
        raise ValueError(f"unconverged must be 'warn' or 'raise', got {unconverged!r}")
