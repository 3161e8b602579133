# SPDX-License-Identifier: Apache-2.0
"""The operator beside a card, from its arguments down: which attempt is made, in which precision, and what follows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import make_backend
from torch import Tensor

from osora.svd.arguments import METHOD_NAMES as METHODS

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DRIVERS = ("gesvd", "gesvdj", "gesvdp", "gesvda", "gesvdr")
RANK = 6


class Card:
    """torch.ops.osora.truncated_svd, of weights that are on the device of the stand-ins."""

    def __init__(self) -> None:
        self.operators, self.standins = torch.ops.osora_emulated, torch.ops.osora_standins

    def __call__(self, weights: list[Tensor], rank: int = RANK, tol: float = 1e-3, **wishes: Any) -> dict[str, Tensor]:
        wishes = {"method": "auto", "max_memory": 0} | wishes
        keys = list(range(len(weights)))
        self.operators.asked()
        found = self.operators.truncated_svd(weights, rank, tol, 0, keys, wishes["method"], wishes["max_memory"])
        names = ("U", "S", "V", "residuals", "converged", "passes", "method", "columns", "norms", "floors")
        return dict(zip(names, found, strict=True))

    def asked(self) -> list[str]:
        return list(self.operators.asked())


@pytest.fixture
def card() -> Iterator[Card]:
    make_backend("emulated")
    if not hasattr(torch.ops.osora_emulated, "asked"):
        pytest.skip("the emulator was built without the CUDA headers")
    card = Card()
    card.standins.reset()
    card.standins.set("capability", 80)
    card.standins.set("own_workspace", 1)
    yield card
    assert card.standins.refusals() == []
    assert card.standins.faults_left() == 0
    card.standins.reset()
    card.operators.set_free_memory(2**32)


def check(weight: Tensor, found: dict[str, Tensor], b: int = 0, tol: float = 1e-3) -> None:
    exact = weight.double()
    U, S, V = (found[name][b].double() for name in "USV")
    truth = torch.linalg.svdvals(exact)[: S.numel()]
    unit = 1e-11 if weight.dtype == FLOAT64 else 3e-6
    assert found["converged"][b]
    assert (S - truth).abs().max() <= max(unit, tol**2) * truth[0]
    eye = torch.eye(S.numel(), dtype=FLOAT64)
    assert (U.mT @ U - eye).abs().max() < unit and (V.mT @ V - eye).abs().max() < unit
    residuals = torch.linalg.norm(exact.mT @ U - V * S, dim=0)
    assert (residuals <= 1.01 * tol * S + 10 * unit * truth[0]).all()
    assert float(found["norms"][b]) == pytest.approx(float(exact.norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(card, method, dtype):
    weights = [torch.randn(90, 70).to(dtype), torch.randn(90, 70).to(dtype)]
    if method == "lowrank":  # which stops after a fixed number of passes
        weights = [torch.linalg.qr(torch.randn(90, 70))[0][:, :5].to(dtype) @ torch.randn(5, 70).to(dtype)] * 2
        found = card(weights, 5, method=method)
    else:
        found = card(weights, method=method)
    for b, weight in enumerate(weights):
        check(weight, found, b)
    assert found["U"].dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)


def test_a_batch_is_handed_down_at_once_as_far_as_it_fits(card):
    weights = [torch.randn(110, 90) for _ in range(5)]
    check(weights[4], card(weights, method="lanczos"), 4)
    assert card.asked() == ["lanczos of 5 in Float"]
    bytes_each = int(torch.ops.osora.svd_plan(110, 90, RANK, 4, "lanczos", True, 1)[4])
    # half of what is free; and a matrix that needs more is tried all the same
    for free, batches in ((4 * bytes_each, [2, 2, 1]), (5 * bytes_each, [2, 2, 1]), (1, [1] * 5)):
        card.operators.set_free_memory(free)
        found = card(weights, method="lanczos")
        assert card.asked() == [f"lanczos of {count} in Float" for count in batches]
        check(weights[4], found, 4)
    card(weights, method="lanczos", max_memory=3 * bytes_each)
    assert card.asked() == ["lanczos of 3 in Float", "lanczos of 2 in Float"]
    with pytest.raises(ValueError, match=f'takes {bytes_each} bytes by method "lanczos", and max_memory is 5'):
        card(weights, method="lanczos", max_memory=5)


def test_what_float32_cannot_certify_is_tried_in_float64(card):
    weights = [torch.randn(110, 90), torch.zeros(110, 90)]
    found = card(weights, tol=1e-8, method="lanczos")
    assert card.asked() == ["lanczos of 2 in Float", "lanczos of 1 in float64"]
    assert found["converged"].tolist() == [True, True] or found["residuals"][0].max() > 1e-8


def fading(decades: float, d: int = 60, k: int = 50) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=FLOAT64))[0] for n in (d, k))
    return (left * torch.logspace(0, -decades, k, dtype=FLOAT64)) @ right.mT


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64], ids=str)
def test_full_is_what_is_left_after_gram_and_is_in_float64(card, dtype):
    """Values over more decades than a Gram matrix in float64 can tell apart: a full SVD in float32 could not either."""
    weight = fading(14 if dtype == FLOAT64 else 7).to(dtype)
    found = card([weight], 40, tol=1e-6, method="gram")
    asked = card.asked()
    assert asked[-1] == "gesvdp in float64"
    assert asked[:-1] == ["gram of 1 in float64"], "and no float32 Gram matrix for most of the spectrum"
    assert METHODS[int(found["method"][0])] in ("full", "gram")


def test_full_tries_float64_and_not_the_same_again(card):
    weight = torch.randn(60, 50)
    found = card([weight], tol=1e-12, method="full")
    assert card.asked() == ["gesvdp in Float", "gesvdp in float64"]
    assert not found["converged"][0] and found["residuals"].max() < 1e-5
    assert METHODS[int(found["method"][0])] == "full"


def test_a_driver_that_fails_is_an_attempt_that_did_not_converge(card):
    """And not the end of a model: what came before it stands."""
    weights = [fading(7).float(), torch.randn(60, 50)]
    card.standins.inject("cusolverDnXgesvdp", 1, 0, 3, 0)  # info 3
    found = card(weights, 40, tol=1e-6, method="gram")
    assert card.asked()[-1] == "gesvdp in float64"
    assert not found["converged"][0] and found["converged"][1]
    assert METHODS[int(found["method"][0])] == "gram", "the answer that was there"
    assert all(torch.isfinite(found[name]).all() for name in ("U", "S", "V", "residuals"))


def test_the_next_attempt_follows_a_failed_driver(card):
    weight = torch.randn(60, 50)
    card.standins.inject("cusolverDnXgesvdp", 1, 0, 3, 0)
    found = card([weight], method="full")
    assert card.asked() == ["gesvdp in Float", "gesvdp in float64"]
    check(weight, found)


def test_where_no_driver_has_an_answer_its_reason_is_the_error(card):
    for nth in (1, 2):  # both attempts
        card.standins.inject("cusolverDnXgesvdp", nth, 0, 3, 0)
    with pytest.raises(RuntimeError, match=r"osora::truncated_svd: cuSOLVER's gesvdp did not converge \(info = 3\)"):
        card([torch.randn(60, 50)], method="full")
    card.standins.inject("cusolverDnXgesvd", 1, 0, 2, 0)
    with pytest.raises(RuntimeError, match=r"cuSOLVER's gesvd did not converge \(info = 2\)"):
        card([torch.randn(60, 50)], method="gesvd")


def test_a_call_that_cusolver_refuses_is_no_attempt(card):
    card.standins.inject("cusolverDnXgesvdp", 1, 6)
    with pytest.raises(RuntimeError, match="gesvdp: cuSOLVER status 6"):
        card([torch.randn(60, 50)], method="full")
    card.standins.inject("cusolverDnXgesvdp", 1, 0, -4, 0)
    with pytest.raises(RuntimeError, match=r"gesvdp found one of its arguments wrong \(info = -4\)"):
        card([torch.randn(60, 50)], method="full")


@pytest.mark.parametrize("method", ["auto", "lanczos", "gesvdp"])
@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_any_work(card, method, entry):
    weight = torch.randn(110, 90)
    weight[7, 5] = entry
    with pytest.raises(ValueError, match="a weight has NaN or infinite entries"):
        card([torch.randn(110, 90), weight], method=method)
    assert card.asked() == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 5)])
def test_tiny_and_strided(card, shape):
    weight = torch.randn(2 * shape[0], 3 * shape[1])[::2, ::3]
    for method in ("auto", "gram", "full", "gesvdj"):
        check(weight, card([weight], 1, method=method))
    check(weight.mT, card([weight.mT], 1))
