# SPDX-License-Identifier: Apache-2.0
"""SORSA's penalty: closed forms, and that a step gets its gradient exactly once, however the step comes about."""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_llama, token_ids
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import osora
from osora import OsoraConfig, SorsaConfig, adapted_layers
from osora.layers import penalty
from osora.layers.penalty import Penalty, deviation, deviation_gradient

both_kinds = pytest.mark.parametrize("kind", ["squared", "paper"])
GAMMA = 0.3
# Gradients in float64, of numbers of order one, summed over some hundred terms.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def orthonormal(m: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]


def norm_of(Q: Tensor, kind: str) -> Tensor:
    """The penalty of a factor, as the paper writes it."""
    value = torch.linalg.matrix_norm(Q.t() @ Q - torch.eye(Q.shape[1], dtype=Q.dtype))
    return value if kind == "paper" else value**2


# -- closed forms ----------------------------------------------------------------------------------------------------


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


# -- of a model ------------------------------------------------------------------------------------------------------


def adapted(gamma: float = GAMMA, kind: str = "squared", dtype=torch.float64, **config) -> nn.Module:
    torch.manual_seed(3)
    config = SorsaConfig(**({"r": 4, "gamma": gamma, "regularizer": kind} | config))
    return move_adapter(osora.attach(tiny_llama(dtype=dtype), config), 0.1)


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = adapted_layers(model).values()
    return [pair for layer in layers for pair in ((layer.u, layer.U), (layer.v, layer.V))]


def penalty_gradients(model: nn.Module, kind: str = "squared", gamma: float = GAMMA) -> list[Tensor]:
    """By autograd of gamma times the paper's mean; zero for every s."""
    leaves = [(p.detach().double().requires_grad_(), start.double()) for p, start in factors(model)]
    total = gamma * torch.stack([norm_of(start + change, kind) for change, start in leaves]).mean()
    found = iter(torch.autograd.grad(total, [change for change, _ in leaves]))
    penalised = {id(p) for p, _ in factors(model)}
    zero = lambda p: torch.zeros_like(p, dtype=torch.float64)  # noqa: E731
    return [next(found) if id(p) in penalised else zero(p) for p in osora.adapter_parameters(model)]


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in osora.adapter_parameters(model)]


def batch(rows: int = 64) -> Tensor:
    torch.manual_seed(4)
    return token_ids(rows, 5)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def change_by(step: Callable[[nn.Module], None], model: nn.Module) -> list[Tensor]:
    before = parameters(model)
    step(model)
    return [now - old for now, old in zip(parameters(model), before, strict=True)]


def check_penalty_once(step: Callable[[nn.Module], None], kind: str = "squared", times: int = 1, **tolerance) -> None:
    """What a plain SGD step of rate 1 does with gamma, less what it does without, is minus the penalty's gradient."""
    model = adapted(kind=kind)
    wish = penalty_gradients(model, kind)
    found = zip(change_by(step, model), change_by(step, adapted(0.0, kind)), wish, strict=True)
    for with_it, without, gradient in found:
        torch.testing.assert_close(without - with_it, times * gradient, **(EXACT | tolerance))
    assert sum(float(gradient.abs().sum()) for gradient in wish) > 0.1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(osora.adapter_parameters(model), lr=1.0)


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


# -- once a step -----------------------------------------------------------------------------------------------------


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


# -- whose penalty it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_their_own(copy_of):
    def step(model: nn.Module) -> None:
        model = models[model]
        loss_of(model, batch(2)).backward()
        sgd(model).step()

    models: dict[nn.Module, nn.Module] = {}
    model = adapted()
    models[model], before = copy_of(model), parameters(model)
    wish = penalty_gradients(model)
    with_it, plain = copy_of(model), adapted(0.0)
    for changed in (with_it, plain):
        loss_of(changed, batch(2)).backward()
        sgd(changed).step()
    found = zip(parameters(with_it), parameters(plain), wish, strict=True)
    for a, b, gradient in found:
        torch.testing.assert_close(b - a, gradient, **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_it_ends_with_its_adapter():
    gc.collect()
    before = len(penalty.registered)
    model = adapted()
    osora.add_adapter(model, "b", SorsaConfig(r=2, gamma=1.0))
    assert len(penalty.registered) == before + 2
    osora.remove_adapter(model, "b")
    assert len(penalty.registered) == before + 1
    osora.detach(model)
    assert len(penalty.registered) == before


def test_an_adapter_that_waits_has_none():
    model = adapted()
    osora.add_adapter(model, "b", OsoraConfig(r=3))
    loss_of(model, batch(2)).backward()
    waiting = parameters(model)
    model.zero_grad()
    osora.set_adapter(model, "b")
    everything = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model, batch(2)).backward()
    everything.step()
    osora.set_adapter(model, "default")
    assert all(torch.equal(a, b) for a, b in zip(waiting, parameters(model), strict=True))


def test_a_loaded_adapter_has_it_too(tmp_path):
    osora.save_adapter(adapted(0.7, "paper"), tmp_path)
    model = osora.load_adapter(tiny_llama(dtype=torch.float64), tmp_path)
    config = osora.model.state.state_of(model).current.config
    assert (config.gamma, config.regularizer) == (0.7, "paper")
    wish = penalty_gradients(model, "paper", 0.7)
    (0 * loss_of(model, batch(2))).backward()
    for change, gradient in zip(change_by(lambda m: sgd(m).step(), model), wish, strict=True):
        torch.testing.assert_close(-change, gradient, **EXACT)


def test_layers_of_others_can_have_it():
    """What a PEFT tuner's layer needs to offer."""

    class Layer(nn.Module):
        active_adapters = ("x",)

        def __init__(self) -> None:
            super().__init__()
            self.change = nn.Parameter(0.1 * torch.randn(5, 2, dtype=torch.float64))
            self.start = orthonormal(5, 2)

        def penalised(self, adapter: str) -> list[tuple[nn.Parameter, Tensor]]:
            return [(self.change, self.start)] if adapter == "x" else []

    layer = Layer()
    model = nn.Sequential(layer)
    penalty = Penalty([layer], "x", GAMMA, "squared")
    torch.testing.assert_close(osora.orthonormality(model), penalty.value(), **EXACT)
    wish = GAMMA * deviation_gradient(layer.change, layer.start, "squared")
    layer.change.grad = torch.zeros_like(layer.change)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(layer.change.grad, wish, **EXACT)


def test_flattened_parameters_are_refused():
    """As FSDP1 leaves them: the shard of a flat tensor."""
    model = adapted()
    layer = next(iter(adapted_layers(model).values()))
    layer.u = nn.Parameter(layer.u.detach().flatten())
    layer.u.grad = torch.zeros_like(layer.u)
    with pytest.raises(RuntimeError, match=r"shape \[128\] and its start \[32, 4\].*osora knows FSDP2 and DDP"):
        torch.optim.SGD([layer.u], lr=1.0).step()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"gamma": -1.0}, ValueError, "gamma must not be negative"),
        ({"gamma": float("nan")}, TypeError, "gamma must be a finite number"),
        ({"gamma": "1"}, TypeError, "gamma must be a finite number"),
        ({"regularizer": "cubed"}, ValueError, "regularizer must be one of squared, paper, got 'cubed'"),
        ({"alpha": 0}, ValueError, "alpha must be positive"),
    ],
)
def test_wrong_configs(options, error, words):
    with pytest.raises(error, match=words):
        SorsaConfig(**options)


# -- on two processes ------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


WAYS = ["ddp", "ddp, gradients in buckets", "fsdp", "fsdp, in the loss", "fsdp, cast", "zero"]


def take_step(rank: int) -> dict[tuple[str, float], list[Tensor]]:
    # here, since torch 2.13 warns in this import, and the tests take warnings for errors
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = {}
    for way in WAYS:
        for gamma in (GAMMA, 0.0):
            cast = way.endswith("cast")
            model = adapted(gamma, dtype=torch.float32 if cast else torch.float64)
            optimised, ids = model, batch(8).chunk(2)[rank]
            if way.startswith("ddp") or way == "zero":
                optimised = DistributedDataParallel(
                    model, broadcast_buffers=False, gradient_as_bucket_view="buckets" in way
                )
            else:
                options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if cast else {}
                for block in model.model.layers:
                    fully_shard(block, **options)
                fully_shard(model, **options)
            trained = osora.adapter_parameters(model)
            if way == "zero":
                optimizer = ZeroRedundancyOptimizer(trained, torch.optim.SGD, lr=1.0)
            else:
                optimizer = torch.optim.SGD(trained, lr=1.0)
            before = [whole(p).detach().clone() for p in trained]
            for part in ids.chunk(2):
                loss = loss_of(optimised, part)
                if way.endswith("in the loss") and gamma:
                    loss = loss + osora.orthonormality(model)
                (loss / 2).backward()
            optimizer.step()
            now = [whole(p).detach() for p in trained]
            found[way, gamma] = [new - old for new, old in zip(now, before, strict=True)]
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("transformers")
    return on_processes(Path(tmp_path_factory.mktemp("processes")), take_step)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradient_of_one(steps, way):
    cast = way.endswith("cast")  # parameters are float32 then, and so are their differences, of numbers below one
    wish = penalty_gradients(adapted(dtype=torch.float32 if cast else torch.float64))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if cast else EXACT
    for found in steps:
        for with_it, without, gradient in zip(found[way, GAMMA], found[way, 0.0], wish, strict=True):
            torch.testing.assert_close((without - with_it).double(), gradient, **tolerance)
