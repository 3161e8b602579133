# SPDX-License-Identifier: Apache-2.0
"""Certificates of the truncated SVD are true, and its bits the same wherever a matrix stands."""

import math

import pytest
import torch
from matrices import (
    check,
    gaussian_start,
    hidden_from_start,
    powers,
    quietly,
    randn,
    same,
    solve,
    with_spectrum,
)

from osora.svd.certificate import Certificate, ConvergenceError, Decomposition, report_failure
from osora.svd.truncated import decompose, truncated_svd

# -- the certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["auto", "lanczos", "gram", "full"])
def test_a_tolerance_below_rounding_is_not_called_converged(dtype, method):
    weight = randn(300, 200, dtype=dtype)
    found = quietly(weight, 16, tol=1e-12, method=method)
    check(weight, found, 1e-12)
    assert not found.converged
    assert found.certificate.max_residual < 1e-6  # but as good as float32 factors can be


def test_unconverged_warns_or_raises_by_choice_and_names_the_matrix():
    weight = randn(40, 30, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=r"tol=1e-12 for layer\.7 \("):
        found = truncated_svd(weight, 4, tol=1e-12, name="layer.7")
    assert not found.converged
    words = r"layer\.7 \(residual .*e-0[789] at triplet [1-4] of 4, rounding to float32 may leave .*e-06 there: use "
    with pytest.raises(ConvergenceError, match=words + r"a larger tol or float64 weights\)$"):
        truncated_svd(weight, 4, tol=1e-12, name="layer.7", unconverged="raise")
    with pytest.raises(ValueError, match="unconverged"):
        truncated_svd(weight, 4, unconverged="ignore")


def decomposition(S, residuals, floor, **values):
    values = dict(converged=False, passes=600, method="lanczos", columns=9600, norm=2.0) | values
    U, V = torch.eye(5, len(S)), torch.eye(4, len(S))
    return Decomposition("layer", U, S, V, residuals, floor=floor, **values)


@pytest.mark.parametrize(
    "S, residuals, words",
    [
        ([1.0, 0.5, 2e-5], [1e-7, 1e-7, 2e-3],
         "residual 2.0e-03 at triplet 3 of 3, rounding to float32 may leave 5.0e-01 there: "
         "use a rank of at most 2 or a larger tol or float64 weights"),
        ([1.0, 0.5, 2e-5], [1e-7, 3e-2, 2e-3], "residual 3.0e-02 at triplet 2 of 3 after 600 passes: "
         "use method='full' or a larger tol"),
        ([1.0, 0.5, 2e-6], [1e-7, 1e-4, 0.9], "a larger singular value than its last was seen, or a solver failed: "
         "use method='full' or another seed"),
        ([1.0, 0.5, 2e-6], [1e-7, 1e-4, 1.1], "residual 1.1e+00 at triplet 3 of 3 after 600 passes: "
         "use method='full' or a larger tol"),
        # NaN is not told as rounding.
        ([1.0, 0.5], [math.nan, math.nan], "residual nan at triplet 1 of 2 after 600 passes: use method='full'"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_reached_why_and_the_cure(S, residuals, words):
    item = decomposition(torch.tensor(S), torch.tensor(residuals, dtype=torch.float64), 1e-5)
    with pytest.raises(ConvergenceError) as caught:
        report_failure([item], 1e-3, "raise", stacklevel=2)
    assert f"tol=0.001 for layer ({words}" in str(caught.value)


def test_a_certificate_beside_another_is_no_better_than_either():
    good, bad = Certificate(1e-4, 20, True, "lanczos"), Certificate(3e-3, 40, False, "gram")
    for first, second in ((good, bad), (bad, good)):
        assert first.beside(second) == (3e-3, first.passes, False, first.method)
    assert good.beside(good) == good


def test_the_hidden_direction_is_hidden_from_its_seed_alone():
    # Or gaussian_start() has drifted from philox.h, and the next two tests hide nothing. At this tolerance the first
    # cycle ends the work, unless the probe objects.
    start = gaussian_start(300, 16, seed=3)
    assert abs(float(start.mean())) < 0.06 and abs(float(start.std()) - 1) < 0.05
    sigma = 0.5 * powers(300, -0.3)
    sigma[0] = 1.5
    hidden = hidden_from_start(300, sigma, 1, seed=3)
    passes = [solve(hidden, 16, tol=0.5, seed=seed, sigma_error=0.1).passes for seed in (2, 3, 4)]
    assert passes[0] == passes[2] < passes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden, top", [(1, 10.0), (1, 1.5), (3, 2.0), (12, 1.5)])
def test_a_leading_direction_hidden_from_the_start_is_found(hidden, top, dtype):
    # In exact arithmetic the Krylov space of this start never meets the leading vectors.
    sigma = 0.5 * powers(400, -0.3)
    sigma[:hidden] = top
    found = solve(hidden_from_start(400, sigma, hidden).to(dtype), 16)
    assert (found.S[:hidden] - top).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hidden_direction_over_an_invariant_subspace_is_found(dtype):
    # All else has rank 20, so that the residuals of the first answer are zero: only refill and probe can see it.
    sigma = torch.zeros(300, dtype=torch.float64)
    sigma[:20] = torch.linspace(2, 1, 20)
    found = solve(hidden_from_start(300, sigma, 1).to(dtype), 8)
    assert abs(float(found.S[0]) - 2) < 1e-5


# -- determinism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d, k, r", [(300, 200, 16), (200, 300, 16), (64, 48, 8)])
def test_same_bits_alone_in_a_batch_and_at_another_place(d, k, r):
    batch = torch.stack([randn(d, k, seed=i, dtype=torch.float32) * (1 + i) for i in range(4)])
    whole = truncated_svd(batch, r)
    turned = truncated_svd(batch.flip(0), r)
    for i in range(4):
        alone = truncated_svd(batch[i], r)
        for part in ("U", "S", "V", "residuals", "passes"):
            assert torch.equal(getattr(alone, part), getattr(whole, part)[i])
            assert torch.equal(getattr(alone, part), getattr(turned, part)[3 - i])
    assert same(truncated_svd(batch, r), whole)


def test_names_key_the_stream_wherever_the_matrix_stands():
    weights = [randn(200, 160, seed=i, dtype=torch.float32) for i in range(3)]
    names = ["a", "b", "c"]
    forward = {item.name: item for item in decompose(weights, 8, names=names)}
    backward = {item.name: item for item in decompose(weights[::-1], 8, names=names[::-1])}
    for name, weight in zip(names, weights, strict=True):
        alone = truncated_svd(weight, 8, name=name)
        for found in (forward[name], backward[name]):
            assert torch.equal(found.U, alone.U) and torch.equal(found.V, alone.V) and torch.equal(found.S, alone.S)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**63 - 1}, {"name": "other"}])
def test_another_seed_or_name_starts_elsewhere_and_ends_alike(change):
    weight = with_spectrum(300, 250, powers(250, -0.7)).float()
    one, two = solve(weight, 16, tol=1e-5), solve(weight, 16, tol=1e-5, **change)
    assert not torch.equal(one.U, two.U)
    assert (one.U - two.U).abs().max() < 1e-3 and torch.allclose(one.S, two.S, rtol=1e-6)


def test_torch_random_state_is_neither_used_nor_changed():
    weight = randn(200, 160, dtype=torch.float32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = truncated_svd(weight, 8)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(one, truncated_svd(weight, 8))


@pytest.mark.parametrize("d, k, r", [(400, 300, 32), (1024, 1024, 2), (120, 90, 60)])
def test_number_of_threads_changes_no_bit_of_a_small_matrix(threads, d, k, r):
    batch = randn(3 if d < 1000 else 1, d, k, dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(truncated_svd(batch, r))
        assert torch.get_num_threads() == count, "the caller's setting was changed"
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.slow
def test_a_matrix_above_the_one_thread_limit(threads):
    weight = with_spectrum(1100, 1000, powers(1000, -0.4)).float()
    results = []
    for count in (1, 2):
        threads(count)
        results.append(solve(weight, 32))
        assert torch.equal(results[-1].U, quietly(weight, 32).U)
    assert torch.allclose(results[0].S, results[1].S, rtol=1e-5)
