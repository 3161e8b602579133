# SPDX-License-Identifier: Apache-2.0
"""What a truncated SVD will do and take, and what it can tell from zero, before there is a matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from osora import _load  # noqa: F401  (its import registers the operators)
from osora.reference import accumulate_dtype
from osora.svd.arguments import METHOD_NAMES, check_dtype, check_rank_and_method

_ops = torch.ops.osora


class SvdPlan(NamedTuple):
    """What a truncated SVD of one matrix will do; see :func:`svd_plan`."""

    method: str
    """The method that runs first: a name of ``SVD_METHODS``, never "auto"."""
    block: int
    """Lanczos: new columns per step. This and the next two are 0 for the other methods."""
    keep: int
    """Lanczos: columns of the basis that survive a restart."""
    basis: int
    """Lanczos: columns of the basis at which a restart is due."""
    bytes: int
    """Of the arrays beyond the weight and the answer."""


def svd_plan(
    shape: Sequence[int],
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    method: str = "auto",
) -> SvdPlan:
    """What :func:`osora.truncated_svd` will do with a matrix, before there is one.

    A function of its arguments and of ``torch.get_num_threads()``; nothing is allocated, and the device need not exist.

    Args:
        shape: [d, k] of the weight.
        rank: number of triplets, 1 .. min(d, k).
        dtype: of the weight.
        device: of the weight.
        method: as for :func:`osora.truncated_svd`.

    Returns:
        method, block, keep, basis, bytes: of the first attempt. One that cannot be certified is repeated in float64.
        bytes counts arrays; what an allocator keeps of freed ones comes on top.

    Raises:
        TypeError: a dtype that cannot be decomposed.
        ValueError: an empty shape or one that is no pair, rank out of range, a method that is unknown or cannot run.
    """
    d, k = _checked_pair(shape)
    check_dtype(dtype, "a weight")
    check_rank_and_method((d, k), rank, method, f"a weight [{d}, {k}]")
    cuda = torch.device(device).type == "cuda"
    used, block, keep, basis, size = _ops.svd_plan(d, k, rank, dtype.itemsize, method, cuda, torch.get_num_threads())
    if METHOD_NAMES[used] != "lanczos":
        block = keep = basis = 0
    return SvdPlan(METHOD_NAMES[used], block, keep, basis, size)


def rounding_floor(shape: Sequence[int], dtype: torch.dtype) -> float:
    """The rounding floor of a weight [d, k] of that dtype, over σ₁; docs/svd.md, "The rounding floor"."""
    d, k = shape
    return _ops.svd_floor(d, k, accumulate_dtype(dtype).itemsize)


def _checked_pair(shape: Sequence[int]) -> tuple[int, int]:
    pair = tuple(shape)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"shape must be [out_features, in_features], two positive ints, got {shape!r}")
    return pair
