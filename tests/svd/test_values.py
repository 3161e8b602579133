# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD against float64 references: right answers for every kind of matrix and every form of input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import check, generator, powers, quietly, randn, same, solve, with_spectrum

from osora import reference
from osora.svd.truncated import decompose, truncated_svd

# -- right answers -----------------------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1), (1, 7, 1), (7, 1, 1), (2, 2, 2), (3, 700, 3), (700, 3, 2), (20, 30, 5), (30, 20, 20),
    (150, 150, 1), (150, 400, 16), (400, 150, 16), (192, 576, 64), (576, 192, 64), (400, 400, 64), (333, 1000, 40),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("d, k, r", SHAPES)
def test_right_for_gaussian_and_decaying_spectra(d, k, r, dtype):
    solve(randn(d, k, dtype=dtype), r)
    solve(with_spectrum(d, k, powers(min(d, k), -0.5), seed=d + k).to(dtype), r)


@pytest.mark.parametrize("method", ["lanczos", "gram", "full"])
@pytest.mark.parametrize("d, k", [(300, 200), (200, 300), (256, 256)])
def test_every_method_gives_the_same_subspace(method, d, k):
    weight = with_spectrum(d, k, powers(min(d, k), -1.0))
    found = solve(weight.float(), 16, tol=1e-5, method=method)
    assert found.method == method
    U, _, V, _ = reference.truncated_svd(weight, 16)
    assert (found.U.double() - U).abs().max() < 1e-4 and (found.V.double() - V).abs().max() < 1e-4


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_tolerance_is_kept_in_float32(tol):
    # sigma is exact to about tol² / gap, and never worse than tol
    solve(
        with_spectrum(500, 400, powers(400, -0.35)).float(), 32, tol=tol, sigma_error=max(1e-5, min(tol, 10 * tol**2))
    )


@pytest.mark.parametrize("tol", [1e-6, 1e-8, 1e-10])
def test_tolerance_is_kept_in_float64(tol):
    solve(with_spectrum(400, 300, powers(300, -0.35)), 24, tol=tol, sigma_error=1e-10)


@pytest.mark.parametrize("d, k, r", [(400, 300, 16), (300, 400, 300), (40, 30, 30), (1, 9, 1), (9, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_matrix(d, k, r, dtype):
    found = solve(torch.zeros(d, k, dtype=dtype), r)
    assert (found.S == 0).all() and (found.residuals == 0).all()


@pytest.mark.parametrize(
    "d, k, true_rank, r", [(300, 400, 5, 16), (400, 300, 1, 32), (60, 50, 7, 50), (576, 576, 30, 64)]
)
def test_rank_deficient(d, k, true_rank, r):
    weight = randn(d, true_rank, seed=1) @ randn(true_rank, k, seed=2)
    found = solve(weight.float(), r)
    assert (found.S[true_rank:] < 1e-5 * found.S[0]).all()


@pytest.mark.parametrize("n, r", [(64, 64), (400, 32), (400, 400), (300, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identity(n, r, dtype):
    solve(torch.eye(n, dtype=dtype), r)


@pytest.mark.parametrize("copies", [17, 60, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_repeated_top_value_over_a_decaying_tail(copies, dtype):
    # A block of 16 sees 16 copies of a repeated value by itself; the others are the probe's and the rounding's to find.
    sigma = torch.cat([torch.full((copies,), 3.0, dtype=torch.float64), powers(576 - copies, -0.4)])
    solve(with_spectrum(576, 576, sigma).to(dtype), 64)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-6, 1e-4])
def test_cluster_across_the_rank(spread):
    sigma = powers(400, -0.3)
    sigma[24:48] = sigma[24] * (1 - spread * torch.arange(24, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        solve(with_spectrum(500, 400, sigma.sort(descending=True).values).to(dtype), 32)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-36, 1e35])
def test_scale_changes_nothing_in_float32(scale):
    solve((randn(300, 400) * scale).float(), 16)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-307])
def test_scale_changes_nothing_in_float64(scale):
    solve(randn(300, 400) * scale, 16)


@pytest.mark.parametrize("power", [-100, 90])
def test_power_of_two_scale_changes_no_digit(power):
    weight, factor = randn(200, 300, dtype=torch.float32), torch.tensor(power)
    one, two = quietly(weight, 16), quietly(torch.ldexp(weight, factor), 16)
    assert torch.equal(one.U, two.U) and torch.equal(one.V, two.V) and torch.equal(one.residuals, two.residuals)
    assert torch.equal(torch.ldexp(one.S, factor), two.S)


@pytest.mark.parametrize("largest", [1e-38, 1e-42, 1e-44])
def test_subnormal_entries(largest):
    # sigma itself may be subnormal and then has few digits: whatever is claimed must be true of what is returned
    weight = (randn(200, 300) * largest).float()
    found = quietly(weight, 16)
    check(weight, found, sigma_error=1e-4)


def test_a_singular_value_beyond_the_range_is_never_called_converged():
    weight = torch.full((100, 80), 3e38)  # sigma_1 = 2.7e40 has no float32
    try:
        found = quietly(weight, 2)
    except (ValueError, RuntimeError, OverflowError):
        return
    assert not found.converged


def test_spectrum_over_twelve_decades():
    sigma = 10 ** torch.linspace(0, -12, 300, dtype=torch.float64)
    solve(with_spectrum(400, 300, sigma), 300)
    solve(with_spectrum(400, 300, sigma), 24)
    solve(with_spectrum(400, 300, sigma).float(), 24)
    check(with_spectrum(400, 300, sigma).float(), quietly(with_spectrum(400, 300, sigma).float(), 300))


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("place", [0, 77])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_one_row_or_column_a_thousand_times_larger(axis, place, shape):
    weight = randn(*shape, dtype=torch.float32)
    (weight if axis == "row" else weight.T)[place] *= 1000
    solve(weight, 32)
    # Here all residuals are at the rounding level of a float32 product with W, which must not be what is reported.
    solve(weight, 32, method="gram")


def test_residuals_are_measured_against_their_own_sigma():
    # sigma_1 = 1e3 sigma_2: a residual of tol·σ₁ would leave nothing of the others
    sigma = powers(300, -0.5)
    sigma[0] = 1000.0
    solve(with_spectrum(300, 300, sigma).float(), 16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 90),
    k=st.integers(1, 90),
    share=st.floats(0, 1),
    exponent=st.sampled_from([0.0, -0.2, -1.0, -3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    sparsity=st.sampled_from([0.0, 0.5, 0.95]),
    seed=st.integers(0, 1000),
)
def test_fuzz_small_shapes(d, k, share, exponent, dtype, sparsity, seed):
    n = min(d, k)
    rank = max(1, round(share * n))
    weight = with_spectrum(d, k, powers(n, exponent), seed)
    weight = torch.where(torch.rand(d, k, generator=generator(seed)) < sparsity, 0.0, weight).to(dtype)
    found = quietly(weight, rank, seed=seed)
    # A part of a nearly repeated value may be missed by as much as its residual.
    check(weight, found, sigma_error=1e-4)
    assert found.converged or n > 4  # a wide spectrum in full rank may honestly fail in float32


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    d=st.integers(130, 260),
    k=st.integers(130, 260),
    r=st.integers(1, 18),
    exponent=st.sampled_from([-0.1, -0.5, -2.0]),
    outlier=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_fuzz_lanczos(d, k, r, exponent, outlier, seed):
    sigma = powers(min(d, k), exponent)
    sigma[0] *= outlier
    solve(with_spectrum(d, k, sigma, seed).float(), r, seed=seed, method="lanczos")


# -- inputs in every form ----------------------------------------------------------------------------------------------


def test_views_give_the_same_bits_as_copies():
    base = randn(400, 260, dtype=torch.float32)
    plain = truncated_svd(base, 8)
    transposed = base.T.contiguous().T
    spaced = torch.zeros(800, 520)[::2, ::2].copy_(base)
    reversed_twice = base.flip(0).flip(0)
    for view in (transposed, spaced, reversed_twice, base.expand(1, 400, 260)[0]):
        assert same(plain, truncated_svd(view, 8))


def test_a_weight_is_never_changed():
    for shape, r in [((300, 200), 16), ((20, 30), 5)]:
        for dtype in (torch.float32, torch.float64):
            weight = randn(*shape, dtype=dtype)
            before = weight.clone()
            truncated_svd(weight, r)
            assert torch.equal(weight, before)


def test_transposing_swaps_the_factors():
    weight = with_spectrum(300, 200, powers(200, -1.0)).float()
    one, two = truncated_svd(weight, 8, tol=1e-5), truncated_svd(weight.T, 8, tol=1e-5)
    sign = (one.U * two.V).sum(0).sign()
    assert (one.U - two.V * sign).abs().max() < 1e-4 and (one.V - two.U * sign).abs().max() < 1e-4


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_parameter_is_decomposed_without_a_graph(grad_mode):
    weight = torch.nn.Parameter(randn(200, 160, dtype=torch.float32))
    with grad_mode():
        found = truncated_svd(weight, 8)
    assert not found.U.requires_grad and found.U.grad_fn is None
    assert same(found, truncated_svd(weight.detach(), 8))


def test_surrounding_modes_change_nothing():
    weight = randn(200, 160, dtype=torch.float32)
    plain = truncated_svd(weight, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(plain, truncated_svd(weight, 8))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert same(plain, truncated_svd(weight, 8))
    finally:
        torch.set_default_dtype(default)


def test_a_default_device_changes_nothing():
    weight = randn(200, 160, dtype=torch.float32)
    plain = truncated_svd(weight, 8)
    with torch.device("meta"):  # as models are built under
        found = truncated_svd(weight, 8)
    assert same(plain, found) and bool(found.converged) and int(found.passes) == int(plain.passes)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(batch):
    weight = randn(*batch, 30, 20, dtype=torch.bfloat16)
    found = truncated_svd(weight, 4)
    assert found.U.shape == (*batch, 30, 4) and found.S.shape == (*batch, 4) and found.V.shape == (*batch, 20, 4)
    assert found.residuals.shape == (*batch, 4) and found.converged.shape == batch and found.passes.shape == batch
    assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float32
    assert found.columns.shape == found.norm.shape == batch and found.columns.dtype == torch.int64
    assert found.residuals.dtype == found.norm.dtype == torch.float64
    assert found.converged.dtype == torch.bool and found.passes.dtype == torch.int64
    exact = torch.linalg.svdvals(weight.double())[..., :4]
    assert torch.allclose(found.S.double(), exact, rtol=1e-5)


def test_a_batch_of_mixed_difficulty():
    n = 250
    hard = with_spectrum(n, n, torch.cat([torch.full((30,), 3.0, dtype=torch.float64), powers(n - 30, -0.1)]))
    heavy = randn(n, n)
    heavy[3] *= 1000
    batch = torch.stack(
        [torch.zeros(n, n), torch.eye(n), randn(n, 2) @ randn(2, n), hard, heavy, 1e-25 * randn(n, n)]
    ).float()
    results = decompose(list(batch), 16, names=[str(i) for i in range(len(batch))])
    for weight, found in zip(batch, results, strict=True):
        check(weight, found)
        assert found.converged, found.name


def test_one_difficult_matrix_does_not_spoil_its_neighbours():
    easy = randn(40, 30, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"for wide \([^)]*\)$"):
        found = decompose(
            [easy, with_spectrum(40, 30, 10 ** torch.linspace(0, -6.2, 30, dtype=torch.float64)).float()],
            30,
            names=["easy", "wide"],
            tol=2e-6,
        )
    assert found[0].converged and not found[1].converged
