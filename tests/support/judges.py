# SPDX-License-Identifier: Apache-2.0
"""What singular triplets must be, whatever the matrix."""

import math
from dataclasses import dataclass

import torch
from matrices import (
    EPSILON,
    rounding_floor,
)
from torch import Tensor

from osora import reference
from osora.svd.certificate import Decomposition

DOUBLE = torch.float64


@dataclass
class Truth:
    """A weight scaled by a power of two, so that no square leaves the range of float64, and its singular values."""

    weight: Tensor
    exponent: int
    exact: Tensor
    sigma: Tensor


def truth_of(weight: Tensor) -> Truth:
    exponent = -math.frexp(float(weight.abs().max()))[1]
    exact = torch.ldexp(weight.double(), torch.tensor(exponent))
    return Truth(weight, exponent, exact, torch.linalg.svdvals(exact))


def judge(truth: Truth, found: Decomposition, tol: float) -> None:
    """Right and converged, or honest about what it is: of the factors as returned, in float64."""
    exact, rank = truth.exact, found.S.numel()
    dtype = reference.accumulate_dtype(truth.weight.dtype)
    norm, epsilon = float(exact.norm()), EPSILON[dtype]
    for part in (found.U, found.S, found.V, found.residuals):
        assert part.isfinite().all(), "NaN or infinite"
    assert found.U.dtype == found.S.dtype == found.V.dtype == dtype
    U, S, V = found.U.double(), torch.ldexp(found.S.double(), torch.tensor(truth.exponent)), found.V.double()
    assert (S >= 0).all() and (S[:-1] >= S[1:]).all(), "not descending"

    # A basis of float32 columns: 1e-5 is what is promised, 32 roundings what is reached.
    for basis in (U, V):
        assert (basis.T @ basis - torch.eye(rank, dtype=DOUBLE)).abs().max() < min(1e-5, 32 * epsilon)
    # Rounding U, S, V to the dtype moves W V and U S by half an epsilon of |W| in all, the products by some more. In
    # float64 nothing is wide enough for the squares of YᵀY: W V = U S as well as WᵀU = V S, and no better.
    # Below the rounding floor both sides are rounding.
    floor = rounding_floor(*exact.shape, dtype) * float(S[0])
    below, reference_size = S <= floor, S.clamp_min(max(floor, 1e-300))
    left = (exact @ V - U * S).norm(dim=0)
    rounding = 16 * epsilon * norm + (tol * S if dtype == DOUBLE else 0.0)
    assert (left <= torch.where(below, max(16 * epsilon * norm, floor), rounding)).all(), "W V is not U S"

    residuals = (exact.T @ U - V * S).norm(dim=0) / reference_size
    if dtype == DOUBLE:  # both sides: docs/svd.md, "The certificate"
        residuals = torch.maximum(residuals, left / reference_size)
    # The product that measures a residual rounds too: by some epsilons of |W|.
    rounding = 2 * epsilon * norm / reference_size
    if not found.converged:
        assert (residuals <= 2 * found.residuals + rounding).all(), "a reported residual is too small"
        assert (found.residuals <= 2 * residuals + rounding).all(), "a reported residual is too large"
        return
    limit = torch.where(below, 1.0, tol)
    assert (found.residuals <= limit).all() and (residuals <= limit + rounding).all(), "residuals"
    # docs/svd.md, "The certificate": of second order against the gap to what was not found, and at most of first order.
    # The residuals of the others enter by the gap: the largest serves for all.
    size = residuals.max() * S
    gap = S - torch.cat([truth.sigma, torch.zeros(1, dtype=DOUBLE)])[rank]
    rule = torch.minimum(size, size**2 / gap.clamp_min(1e-300))
    # Rounding moves a singular value by its own size, and no more below the floor, which is higher.
    allowed = torch.maximum(1e-5 * S, rule) + 8 * epsilon * norm
    error = (S - truth.sigma[:rank]).abs()
    worst = int((error - allowed).argmax())
    assert (error <= allowed).all(), (
        f"sigma[{worst}] is {float(S[worst]):.8e}, not {float(truth.sigma[worst]):.8e}: "
        f"off by {float(error[worst]):.1e}, allowed {float(allowed[worst]):.1e}"
    )


def cat(*parts: Tensor | list[float]) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=DOUBLE) for part in parts])
