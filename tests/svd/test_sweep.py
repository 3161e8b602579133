# SPDX-License-Identifier: Apache-2.0
"""A thousand matrices around the rounding floor, of small rank and of graded spectra: none refused, none wrong."""

import pytest
import torch
from matrices import lanczos_basis, powers, quietly, randn, rounding_floor, with_spectrum

from osora import reference

DOUBLE = torch.float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, DOUBLE]
RANKS = (8, 16, 17, 32, 64)

TOL = 1e-3


def certified(weight, seed):
    """Every rank and method that can take it: certified, sigma right and nothing NaN; gives back how many."""
    truth, count = torch.linalg.svdvals(weight.double()), 0
    noise = rounding_floor(*weight.shape, reference.accumulate_dtype(weight.dtype)) / 8 * truth[0]
    for rank in RANKS:
        for method in ["auto", "lanczos"]:
            if method == "lanczos" and lanczos_basis(rank) > min(weight.shape):
                continue
            found = quietly(weight, rank, method=method, seed=seed)
            count += 1
            told = f"{method} at rank {rank}: {found.certificate}"
            assert found.converged, told
            assert found.U.isfinite().all() and found.V.isfinite().all() and found.residuals.isfinite().all(), told
            true, sigma = truth[:rank], found.S.double()
            above = ~found.below_floor
            error = ((sigma - true).abs() / true)[above]
            assert error.numel() == 0 or error.max() <= (1e-5 if method == "auto" else 100 * TOL**2), told
            # Between noise and floor nothing is promised; what float64 work finds there is right to 100 tol² still.
            known = found.below_floor & (true > noise)
            assert ((sigma - true).abs() <= 100 * TOL**2 * true)[known].all() or weight.dtype == DOUBLE, told
            assert ((sigma - true).abs() <= found.floor)[found.below_floor].all(), told
    return count


SMALL = [((400, 300), true_rank, 0) for true_rank in (1, 33)] + [((192, 576), 2, 1)]
SMALL += [
    pytest.param((d, k), true_rank, seed, marks=pytest.mark.slow)
    for d, k in ((400, 300), (300, 400), (576, 576), (192, 576))
    for true_rank in (1, 2, 5, 16, 30, 33)
    for seed in (0, 1)
    if ((d, k), true_rank, seed) not in SMALL
]


@pytest.mark.parametrize("shape, true_rank, seed", SMALL)
def test_matrices_of_small_rank(shape, true_rank, seed):
    weight = randn(shape[0], true_rank, seed=seed) @ randn(true_rank, shape[1], seed=seed + 9)
    assert certified(weight.float(), seed) >= 5
    # Rounded to 16 bits it has every rank; in float64 it is of small rank to rounding.
    for dtype in DTYPES[1:]:
        certified(weight.to(dtype), seed)


GRADED = [((130, 260), -2.0, 1000.0, 0), ((200, 200), -0.5, 30.0, 1)]
GRADED += [
    pytest.param(shape, exponent, first, seed, marks=pytest.mark.slow)
    for shape in ((130, 260), (200, 200), (576, 1536))
    for exponent in (-0.1, -0.5, -1.0, -2.0)
    for first in (1.0, 30.0, 1000.0)
    for seed in range(3)
    if (shape, exponent, first, seed) not in GRADED
]


@pytest.mark.parametrize("shape, exponent, first, seed", GRADED)
def test_graded_matrices(shape, exponent, first, seed):
    sigma = powers(min(shape), exponent)
    sigma[0] *= first
    weight = with_spectrum(*shape, sigma, seed)
    dtypes = DTYPES if seed == 0 else DTYPES[:1]
    for dtype in dtypes:
        # float16 would overflow at 1000 times the scale of the others, and loses what lies below its least number.
        certified((weight / first if dtype == torch.float16 else weight).to(dtype), seed)
