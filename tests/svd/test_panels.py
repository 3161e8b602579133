# SPDX-License-Identifier: Apache-2.0
"""Weights that the CPU reads some rows at a time: every shape, stride, dtype, exponent and number of threads."""

import pytest
import torch
from judges import judge, truth_of
from matrices import powers, quietly, randn, with_spectrum

from osora.svd.truncated import decompose

DOUBLE = torch.float64
FLOATS = [torch.float32, DOUBLE, torch.bfloat16, torch.float16]

# csrc/torch/svd/panels.cpp: 8 to 32 rows at a time for at most 48 columns, 64 to 512 rows for more. The columns are
# those of a Lanczos block, 16 and more, those of the rank, and 8 of the probe.


def decaying(d, k, seed=0, exponent=-0.7):
    return with_spectrum(d, k, powers(min(d, k), exponent), seed)


def solved(weight, rank, method="lanczos", tol=1e-4):
    """Right, by the method that is meant."""
    found = quietly(weight, rank, method=method, tol=tol)
    assert found.converged and found.method == method
    judge(truth_of(weight), found, tol)
    return found


def same_bits(one, two):
    return all(torch.equal(getattr(one, part), getattr(two, part)) for part in ("U", "S", "V", "residuals"))


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [65, 66, 71, 72, 73, 79, 80, 81, 95, 96, 97, 100, 111, 112, 113, 143, 144, 145, 151, 209])
def test_row_lengths_around_the_widths_of_the_registers(k):
    # 8, 16 and 48 columns of Aᵀy at a time, the rest one by one.
    solved(decaying(70, k, seed=k).float(), 1)
    solved(decaying(k, 70, seed=k).float(), 1)


@pytest.mark.parametrize("d", [65, 79, 80, 81, 95, 96, 97, 127, 128, 129, 161])
def test_rows_around_a_narrow_panel(d):
    # Panels of 32 rows, tiles of 8 rows in them.
    solved(decaying(d, 77, seed=d).float(), 1)


@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("k", [50, 64])
def test_fewer_rows_than_a_panel(d, k):
    # Too few for Lanczos. As many columns as the rank: eights, which cpu/skinny.h takes, and others.
    for rank in {1, min(8, d), min(16, d), min(24, d), min(d, 40), d}:
        if rank <= k:
            solved(decaying(d, k, seed=d).float(), rank, method="full" if 2 * rank > min(d, k) else "gram", tol=1e-3)


@pytest.mark.parametrize("d", [511, 512, 513, 1023, 1024, 1025])
def test_rows_around_a_wide_panel(d):
    solved(decaying(d, 90, seed=1).float(), 5)  # five columns are BLAS's
    solved(decaying(d, 90, seed=1), 5)


@pytest.mark.parametrize("d", [79, 80, 81])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_so_long_that_a_panel_has_eight(d, dtype):
    solved(decaying(d, 20001, exponent=-1.0).to(dtype), 2, tol=1e-3)


@pytest.mark.parametrize(
    "rank, block, n",
    [(16, 16, 150), (96, 16, 230), (192, 24, 440), (256, 32, 590), (320, 40, 730), (384, 48, 880)],
)
def test_every_width_of_a_block(rank, block, n):
    assert torch.ops.osora.svd_plan(n, n, rank, 4, "lanczos", False, 1)[1] == block
    solved(decaying(n, n + 9, seed=rank).float(), rank, tol=1e-3)


def test_the_widest_block():
    assert torch.ops.osora.svd_plan(1160, 1153, 512, 4, "lanczos", False, 1)[1] == 48
    weight = randn(1160, 1153, dtype=torch.float32) * powers(1153, -0.2).float()
    solved(weight, 512, tol=1e-3)


# -- strides and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d, k, method, rank", [(150, 133, "lanczos", 8), (40, 33, "gram", 8), (520, 90, "lanczos", 5)])
def test_a_view_gives_the_bits_of_its_copy(d, k, method, rank, dtype):
    plain = decaying(d, k, seed=2).to(dtype)
    found = solved(plain, rank, method=method, tol=1e-3)
    wide = torch.full((d, k + 11), torch.nan, dtype=dtype)  # what lies between the rows is not looked at
    wide[:, 3 : k + 3] = plain
    apart = torch.full((3 * d, k), torch.nan, dtype=dtype)
    apart[1::3] = plain
    columns = torch.full((d, 2 * k), torch.nan, dtype=dtype)
    columns[:, ::2] = plain
    both = torch.full((2 * d, 3 * k), torch.nan, dtype=dtype)
    both[::2, 1::3] = plain
    views = {
        "rows apart": wide[:, 3 : k + 3],
        "every third row": apart[1::3],
        "every other column": columns[:, ::2],
        "rows and columns apart": both[::2, 1::3],
        "transposed": plain.T.contiguous().T,
        "of a batch": torch.stack([plain, plain], dim=2)[:, :, 1],
    }
    for name, view in views.items():
        assert not view.is_contiguous() and torch.equal(view, plain)
        assert same_bits(found, quietly(view, rank, method=method, tol=1e-3)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d, k, rank", [(150, 133, 8), (520, 90, 5), (1100, 1000, 16)])
def test_sixteen_bits_are_read_as_the_same_numbers_in_float32(d, k, rank, dtype):
    weight = (randn(d, k) * powers(k, -0.7)).to(dtype)
    assert same_bits(
        quietly(weight, rank, method="lanczos"), quietly(weight.float(), rank, method="lanczos")
    )  # converted panel by panel: no digit differs


@pytest.mark.parametrize("d, k, rank", [(150, 133, 8), (133, 150, 8), (300, 333, 24), (520, 90, 5)])
def test_float32_against_float64(d, k, rank):
    # Gaps of a tenth of sigma and residuals below 1e-5 leave vectors right to some 1e-4.
    sigma = torch.cat([0.9 ** powers(rank + 2, 1), 0.3 * 0.9**rank * powers(min(d, k) - rank - 2, -0.5)])
    weight = with_spectrum(d, k, sigma, seed=4).float()
    single, double = solved(weight, rank, tol=1e-5), solved(weight.double(), rank, tol=1e-9)
    for one, two in ((single.U, double.U), (single.V, double.V)):
        assert (one.double() - two).abs().max() < 1e-4
    assert torch.allclose(single.S.double(), double.S, rtol=1e-6)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    assert ((double.U * exact.U[:, :rank]).sum(0).abs() - 1).abs().max() < 1e-9
    assert ((double.V * exact.Vh[:rank].T).sum(0).abs() - 1).abs().max() < 1e-9


# -- exponents ---------------------------------------------------------------------------------------------------------

EXPONENTS = [(dtype, e) for dtype in (torch.float32, torch.bfloat16) for e in (-100, -40, -33, -20, 20, 31, 40, 100)]
EXPONENTS += [(torch.float16, -8), (torch.float16, 12)]
EXPONENTS += [(DOUBLE, e) for e in (-300, -100, -40, -20, 20, 40, 100, 300)]


@pytest.mark.parametrize("dtype, exponent", EXPONENTS, ids=str)
@pytest.mark.parametrize(
    "d, k, method, rank", [(150, 133, "lanczos", 8), (133, 150, "gram", 8), (520, 90, "lanczos", 5)]
)
def test_a_power_of_two_changes_no_digit(d, k, method, rank, dtype, exponent):
    # Up to 2^32 it is applied to the products, beyond to a copy of the panel: the same digits either way.
    plain = randn(d, k, seed=6).clamp(-4, 4)  # rounded to a grid, so that no dtype rounds the scaled one again
    plain = (plain * 16).round() / 16
    plain, scaled = plain.to(dtype), torch.ldexp(plain, torch.tensor(exponent)).to(dtype)
    assert torch.equal(torch.ldexp(plain.double(), torch.tensor(exponent)), scaled.double())
    one, two = solved(plain, rank, method=method, tol=1e-3), solved(scaled, rank, method=method, tol=1e-3)
    assert torch.equal(one.U, two.U) and torch.equal(one.V, two.V) and torch.equal(one.residuals, two.residuals)
    assert torch.equal(torch.ldexp(one.S.double(), torch.tensor(exponent)), two.S.double())


# -- threads and batches -----------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def above_the_one_thread_limit(dtype, seed=0, exponent=0):
    """1100 x 1100, sigma 0.8^i: gaps that keep the rounding of other sums out of the vectors, without a float64 SVD."""
    left, right = (torch.linalg.qr(randn(1100, 40, seed=2 * seed + i))[0] for i in (1, 2))
    noise = 1e-5 * randn(1100, 1100, seed=seed) / 1100**0.5
    return torch.ldexp((left * 0.8 ** powers(40, 1)) @ right.T + noise, torch.tensor(exponent)).to(dtype)


@pytest.mark.parametrize(
    "dtype, exponent, rank",
    [
        (torch.float32, 0, 16),
        (torch.bfloat16, 0, 16),
        (torch.float32, 60, 16),
        (torch.float32, 0, 5),
        (torch.float32, 0, 36),
        (DOUBLE, 0, 16),
    ],
    ids=str,
)
def test_threads_change_rounding_alone(threads, dtype, exponent, rank):
    # 16: the loops of cpu/skinny.h in the iteration and the last step; 5 and 36: BLAS in the last step; float64: BLAS
    # everywhere. A BLAS that is called by threads of the pool must not count on threads of its own: what it found then
    # depended on the numbers of threads before this one.
    weight = above_the_one_thread_limit(dtype, exponent=exponent)
    results = []
    for count in (1, 3, 2):
        threads(count)
        results.append(quietly(weight, rank, method="lanczos", tol=1e-5))
        assert results[-1].converged
        for _ in range(1 if count == 1 else 2):
            assert same_bits(results[-1], quietly(weight, rank, method="lanczos", tol=1e-5)), f"{count} threads, again"
        assert torch.get_num_threads() == count
    for other in results[1:]:
        # The gaps are a fifth of sigma: rounding, 1e-7, moves a vector by some 5e-7.
        assert torch.allclose(results[0].S, other.S, rtol=1e-6, atol=0)
        assert (results[0].U - other.U).abs().max() < 1e-6 and (results[0].V - other.V).abs().max() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_place_in_a_batch_changes_no_bit(threads, size, count):
    threads(count)
    weights = (
        [above_the_one_thread_limit(torch.float32, seed=i) for i in range(3)]
        if size == "large"
        else [decaying(200, 150, seed=i).float() for i in range(3)]
    )
    names = ["a", "b", "c"]
    alone = [quietly(weight, 8, method="lanczos", name=name) for weight, name in zip(weights, names, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        found = decompose(
            [weights[i] for i in order], 8, names=[names[i] for i in order], method="lanczos", unconverged="raise"
        )
        for place, i in enumerate(order):
            assert same_bits(found[place], alone[i]) and found[place].passes == alone[i].passes
