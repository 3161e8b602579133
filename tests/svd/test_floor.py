# SPDX-License-Identifier: Apache-2.0
"""The rounding floor of the truncated SVD: derived from the arithmetic, the same by every method, and told."""

import logging
import math

import pytest
import torch
from helpers import tiny_llama
from judges import cat, judge, truth_of
from matrices import (
    hidden_from_start,
    lanczos_basis,
    quietly,
    randn,
    rounding_floor,
    with_spectrum,
)

import osora
from osora import reference
from osora.svd import plan
from osora.svd.certificate import Decomposition

DOUBLE = torch.float64
SHAPES = [(130, 260), (260, 130), (200, 200)]
METHODS = ["auto", "lanczos", "gram", "full"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, DOUBLE]


def floor_of(weight, largest=1.0):
    return rounding_floor(*weight.shape, reference.accumulate_dtype(weight.dtype)) * largest


# -- the derivation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (130, 260), (4096, 11008)])
def test_the_floor_is_the_formula_of_the_documents(shape, dtype):
    exact = reference.accumulate_dtype(dtype)
    assert plan.rounding_floor(shape, dtype) == pytest.approx(rounding_floor(*shape, exact), rel=1e-15)


def in_turn(a, b):
    """a b in float32, each sum one term after the other: as much rounding as an order of summation can make."""
    out = torch.zeros(a.shape[0], b.shape[1])
    for i in range(a.shape[1]):
        out += a[:, i : i + 1] * b[i : i + 1]
    return out


MATRICES = {
    "noise": lambda d, k: randn(d, k),
    "positive": lambda d, k: randn(d, k).abs(),  # partial sums grow as fast as they can
    "a dominant value": lambda d, k: with_spectrum(d, k, cat([1.0], 1e-4 * torch.rand(min(d, k) - 1, dtype=DOUBLE))),
    "a heavy row": lambda d, k: torch.cat([1e3 * randn(1, k), randn(d - 1, k, seed=1)]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("d, k", [*SHAPES, (40, 900)])
def test_rounding_stays_below_the_floor(name, d, k):
    """Of exact triplets, rounded to float32 and multiplied in float32: the root mean square is an eighth of it."""
    weight = MATRICES[name](d, k).float()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    u, s, v = U.float(), S.float(), Vh.T.float()
    noise = floor_of(weight, float(S[0])) / 8
    for error in (
        weight.double().T @ u.double() - v.double() * s.double(),  # the rounding of U, S and V alone
        in_turn(weight.T.contiguous(), u).double() - weight.double().T @ u.double(),
        in_turn(weight, v).double() - weight.double() @ v.double(),
    ):
        size = error.norm(dim=0)
        assert size.square().mean().sqrt() <= noise and size.max() <= 8 * noise


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d, k", SHAPES)
def test_a_value_above_the_floor_is_certified_and_one_below_is_told(d, k, method, dtype):
    # In float64, what lies below 1e-8 sigma_1 is beyond a Gram matrix: "full" follows the other methods.
    values = torch.tensor([3.0, 1.3, 0.7, 0.1, 0.0], dtype=DOUBLE) * rounding_floor(d, k, dtype)
    weight = with_spectrum(d, k, cat([1.0, 0.5, 1e-2], values, [0.0] * (min(d, k) - 8)), seed=2).to(dtype)
    found = quietly(weight, 8, method=method, tol=1e-2)  # 1e-2: rounding U moves the residual of 1.3 floors by 2e-4
    judge(truth_of(weight), found, 1e-2)
    assert found.converged and found.below_floor.tolist() == [False] * 5 + [True] * 3
    assert found.certificate.max_residual == found.residuals[:5].max() <= 1e-2 and found.residuals.max() <= 1
    truth = torch.linalg.svdvals(weight.double())[:5]
    assert ((found.S[:5].double() - truth).abs() <= 1e-2 * truth).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("true_rank", [0, 1, 5, 16])
def test_a_rank_that_is_smaller_than_asked_for_is_told(true_rank, method, dtype):
    # Entries of +-1 and their sums are exact in every dtype: the rank is what it looks like.
    weight = (randn(150, true_rank, seed=1).sign() @ randn(true_rank, 170, seed=2).sign()).to(dtype)
    found = osora.truncated_svd(weight, 24, method=method, unconverged="raise")
    assert found.below_floor.tolist() == [False] * true_rank + [True] * (24 - true_rank)
    assert found.floor == pytest.approx(floor_of(weight, float(found.S[0])), rel=1e-6)
    batch = osora.truncated_svd(torch.stack([weight, weight]), 24, method=method)
    assert batch.below_floor.shape == (2, 24) and torch.equal(batch.below_floor[1], found.below_floor)
    assert batch.floor.tolist() == [float(found.floor)] * 2


@pytest.mark.parametrize("scale", [1e-36, 1e25])
def test_the_floor_moves_with_the_weight(scale):
    weight = (randn(150, 5, seed=1) @ randn(5, 170, seed=2)).float()
    one, other = (osora.truncated_svd(w, 12, unconverged="raise") for w in (weight, (scale * weight.double()).float()))
    assert torch.equal(one.below_floor, other.below_floor) and other.floor == pytest.approx(
        scale * float(one.floor), 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_value_above_the_floor_is_not_lost_among_those_below(dtype):
    # All else has rank 5, so that everything that is found is right; one value of 20 floors stands outside of what the
    # start block sees.
    sigma = torch.zeros(300, dtype=DOUBLE)
    sigma[0], sigma[1:6] = 20 * rounding_floor(300, 300, dtype), torch.linspace(2, 1, 5)
    weight = hidden_from_start(300, sigma, 1).to(dtype)
    found = quietly(weight, 8, method="lanczos")
    assert found.converged
    judge(truth_of(weight), found, 1e-3)
    assert found.below_floor.tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("r", [12, 17])
@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_values_below_the_floor_are_still_as_exact_as_float64_finds_them(r, method):
    # Nothing promises it; between the noise and the floor, an eighth of it, a finer arithmetic is asked all the same.
    sigma = torch.arange(1, 131, dtype=DOUBLE) ** -2.0
    sigma[0] *= 1000
    weight = with_spectrum(130, 260, sigma, seed=7).float()
    found, truth = quietly(weight, r, method=method), torch.linalg.svdvals(weight.double())[:r]
    known = truth > found.floor / 8
    assert found.converged and bool((known & found.below_floor).any())
    assert ((found.S.double() - truth).abs() / truth)[known].max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize(
    "d, k, true_rank, r", [(400, 300, 1, 32), (300, 400, 1, 64), (192, 576, 2, 64), (576, 576, 33, 64)]
)
def test_an_exhausted_space_is_not_worked_on(d, k, true_rank, r, dtype):
    """All there is has been found after a block or two. What rounding leaves of further ones is not taken for more of
    it, or the basis would lose its orthogonality and the attempt be repeated in float64: 104 passes instead of 28.
    """
    weight = (randn(d, true_rank) @ randn(true_rank, k, seed=9)).to(dtype)
    found = quietly(weight, r, method="lanczos")
    assert found.converged and found.passes < 40 and found.residuals[:true_rank].max() < 1e-5


def test_leading_triplets_keep_their_floor():
    found = quietly((randn(90, 3, seed=1) @ randn(3, 80, seed=2)).float(), 6)
    assert found.below_floor.tolist() == [False] * 3 + [True] * 3
    assert (
        found.leading(4).below_floor.tolist() == [False] * 3 + [True]
        and found.leading(2).certificate.max_residual <= 1e-3
    )
    unknown = Decomposition("", found.U, found.S, found.V, found.residuals, True, 1, "gram")
    assert math.isnan(unknown.floor) and not unknown.below_floor.any()


# -- in a model --------------------------------------------------------------------------------------------------------


def model_of_small_rank():
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(randn(weight.shape[0], 3, seed=1).float() @ randn(3, weight.shape[1], seed=2).float())
    return model


def test_attach_notes_a_layer_of_smaller_rank(caplog):
    model = model_of_small_rank()
    with caplog.at_level(logging.INFO, logger="osora"):
        osora.attach(model, osora.OsoraConfig(r=8))
    notes = {m.name.rpartition(".")[2]: m.note for m in osora.summary(model).modules if m.note}
    assert notes == {
        "q_proj": "its weight has rank 0 to rounding, less than 8",
        "up_proj": "its weight has rank 3 to rounding, less than 8",
    }
    assert f"up_proj: {notes['up_proj']}" in str(osora.summary(model)) and notes["up_proj"] in caplog.text
    assert osora.summary(model).converged and osora.summary(model).max_residual <= 1e-3


def test_attach_by_energy_keeps_nothing_of_what_is_zero():
    model = model_of_small_rank()
    osora.attach(model, osora.OsoraConfig(r=8, rank_for_energy=1.0, target_modules=["up_proj"]))
    (module,) = osora.summary(model).modules
    assert module.rank == 3 and module.note == ""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_notes_it_too(caplog):
    peft = pytest.importorskip("peft")
    import osora.peft

    with caplog.at_level(logging.INFO, logger="osora"):
        peft.get_peft_model(model_of_small_rank(), osora.peft.OsoraConfig(r=8, target_modules=["up_proj"]))
    assert "up_proj: its weight has rank 3 to rounding, less than 8" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_such_an_adapter_is_verified(tmp_path, dtype):
    model = model_of_small_rank().to(dtype)
    model.save_pretrained(tmp_path / "base")
    osora.attach(model, osora.OsoraConfig(r=8, tol=1e-4))
    osora.save_adapter(model, tmp_path / "adapter")
    checked = osora.verify_adapter(tmp_path / "adapter", tmp_path / "base", progress=False)
    assert checked.ok and checked.residual <= (1e-2 if dtype == torch.float32 else 1.0)


def test_lanczos_is_tested_here_at_all():
    assert max(lanczos_basis(r) for r in (8, 12, 17, 24)) <= 130
