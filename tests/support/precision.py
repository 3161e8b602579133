# SPDX-License-Identifier: Apache-2.0
"""How exact a number type is: the base of every tolerance."""

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype).removeprefix("torch.") for dtype in DTYPES])


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which factors of `dtype` are multiplied and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def half_of_least(dtype: torch.dtype) -> float:
    """Half the least subnormal number: the largest error of a rounding near zero."""
    return 0.0 if dtype == torch.float64 else torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def assert_within(got: Tensor, wish: Tensor, allowed: Tensor) -> None:
    """|got - wish| <= allowed, element by element; NaN and infinity are wrong. `wish`, `allowed` in float64."""
    assert got.shape == wish.shape, f"shape {tuple(got.shape)}, expected {tuple(wish.shape)}"
    assert torch.isfinite(got).all(), f"{(~torch.isfinite(got)).sum()} of {got.numel()} numbers are not finite"
    error = (got.double() - wish).abs()
    if (error > allowed).any():
        worst = (error / allowed.clamp_min(1e-300)).argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, wish.shape))
        raise AssertionError(
            f"{int((error > allowed).sum())} of {got.numel()} numbers are off; the worst at {index}: "
            f"got {got[index]:g}, expected {wish[index]:g}, error {error[index]:g}, allowed {allowed[index]:g}"
        )
