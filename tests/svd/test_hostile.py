# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD on matrices made to break it: it is right, or it says that it is not; never silently wrong."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from judges import DOUBLE, Truth, cat, judge, truth_of
from matrices import (
    gaussian_start,
    lanczos_basis,
    orthonormal,
    powers,
    quietly,
    randn,
    rounding_floor,
    with_spectrum,
)
from torch import Tensor

from osora.svd.truncated import decompose

# -- the judge ---------------------------------------------------------------------------------------------------------


# -- the matrices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    make: Callable[[], Tensor]
    rank: int = 12


def spectrum(sigma: Tensor | list[float], rank: int = 12, d: int = 170, k: int = 150, dtype=torch.float32) -> Case:
    return Case(lambda: with_spectrum(d, k, torch.as_tensor(sigma, dtype=DOUBLE), seed=3).to(dtype), rank)


def grid(n: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(1, n + 1, dtype=DOUBLE)
    return index[:, None], index[None, :]


def heavy(axis: int, factor: float, d: int = 170, k: int = 150) -> Case:
    def make() -> Tensor:
        weight = randn(d, k, seed=4)
        weight.select(axis, 77).mul_(factor)
        return weight.float()

    return Case(make)


def sparse(d: int, k: int) -> Tensor:
    return torch.where(randn(d, k, seed=1).abs() > 2.576, randn(d, k, seed=2), 0.0).float()  # 1 % are nonzero


def single_entry() -> Tensor:
    weight = torch.zeros(170, 150)
    weight[100, 3] = -7.5
    return weight


def kahan(n: int, angle: float) -> Tensor:
    """Upper triangular, its small singular values far below its diagonal."""
    upper = torch.eye(n, dtype=DOUBLE) - math.cos(angle) * torch.ones(n, n, dtype=DOUBLE).triu(1)
    return math.sin(angle) ** torch.arange(n, dtype=DOUBLE)[:, None] * upper


def companion(n: int) -> Tensor:
    weight = torch.diag(torch.ones(n - 1, dtype=DOUBLE), -1)
    weight[:, -1] = randn(n, seed=7) * 50
    return weight


def blocks(scales: list[float], n: int) -> Tensor:
    return torch.block_diag(*(scale * randn(n, n, seed=i) for i, scale in enumerate(scales)))


def permutation(n: int) -> Tensor:
    return torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(5))]


def extremes(dtype: torch.dtype, large: float, small: float) -> Tensor:
    """Random signs of the largest and the smallest numbers of a dtype, side by side."""
    sign, choice = randn(170, 150, seed=8).sign(), randn(170, 150, seed=9) > 0.5
    return (sign * torch.where(choice, large, small)).to(dtype)


def spiked(d: int, k: int, strengths: list[float]) -> Tensor:
    """Marchenko-Pastur noise with spikes; one stands out of the noise where its strength exceeds (k/d)^(1/4)."""
    left, right = orthonormal(d, len(strengths), 11), orthonormal(k, len(strengths), 12)
    return randn(d, k, seed=10) / d**0.5 + (left * torch.tensor(strengths, dtype=DOUBLE)) @ right.T


def strided(rows: int, cols: int) -> Callable[[], Tensor]:
    return lambda: randn(170 * rows, 150 * cols, seed=13, dtype=torch.float32)[::rows, ::cols]


CASES = {
    # repeated and clustered
    "pairs": spectrum(powers(75, -0.5).repeat_interleave(2)),
    "pairs across the rank": spectrum(powers(75, -0.5).repeat_interleave(2), 13),
    "tens": spectrum(powers(15, -0.7).repeat_interleave(10), 20),
    "tens across the rank": spectrum(powers(15, -0.7).repeat_interleave(10), 25),
    "17 equal, more than a block, at the top": spectrum(cat([3.0] * 17, powers(133, -0.4)), 24),
    "24 equal at the top, float64": spectrum(cat([3.0] * 24, powers(126, -0.4)), 24, dtype=DOUBLE),
    "40 equal across the rank": spectrum(cat(powers(10, -0.2) + 3, [2.0] * 40, powers(100, -0.4)), 20),
    "a cluster of 1e-6 across the rank": spectrum(cat([3, 2.5], 2 - 1e-6 * powers(20, 1), powers(128, -0.4)), 12),
    "a cluster of 1e-4 across the rank": spectrum(cat([3, 2.5], 2 - 1e-4 * powers(20, 1), powers(128, -0.4)), 12),
    "all equal": spectrum([0.7] * 150),
    "all equal but a larger one": spectrum(cat([2.0], [1.0] * 149)),
    "all equal but a smaller one": spectrum(cat([1.0] * 149, [0.5])),
    "all equal to a thousandth": spectrum(1 + 1e-3 * (powers(150, 1).flip(0) / 150)),
    "a step by a tenth after the rank": spectrum(cat([1.1] * 12, [1.0] * 138)),
    # decay
    "6 decades": spectrum(10 ** torch.linspace(0, -6, 150, dtype=DOUBLE)),
    "6 decades to the last": spectrum(10 ** torch.linspace(0, -6, 150, dtype=DOUBLE), 150),
    "12 decades": spectrum(10 ** torch.linspace(0, -12, 150, dtype=DOUBLE)),
    "12 decades, float64": spectrum(10 ** torch.linspace(0, -12, 150, dtype=DOUBLE), 40, dtype=DOUBLE),
    "12 decades within the rank": spectrum(10 ** torch.linspace(0, -40, 150, dtype=DOUBLE), 45),
    "0.999^i": spectrum(0.999 ** powers(150, 1)),
    "0.5^i": spectrum(0.5 ** powers(150, 1)),
    "a power law, its first heavy": spectrum(cat([1000.0], powers(149, -0.5))),
    "a power law, its first too heavy": spectrum(cat([1e6], powers(149, -0.5))),
    "0.999^i, wide": spectrum(0.999 ** powers(150, 1), d=150, k=400),
    # a part that outweighs the rest
    "a row x 1e3": heavy(0, 1e3),
    "a row x 1e6": heavy(0, 1e6),
    "a column x 1e3": heavy(1, 1e3),
    "a column x 1e6": heavy(1, 1e6),
    "a row x 1e3, wide": heavy(0, 1e3, 150, 400),
    "blocks of scales 1, 1e-2, 1e-4": Case(lambda: blocks([1e-2, 1.0, 1e-4], 50).float()),
    "blocks of scales 1, 1e-7, 1e-14, float64": Case(lambda: blocks([1e-7, 1.0, 1e-14], 50)),
    "scales 1e-14 within the rank, float64": Case(lambda: blocks([1e-14, 1.0], 10).clone(), 15),
    # structure
    "1 % nonzero": Case(lambda: sparse(170, 150)),
    "1 % nonzero, wide": Case(lambda: sparse(150, 600)),
    "one entry": Case(single_entry),
    "Hilbert": Case(lambda: (1 / (grid(150)[0] + grid(150)[1] - 1)).float()),
    "Hilbert, float64": Case(lambda: 1 / (grid(150)[0] + grid(150)[1] - 1)),
    "orthogonal": Case(lambda: orthonormal(150, 150, 6).float()),
    "identity": Case(lambda: torch.eye(150)),
    "permutation": Case(lambda: permutation(150)),
    "signed permutation, float16": Case(lambda: (permutation(150) * randn(150, seed=3).sign()).half()),
    "Toeplitz": Case(lambda: (0.9 ** (grid(150)[0] - grid(150)[1]).abs()).float()),
    "tridiagonal Toeplitz": Case(lambda: torch.eye(150) * 2 - torch.eye(151)[1:, :-1] - torch.eye(151)[:-1, 1:]),
    "ones": Case(lambda: torch.ones(170, 150)),
    "constant, bfloat16": Case(lambda: torch.full((150, 170), -3.3, dtype=torch.bfloat16)),
    "checkerboard": Case(lambda: ((grid(150)[0] + grid(150)[1]) % 2).float()),
    "Vandermonde": Case(lambda: torch.vander(torch.linspace(-1, 1, 150, dtype=DOUBLE), 100).float()),
    "Vandermonde, float64": Case(lambda: torch.vander(torch.linspace(-1, 1, 150, dtype=DOUBLE), 100), 20),
    "Kahan": Case(lambda: kahan(150, 1.2).float()),
    "Kahan to the last": Case(lambda: kahan(90, 1.2).float(), 90),
    "companion": Case(lambda: companion(150).float()),
    "lower triangle of ones": Case(lambda: torch.ones(150, 150).tril()),
    "Hadamard": Case(lambda: functools.reduce(torch.kron, [torch.tensor([[1.0, 1], [1, -1]])] * 7)),
    "cosines": Case(lambda: torch.cos(math.pi * (grid(150)[0] - 0.5) * (grid(150)[1] - 1) / 150).float()),
    "rows twice": Case(lambda: randn(90, 150, dtype=torch.float32).repeat(2, 1)),
    "columns twice": Case(lambda: randn(170, 80, dtype=torch.float32).repeat(1, 2)),
    "rows twice, one copy larger": Case(lambda: torch.cat([randn(80, 150), 1e3 * randn(80, 150)]).float()),
    # rank
    "zero": Case(lambda: torch.zeros(170, 150)),
    "rank 1": Case(lambda: (randn(170, 1, seed=1) @ randn(1, 150, seed=2)).float()),
    "rank 5": Case(lambda: (randn(170, 5, seed=1) @ randn(5, 150, seed=2)).float()),
    "rank 5, float64": Case(lambda: randn(170, 5, seed=1) @ randn(5, 150, seed=2)),
    "rank r": Case(lambda: (randn(170, 12, seed=1) @ randn(12, 150, seed=2)).float()),
    "rank r + 1, by a hair": spectrum(cat([1.0] * 12, [1e-4], [0.0] * 137), 13),
    "rank 16, a block": Case(lambda: (randn(150, 16, seed=1) @ randn(16, 300, seed=2)).bfloat16(), 20),
    "rank 76, the basis": Case(lambda: (randn(150, 76, seed=1) @ randn(76, 170, seed=2)).float(), 12),
    # the range of the dtype
    "huge": Case(lambda: (randn(170, 150) * 1e30).float()),
    "tiny": Case(lambda: (randn(170, 150) * 1e-30).float()),
    "huge, 6 decades": spectrum(1e36 * 10 ** torch.linspace(0, -6, 150, dtype=DOUBLE)),
    "near overflow": Case(lambda: (randn(170, 150).clamp(-4, 4) * 1e36).float()),
    "near overflow, bfloat16": Case(lambda: (randn(150, 170).clamp(-4, 4) * 1e36).bfloat16()),
    "subnormal and normal": Case(lambda: torch.where(randn(170, 150, seed=1) > 0, randn(170, 150), 1e-42).float()),
    "subnormal beside 1e30": Case(lambda: torch.where(randn(170, 150, seed=1) > 2, 1e30, 1e-42).float()),
    "float16 extremes": Case(lambda: extremes(torch.float16, 65504.0, 6e-8)),
    "float16 subnormal": Case(lambda: extremes(torch.float16, 3e-5, 6e-8)),
    "bfloat16 extremes": Case(lambda: extremes(torch.bfloat16, 1e36, 1e-40)),
    "bfloat16 subnormal": Case(lambda: extremes(torch.bfloat16, 1e-39, 9.2e-41)),
    "float64 of 1e300": Case(lambda: randn(170, 150) * 1e300),
    "float64 of 1e-300": Case(lambda: randn(170, 150) * 1e-300),
    "float64 from 1e-300 to 1e300": Case(lambda: randn(170, 150) * 10 ** (300 * randn(170, 1, seed=3).clamp(-1, 1))),
    # shape
    "1 x k": Case(lambda: randn(1, 700, dtype=torch.float32), 1),
    "d x 1": Case(lambda: randn(700, 1, dtype=torch.float32), 1),
    "1 x 1": Case(lambda: torch.tensor([[-2.5e-38]]), 1),
    "2 x 2": Case(lambda: torch.tensor([[1.0, 1.0], [0.0, 1e-3]]), 2),
    "2 x 2, equal": Case(lambda: torch.tensor([[0.0, -1.0], [1.0, 0.0]]), 2),
    "primes": Case(lambda: randn(127, 131, dtype=torch.float32), 13),
    "very wide": Case(lambda: randn(64, 3000, dtype=torch.float32), 3),
    "very wide, for Lanczos": Case(lambda: randn(83, 3000, dtype=torch.float32), 12),
    "very tall": Case(lambda: randn(3000, 64, dtype=torch.float32), 3),
    "very tall, for Lanczos": Case(lambda: randn(3000, 83, dtype=torch.float32), 12),
    "every triplet": Case(lambda: randn(90, 80, dtype=torch.float32), 80),
    "the whole space is the basis": Case(lambda: randn(76, 76, dtype=torch.float32), 12),
    # views
    "transposed": Case(lambda: randn(150, 170, dtype=torch.float32).T),
    "every other row": Case(strided(2, 1)),
    "every third column": Case(strided(1, 3)),
    "rows and columns apart": Case(strided(2, 3)),
    "one row for all": Case(lambda: randn(1, 150, dtype=torch.float32).expand(170, 150)),
    "one column for all, bfloat16": Case(lambda: randn(170, 1, dtype=torch.bfloat16).expand(170, 150)),
    "a Hankel matrix of overlapping rows": Case(
        lambda: torch.as_strided(randn(319, dtype=torch.float32), (170, 150), (1, 1))
    ),
    # noise
    "noise": Case(lambda: randn(170, 150, dtype=torch.float32)),
    "noise, square": Case(lambda: randn(300, 300, dtype=torch.float32)),
    "spikes above the edge": Case(lambda: spiked(400, 200, [1.6, 1.2, 1.0, 0.95, 0.9, 0.87]).float(), 6),
    "spikes at the edge": Case(lambda: spiked(400, 200, [0.9, 0.87, 0.85, 0.84, 0.83, 0.8]).float(), 6),
}  # fmt: skip


# At 1e-4: triplets above the rounding floor, but so little that rounding U to float32 moves WᵀU by more than tol sigma
# (docs/svd.md, "When it does not converge"). Everything else must be decomposed.
HARD = {("6 decades to the last", 1e-4), ("12 decades within the rank", 1e-4)}


@functools.lru_cache(maxsize=2)  # the tolerances of one case come one after another
def truth_of_case(name: str) -> Truth:
    return truth_of(CASES[name].make())


def methods_for(weight: Tensor, rank: int) -> list[str]:
    return ["auto", "gram"] + ["lanczos"] * (lanczos_basis(rank) <= min(weight.shape))


@pytest.mark.parametrize("name, tol", [(name, tol) for name in CASES for tol in (1e-3, 1e-4)])
def test_right_or_honest(name, tol):
    truth, rank = truth_of_case(name), CASES[name].rank
    for method in methods_for(truth.weight, rank):
        found = quietly(truth.weight, rank, tol=tol, method=method)
        try:
            judge(truth, found, tol)
        except AssertionError as error:
            raise AssertionError(f"{method}, by {found.method}: {error}") from error
        assert found.converged or (name, tol) in HARD, f"{method}: residual {found.certificate.max_residual:.1e}"


FAR_BELOW = {
    "one value": [1.0, 2e-5],
    "a pair": [1.0, 1.2e-5, 1.1e-5],
    "three of them": [1.0, 0.8, 6e-6, 5e-6, 4e-6],
}


@pytest.mark.parametrize("values", FAR_BELOW)
@pytest.mark.parametrize("method", ["auto", "gram", "lanczos"])
def test_values_that_a_float32_gram_matrix_has_lost(values, method):
    # They are 30 to 170 epsilon |W|: above rounding, and far below what the square of the condition leaves. Random
    # vectors in their place see so little of them that all looks like rounding.
    sigma = cat(FAR_BELOW[values], [0.0] * (150 - len(FAR_BELOW[values])))
    weight = with_spectrum(150, 150, sigma, seed=3).float()
    judge(truth_of(weight), quietly(weight, len(FAR_BELOW[values]), method=method), 1e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["auto", "gram", "lanczos"])
def test_a_dense_plateau_far_below_the_first_value(seed, method):
    # Neighbours differ by 1e-8 sigma_1², less than the rounding of a float32 Gram matrix, and by 0.3 % of themselves.
    sigma = cat([1.0], 3.5e-3 * 0.997 ** powers(149, 1))
    weight = with_spectrum(150, 300, sigma, seed=seed).float()
    judge(truth_of(weight), quietly(weight, 3, method=method), 1e-3)


@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_hopeless_matrices_do_not_touch_their_neighbours(method):
    # Values of 1.1 to 1.5 times the rounding floor, 13 among the 14, are given up after all attempts: rounding U moves
    # each residual by a normal number of some 2e-4 of sigma.
    sigma = cat([1.0], torch.linspace(1.5, 1.1, 13) * rounding_floor(150, 150, torch.float32), 1e-7 * powers(136, -1.0))
    batch = [
        randn(150, 150, dtype=torch.float32),
        with_spectrum(150, 150, sigma, seed=3).float(),
        torch.zeros(150, 150),
        with_spectrum(150, 150, sigma, seed=4).float(),
        torch.eye(150),
        1e30 * randn(150, 150, seed=1, dtype=torch.float32),
        CASES["Kahan"].make(),
        1e-38 * torch.ones(150, 150),
    ]
    names = [f"layer {i}" for i in range(len(batch))]
    with pytest.warns(RuntimeWarning, match=r"layer 1 \(.*layer 3 \("):
        together = decompose(batch, 14, names=names, tol=1e-4, method=method)
    for weight, name, found in zip(batch, names, together, strict=True):
        alone = quietly(weight, 14, name=name, tol=1e-4, method=method)
        for part in ("U", "S", "V", "residuals"):
            assert torch.equal(getattr(found, part), getattr(alone, part)), (name, part)
        assert (found.converged, found.passes, found.method) == (alone.converged, alone.passes, alone.method)
        judge(truth_of(weight), found, 1e-4)
    assert [found.converged for found in together].count(False) == 2


# -- the probe ---------------------------------------------------------------------------------------------------------


def hidden_direction(d: int, k: int, rank: int, seed: int) -> Tensor:
    """[d, k], its first right singular vector orthogonal to each column of the [k, 16] block that Lanczos starts from.

    v₁ is a singular vector and no column has a part of it, so no product with WᵀW brings any in: the Krylov space never
    meets it. As many values as are wanted stand at 1 and above, the rest at a half: the first cycle ends with small
    residuals, before the rounding of v₁ᵀX, 1e-7 or 1e-16, has grown to a size that Rayleigh-Ritz sees.
    """
    start = gaussian_start(k, 16, seed=seed)
    count = min(d, k)
    V = randn(k, count, seed=5)
    basis = torch.linalg.qr(start)[0]
    V[:, 0] -= basis @ (basis.T @ V[:, 0])
    V = torch.linalg.qr(V)[0]
    assert (start.T @ V[:, 0]).abs().max() < 1e-12
    sigma = cat([1.5], torch.linspace(1.1, 1, rank), torch.linspace(0.5, 0.4, count - rank - 1))
    return (orthonormal(d, count, 6) * sigma) @ V.T


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("d, k", [(220, 220), (400, 200), (200, 400)], ids=["square", "tall", "wide"])
def test_the_probe_finds_what_the_start_block_cannot_see(d, k, dtype):
    # The start block is [k, 16] on the CPU, wide or tall, filled row by row.
    # With kProbes = 0 in csrc/core/lanczos.h this fails for all six, after 10 passes in place of 34: "converged", every
    # residual below tol, and S[0] = 1.1 where 1.5 is right: twelve true triplets, and a larger one missed. At this
    # tolerance rounding has no second cycle to find it in.
    weight = hidden_direction(d, k, 12, seed=3).to(dtype)
    truth = truth_of(weight)
    found = quietly(weight, 12, tol=1e-2, method="lanczos", seed=3)
    assert found.converged and found.method == "lanczos"
    judge(truth, found, 1e-2)
    assert abs(float(found.S[0]) - 1.5) < 1e-5
    # Another seed has no such blind spot. That it is done earlier shows that the direction was hidden from this one,
    # and that the probe sent it back.
    other = quietly(weight, 12, tol=1e-2, method="lanczos", seed=4)
    judge(truth, other, 1e-2)
    assert other.passes < found.passes
