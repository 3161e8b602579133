# SPDX-License-Identifier: Apache-2.0
"""The share of a weight that its leading triplets hold, against float64, and the rank that holds enough."""

import math

import pytest
import torch

from osora import ConvergenceError, Spectrum, rank_for_energy, spectrum, truncated_svd
from osora.svd.spectrum import captured_energy


def with_values(d, k, sigma):
    """[d, k] in float64 with the singular values ``sigma`` and random singular vectors."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, len(sigma), dtype=torch.float64))[0] for n in (d, k))
    return (left * sigma) @ right.T


def true_energy(weight, rank):
    squares = torch.linalg.svdvals(weight.double()).square()
    return squares.cumsum(-1)[..., :rank] / squares.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d, k, rank", [(60, 40, 7), (40, 60, 40), (300, 200, 16), (1, 9, 1), (9, 1, 1)])
def test_energy_is_the_share_of_the_squared_norm(d, k, rank, dtype):
    weight = with_values(d, k, 1.0 / torch.arange(1, min(d, k) + 1)).to(dtype)
    found = spectrum(weight, rank)
    assert isinstance(found, Spectrum) and bool(found.converged)
    assert found.energy.shape == found.residuals.shape == found.S.shape == (rank,)
    assert found.energy.dtype == found.norm.dtype == torch.float64 and found.norm.shape == ()
    torch.testing.assert_close(found.energy, true_energy(weight, rank), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.norm, torch.linalg.matrix_norm(weight.double()), rtol=1e-12, atol=0)
    assert (found.energy.diff() >= 0).all() and 0 < found.energy[0] and found.energy[-1] <= 1


def test_it_is_one_run_of_the_decomposition():
    weight = torch.randn(200, 150)
    options = dict(tol=1e-5, seed=3, name="layer", method="lanczos")
    found, whole = spectrum(weight, 8, **options), truncated_svd(weight, 8, **options)
    assert torch.equal(found.S, whole.S) and torch.equal(found.residuals, whole.residuals)
    assert not torch.equal(found.residuals, spectrum(weight, 8, **(options | {"seed": 4})).residuals)
    with pytest.raises(ValueError, match="and max_memory is 1000"):
        spectrum(weight, 8, max_memory=1000)
    with pytest.raises(ValueError, match=r"^layer has NaN"):
        spectrum(torch.full((5, 4), math.nan), 2, name="layer")
    with pytest.raises(ConvergenceError, match="layer"):
        spectrum(weight, 8, tol=1e-12, name="layer", unconverged="raise")
    with pytest.warns(RuntimeWarning, match="no certificate"):
        assert not spectrum(weight, 8, tol=1e-12).converged


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (2, 0)])
def test_batches(batch):
    weight = torch.randn(*batch, 30, 20) * (1 + torch.arange(math.prod(batch)).reshape(*batch, 1, 1))
    found = spectrum(weight, 5)
    assert found.S.shape == found.energy.shape == found.residuals.shape == (*batch, 5)
    assert found.norm.shape == found.converged.shape == batch
    torch.testing.assert_close(found.norm, torch.linalg.matrix_norm(weight.double()))
    torch.testing.assert_close(found.energy, true_energy(weight, 5), rtol=0, atol=1e-6)


def test_a_zero_matrix_is_held_by_any_rank():
    weight = torch.stack([torch.zeros(6, 5), torch.eye(6, 5)])
    found = spectrum(weight, 2)
    assert found.energy[0].tolist() == [1.0, 1.0] and found.norm[0] == 0
    assert rank_for_energy(found.energy[0], 1.0) == 1
    # Sigma is right to some roundings of float32, its square to twice as many.
    torch.testing.assert_close(found.energy[1], torch.tensor([0.2, 0.4], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_squares_beyond_the_range_of_the_dtype(scale):
    weight = torch.randn(30, 20, dtype=torch.float64)
    plain = spectrum(weight, 4).energy
    torch.testing.assert_close(spectrum(weight * scale, 4).energy, plain, rtol=1e-10, atol=0)
    if 1e-40 < scale < 1e40:
        torch.testing.assert_close(spectrum((weight * scale).float(), 4).energy, plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_no_number_gives_no_share(norm):
    energy = captured_energy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([norm, 5.0]))
    assert energy[0].isnan().all() and energy[1].isfinite().all()
    assert rank_for_energy(energy[0], 0.1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_triplets_hold_everything(dtype):
    """Sums of rounded squares would end a little off 1, and a rank that holds it all could not be asked for."""
    for d, k in ((64, 64), (200, 120), (30, 7)):
        energy = spectrum(with_values(d, k, torch.linspace(2, 1, min(d, k))).to(dtype), min(d, k)).energy
        assert energy[-1] == 1 and rank_for_energy(energy, 1.0) == min(d, k)
    low = (torch.randn(60, 5, dtype=torch.float64) @ torch.randn(5, 50, dtype=torch.float64)).to(dtype)
    if dtype != torch.bfloat16:  # rounded to 16 bits it is of full rank
        assert rank_for_energy(spectrum(low, 12).energy, 1.0) == 5


def test_the_share_is_never_more_than_the_truth():
    """Whatever a run found: the singular values of a weight's part in a subspace are below its own."""
    weight = with_values(120, 100, 1 + torch.rand(100))
    with pytest.warns(RuntimeWarning, match="no certificate"):
        found = spectrum(weight.float(), 10, method="lowrank", tol=1e-6)
    assert (found.energy <= true_energy(weight, 10) + 1e-6).all()


# -- the rank that holds enough ----------------------------------------------------------------------------------------


def test_rank_for_energy():
    energy = torch.tensor([0.5, 0.75, 0.75, 0.9], dtype=torch.float64)
    wanted = {
        1e-9: 1,
        0.5: 1,
        math.nextafter(0.5, 1): 2,
        0.75: 2,
        0.8: 4,
        0.9: 4,
        math.nextafter(0.9, 1): None,
        1: None,
    }
    assert {fraction: rank_for_energy(energy, fraction) for fraction in wanted} == wanted
    assert type(rank_for_energy(energy, 0.5)) is int


def test_rank_for_energy_of_known_values():
    energy = spectrum(with_values(50, 40, [4.0, 2.0, 2.0, 1.0]).float(), 10).energy  # squares 16, 4, 4, 1 of 25
    assert [rank_for_energy(energy, p) for p in (0.6, 0.7, 0.9, 0.97, 1.0)] == [1, 2, 3, 4, 4]
    assert rank_for_energy(energy[:2], 0.9) is None


@pytest.mark.parametrize("fraction", [0, -0.5, 1.0001, math.nan, math.inf, True, "0.9", None])
def test_a_bad_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be in 0 < fraction <= 1, got"):
        rank_for_energy(torch.ones(3), fraction)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_energies_of_one_matrix(shape):
    with pytest.raises(ValueError, match=r"energy must be \[r\], of one matrix, got shape"):
        rank_for_energy(torch.ones(shape), 0.5)


def test_captured_energy_takes_a_plain_norm():
    energy = captured_energy(torch.tensor([3.0, 2.0], requires_grad=True), 5.0)
    torch.testing.assert_close(energy, torch.tensor([9 / 25, 13 / 25], dtype=torch.float64))
    assert not energy.requires_grad
