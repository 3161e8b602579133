# SPDX-License-Identifier: Apache-2.0
"""SORSA's penalty: its closed forms, and its gradient once a step."""

from collections.abc import Callable

import pytest
import torch
from helpers import tiny_llama
from penalties import (
    EXACT,
    GAMMA,
    adapted,
    batch,
    both_kinds,
    change_by,
    check_penalty_once,
    factors,
    loss_of,
    norm_of,
    orthonormal,
    parameters,
    penalty_gradients,
    sgd,
)
from torch import Tensor, nn

import osora
from osora import OsoraConfig, SorsaConfig
from osora.layers.penalty import deviation, deviation_gradient

# -- closed forms ------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("m, r", [(30, 16), (7, 7), (5, 1)])
@pytest.mark.parametrize("c", [1.1, 0.8, 3.0])
def test_a_scaled_orthonormal_factor(m, r, c, kind):
    """Q = c Q0: ‖QᵀQ − I‖ = |c² − 1| √r; its gradient has norm 2c, that of its square 4 c |c² − 1| √r."""
    start = orthonormal(m, r)
    change = (c - 1) * start
    norm = abs(c**2 - 1) * r**0.5
    value = deviation(change, start, kind)
    gradient = torch.linalg.matrix_norm(deviation_gradient(change, start, kind))
    value_wish, gradient_wish = (norm, 2 * c) if kind == "paper" else (norm**2, 4 * c * norm)
    torch.testing.assert_close(value, torch.tensor(value_wish, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(gradient, torch.tensor(gradient_wish, dtype=torch.float64), **EXACT)


@both_kinds
def test_the_gradient_is_the_derivative(kind):
    start, change = orthonormal(13, 5), (0.2 * torch.randn(13, 5, dtype=torch.float64)).requires_grad_()
    value = deviation(change, start, kind)
    torch.testing.assert_close(value, norm_of(start + change, kind), **EXACT)
    (wish,) = torch.autograd.grad(value, change)
    torch.testing.assert_close(deviation_gradient(change, start, kind), wish, **EXACT)


@both_kinds
def test_an_orthonormal_factor_has_neither_value_nor_gradient(kind):
    start = torch.eye(6, 3, dtype=torch.float64)
    change = torch.zeros_like(start).requires_grad_()
    value = deviation(change, start, kind)
    assert value == 0 and not deviation_gradient(change, start, kind).any()
    assert not torch.autograd.grad(value, change)[0].any(), "not NaN"


def test_why_squared_is_the_default():
    """At a deviation of rounding size the paper's gradient has full size, along noise; the square's vanishes."""
    start = orthonormal(64, 16).float()
    change = torch.zeros_like(start)
    assert deviation(change, start, "paper") < 1e-5
    assert torch.linalg.matrix_norm(deviation_gradient(change, start, "paper")) > 1.5
    assert torch.linalg.matrix_norm(deviation_gradient(change, start, "squared")) < 1e-4


# -- of a model --------------------------------------------------------------------------------------------------------


@both_kinds
def test_the_value(kind):
    model = adapted(kind=kind)
    found = osora.orthonormality(model)
    wish = GAMMA * torch.stack([norm_of(start + p, kind) for p, start in factors(model)]).mean()
    torch.testing.assert_close(found, wish.detach(), check_dtype=True, **EXACT)
    torch.testing.assert_close(osora.orthonormality(model, 1.0) * GAMMA, found, **EXACT)
    gradients = torch.autograd.grad(found, [p for p, _ in factors(model)])
    wish = [g for g in penalty_gradients(model, kind) if g.dim() == 2]
    for got, gradient in zip(gradients, wish, strict=True):
        torch.testing.assert_close(got, gradient, **EXACT)


def test_the_value_of_a_bfloat16_model_is_float32():
    model = adapted(dtype=torch.bfloat16)
    found = osora.orthonormality(model)
    assert found.dtype == torch.float32
    wish = GAMMA * torch.stack([norm_of(start.double() + p.double(), "squared") for p, start in factors(model)]).mean()
    torch.testing.assert_close(found.double(), wish.detach(), rtol=1e-5, atol=0)


def test_without_sorsa_there_is_nothing_to_look_at():
    model = osora.attach(tiny_llama(), OsoraConfig(r=4))
    with pytest.raises(ValueError, match="no SORSA adapter is active"):
        osora.orthonormality(model)
    osora.add_adapter(model, "b", SorsaConfig(r=4))
    with pytest.raises(ValueError, match="no SORSA adapter is active"):
        osora.orthonormality(model)
    assert osora.orthonormality(osora.set_adapter(model, "b")) < 1e-6


# -- once a step -------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("accumulation", [1, 4, 64])
def test_any_accumulation(accumulation, kind):
    def step(model: nn.Module) -> None:
        optimizer = sgd(model)
        for part in batch().chunk(accumulation):
            (loss_of(model, part) / accumulation).backward()
        optimizer.step()

    check_penalty_once(step, kind)


def test_in_the_loss_it_is_not_added_again():
    def step(model: nn.Module) -> None:
        optimizer = sgd(model)
        for part in batch(8).chunk(4):
            ((loss_of(model, part) + osora.orthonormality(model)) / 4).backward()
        optimizer.step()

    check_penalty_once(step)


def test_in_the_loss_of_one_step_alone():
    model = adapted()
    optimizer = sgd(model)
    osora.orthonormality(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    (0 * loss_of(model, batch(2))).backward()
    wish = penalty_gradients(model)
    for change, gradient in zip(change_by(lambda _: optimizer.step(), model), wish, strict=True):
        torch.testing.assert_close(-change, gradient, **EXACT)


def test_to_look_at_it_changes_nothing():
    def step(model: nn.Module) -> None:
        optimizer = sgd(model)
        loss_of(model, batch(2)).backward()
        float(osora.orthonormality(model).detach())
        optimizer.step()

    check_penalty_once(step)


def test_gradients_that_are_zeroed_in_place():
    def steps(model: nn.Module) -> None:
        optimizer = sgd(model)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            (0 * loss_of(model, batch(2))).backward()
            wish.append(penalty_gradients(model))
            optimizer.step()

    wish: list[list[Tensor]] = []
    found = change_by(steps, adapted())
    for change, first, second in zip(found, *wish, strict=True):
        torch.testing.assert_close(-change, first + second, **EXACT)


def test_two_optimisers():
    def step(model: nn.Module) -> None:
        groups = [[p for p in osora.adapter_parameters(model) if (p.dim() == 2) is matrix] for matrix in (True, False)]
        us, vs = groups[0][::2], groups[0][1::2]
        loss_of(model, batch(2)).backward()
        for some in (us, groups[1], vs):
            torch.optim.SGD(some, lr=1.0).step()

    # the second one's penalty does not see the first one's step: U and V are apart in it
    check_penalty_once(step)


def test_what_no_optimiser_holds_is_left_alone():
    model = adapted()
    some = osora.adapter_parameters(model)[:3]
    loss_of(model, batch(2)).backward()
    before = [p.grad.clone() for p in osora.adapter_parameters(model)]
    torch.optim.SGD(some, lr=1.0).step()
    after = [p.grad for p in osora.adapter_parameters(model)]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, False, True, *[False] * (len(before) - 3)], "u, s and v of the first layer"


def test_a_factor_without_a_gradient_has_no_step():
    model = adapted()
    before = parameters(model)
    sgd(model).step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


class Outer(torch.optim.Optimizer):
    """An optimiser whose step is another's, as torch's ZeroRedundancyOptimizer is."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.SGD(params, lr=1.0)

    def step(self, closure: Callable | None = None) -> None:
        self.inner.step(closure)


def test_an_optimiser_within_an_optimiser():
    def step(model: nn.Module) -> None:
        optimizer = Outer(osora.adapter_parameters(model))
        loss_of(model, batch(2)).backward()
        optimizer.step()

    check_penalty_once(step)


class Failing(torch.optim.SGD):
    def step(self, closure: Callable | None = None) -> None:
        raise KeyError("made to fail")


def test_after_a_step_that_failed():
    def step(model: nn.Module) -> None:
        failing = Failing(osora.adapter_parameters(model))
        with pytest.raises(KeyError):
            failing.step()
        loss_of(model, batch(2)).backward()
        sgd(model).step()

    check_penalty_once(step)


@pytest.mark.parametrize("outer", [False, True])
def test_a_closure(outer):
    losses = []

    def step(model: nn.Module) -> None:
        optimizer = Outer(osora.adapter_parameters(model)) if outer else sgd(model)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(2))
            loss.backward()
            return loss

        before = float(loss_of(model, batch(2)).detach() + osora.orthonormality(model).detach())
        losses.append((optimizer.step(closure), before))

    check_penalty_once(step)
    if not outer:
        for loss, before in losses:
            # the model takes its loss in float32
            assert float(loss) == pytest.approx(before, rel=1e-6), "what a line search compares has the penalty"


def test_lbfgs_reaches_the_minimum_of_the_sum():
    """A line search fails at once if values and gradients do not fit."""
    torch.manual_seed(5)
    model = osora.attach(nn.Sequential(nn.Linear(6, 5).double()), SorsaConfig(r=3, gamma=10.0))
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    trained = osora.adapter_parameters(model)
    optimizer = torch.optim.LBFGS(trained, line_search_fn="strong_wolfe", max_iter=1000, tolerance_change=0)

    def total() -> Tensor:
        return nn.functional.mse_loss(model(x), y) + osora.orthonormality(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    before = float(total().detach())
    optimizer.step(closure)
    assert float(total().detach()) < before
    gradients = torch.autograd.grad(total(), trained)
    assert max(float(g.abs().max()) for g in gradients) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler(fused):
    """A fused optimiser gets scaled gradients, and divides: what is added must be scaled as well."""

    def step(model: nn.Module) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(osora.adapter_parameters(model), lr=1.0, fused=fused)
        assert not fused or optimizer._step_supports_amp_scaling
        scaler.scale(loss_of(model, batch(2))).backward()
        scaler.step(optimizer)
        scaler.update()

    check_penalty_once(step)


def test_the_trainer(tmp_path):
    """Nothing in the script says penalty. Four micro-batches a step, two steps, clipping, a learning rate of one."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in batch(8)]

    def train(model: nn.Module, steps: int) -> None:
        arguments = transformers.TrainingArguments(
            tmp_path,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=1e-9,  # of the loss's gradient there is nothing left: the penalty comes after
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=steps,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train()

    model = adapted()
    first, second = penalty_gradients(model), None
    for change, gradient in zip(change_by(lambda m: train(m, 1), model), first, strict=True):
        torch.testing.assert_close(-change, gradient, rtol=0, atol=1e-8)
    model, second = adapted(), [g + h for g, h in zip(first, penalty_gradients(model), strict=True)]
    for change, gradient in zip(change_by(lambda m: train(m, 2), model), second, strict=True):
        torch.testing.assert_close(-change, gradient, rtol=0, atol=1e-8)
