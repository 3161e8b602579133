# SPDX-License-Identifier: Apache-2.0
"""Matrices with known spectra, and what a decomposition of one must be."""

import math
import warnings

import torch

from osora import reference
from osora.svd.truncated import decompose

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal(rows, cols, seed):
    return torch.linalg.qr(torch.randn(rows, cols, dtype=torch.float64, generator=generator(seed)))[0]


def with_spectrum(d, k, sigma, seed=0):
    """[d, k] in float64 with the singular values ``sigma`` [min(d, k)] and random singular vectors."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (orthonormal(d, len(sigma), 2 * seed + 1) * sigma) @ orthonormal(k, len(sigma), 2 * seed + 2).T


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def powers(count, exponent):
    return torch.arange(1, count + 1, dtype=torch.float64) ** exponent


def quietly(weight, rank, **options):
    """The Decomposition, without the warning for want of convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return decompose([weight], rank, names=[options.pop("name", "")], **options)[0]


def rounding_floor(d, k, dtype):
    """docs/svd.md, "The rounding floor", over σ₁: a twin of csrc/core/svd_verdict.h."""
    return 4 * EPSILON[dtype] * (d**0.5 + k**0.5 + 3)


def true_residuals(weight, found):
    """ρᵢ of the factors as returned, in float64: ``‖Wᵀuᵢ − σᵢvᵢ‖ / max(σᵢ, floor)``.

    The weight and S are scaled by one power of two first, so that no square leaves the range of float64.
    """
    exponent = -math.frexp(float(weight.abs().max()))[1]
    exact = torch.ldexp(weight.double(), torch.tensor(exponent))
    U, S, V = found.U.double(), torch.ldexp(found.S.double(), torch.tensor(exponent)), found.V.double()
    size = torch.linalg.vector_norm(exact.T @ U - V * S, dim=0)
    if found.S.dtype == torch.float64:  # both sides: docs/svd.md, "The certificate"
        size = torch.maximum(size, torch.linalg.vector_norm(exact @ V - U * S, dim=0))
    floor = rounding_floor(*weight.shape, found.S.dtype) * float(S.max())
    return size / S.clamp_min(max(floor, 1e-300))


def check(weight, found, tol=1e-3, sigma_error=1e-5):
    """Everything that is promised of a result, converged or not; then of a converged one."""
    d, k = weight.shape
    rank = found.S.numel()
    dtype = reference.accumulate_dtype(weight.dtype)
    epsilon = EPSILON[dtype]
    assert found.U.shape == (d, rank) and found.S.shape == (rank,) and found.V.shape == (k, rank)
    assert found.U.dtype == found.S.dtype == found.V.dtype == dtype
    assert found.residuals.shape == (rank,) and found.residuals.dtype == torch.float64
    for part in (found.U, found.S, found.V, found.residuals):
        assert part.isfinite().all()
    assert (found.S >= 0).all() and (found.residuals >= 0).all()
    assert (found.S[:-1] >= found.S[1:]).all(), "S is not descending"
    identity = torch.eye(rank, dtype=torch.float64)
    for basis in (found.U.double(), found.V.double()):
        assert (basis.T @ basis - identity).abs().max() < 32 * epsilon, "columns are not orthonormal"
    largest = found.U.gather(0, found.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all(), "sign convention"

    residuals, below = true_residuals(weight, found), found.below_floor
    assert abs(found.floor - rounding_floor(d, k, dtype) * float(found.S[0])) <= 1e-6 * found.floor + 1e-320
    assert torch.equal(below, found.S.double() <= found.floor)
    # What cannot be told apart: rounding, which is an eighth of the floor for what lies that deep.
    deep = found.S.double() <= found.floor / 8
    unknown = torch.where(deep, 1 / 8, 8 * epsilon)
    assert (residuals <= 10 * torch.maximum(found.residuals, unknown)).all(), "a reported residual is too small"
    assert (found.residuals <= 10 * torch.maximum(residuals, unknown)).all(), "a reported residual is too large"
    if not found.converged:
        return
    limit = torch.where(below, 1.0, tol)
    assert (found.residuals <= limit).all() and (
        residuals <= 1.01 * limit + torch.where(deep, 1 / 8, 8 * epsilon)
    ).all()
    exponent = torch.tensor(-math.frexp(float(weight.abs().max()))[1])
    exact = torch.linalg.svdvals(torch.ldexp(weight.double(), exponent))
    error = (torch.ldexp(found.S.double(), exponent) - exact[:rank]).abs()
    # What float32 factors of a matrix of norm ‖W‖ can hold is the second term.
    allowed = sigma_error * exact[:rank] + 4 * epsilon * exact.norm()
    assert (error <= allowed).all(), f"sigma off by {float((error / exact[:rank].clamp_min(1e-300)).max()):.1e}"


def lanczos_basis(rank):
    """Columns the block method needs: the widths of csrc/core/svd_plan.cpp."""
    block = min(max(rank // 64 * 8, 16), 48)
    keep = rank + max(block, rank // 2)
    return keep + max(3, (9 * rank // 4 - keep) // block) * block


def solve(weight, rank, tol=1e-3, sigma_error=1e-5, **options):
    """Decompose, check, and insist on convergence; with every method that is likely, Lanczos last if it can run.

    "auto" takes the Gram matrix for matrices as small as a test's, which would leave the iteration untested.
    """
    methods = [options.pop("method")] if "method" in options else ["auto"]
    if methods == ["auto"] and lanczos_basis(rank) <= min(weight.shape):
        methods.append("lanczos")
    for method in methods:
        found = quietly(weight, rank, tol=tol, method=method, **options)
        check(weight, found, tol, sigma_error)
        assert found.converged, f"{method}: residual {found.certificate.max_residual:.1e} after {found.passes} passes"
    return found


def gaussian_start(rows, cols, seed=0, key=0):
    """What csrc/core/philox.h draws first: a twin in Python integers, so that the two check each other."""
    mask = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    mixed = mix((seed & mask) ^ mix(key & mask))
    out = []
    for i in range((rows * cols + 1) // 2):
        c0, c1, c2, c3 = i & 0xFFFFFFFF, i >> 32, 0, 0
        k0, k1 = mixed & 0xFFFFFFFF, mixed >> 32
        for _ in range(10):
            a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        u = (((c0 << 32 | c1) >> 11) + 0.5) * 2.0**-53
        angle = ((c2 << 32 | c3) >> 11) * 2.0**-53 * 2 * math.pi
        radius = math.sqrt(-2 * math.log(u))
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(out[: rows * cols], dtype=torch.float64).reshape(rows, cols)


def hidden_from_start(n, sigma, hidden, block=16, seed=0):
    """[n, n] whose ``hidden`` first right singular vectors are orthogonal to the start block of Lanczos."""
    start = torch.linalg.qr(gaussian_start(n, block, seed=seed))[0]
    V = randn(n, n, seed=5)
    V[:, :hidden] -= start @ (start.T @ V[:, :hidden])
    V = torch.linalg.qr(V)[0]  # Householder: column i stays in the span of the first i
    assert (start.T @ V[:, :hidden]).abs().max() < 1e-12
    return (orthonormal(n, n, 6) * torch.as_tensor(sigma, dtype=torch.float64)) @ V.T


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
