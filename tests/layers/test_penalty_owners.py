# SPDX-License-Identifier: Apache-2.0
"""Whose penalty it is: copies, ends, other layers, two processes."""

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from penalties import (
    EXACT,
    GAMMA,
    adapted,
    batch,
    change_by,
    loss_of,
    orthonormal,
    parameters,
    penalty_gradients,
    sgd,
)
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import osora
from osora import OsoraConfig, SorsaConfig, adapted_layers
from osora.layers import penalty
from osora.layers.penalty import Penalty, deviation_gradient

# -- whose penalty it is -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_a_penalty_that_zero_would_drop_is_refused(mark):
    """DeepSpeed's ZeRO marks the parameters and steps flat copies of them."""
    model, ids = adapted(), batch()
    loss_of(model, ids).backward()
    trained = list(osora.adapter_parameters(model))
    for p in trained:
        setattr(p, mark, None)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
    flat.grad = torch.zeros_like(flat)
    with pytest.raises(RuntimeError, match=r"DeepSpeed's ZeRO steps copies.*orthonormality\(model\) to the loss"):
        torch.optim.SGD([flat], lr=1.0).step()
    for _ in range(2):  # in the loss it is where it belongs
        (loss_of(model, ids) + osora.orthonormality(model)).backward()
        torch.optim.SGD([flat], lr=1.0).step()
    osora.detach(model)
    gc.collect()
    torch.optim.SGD([flat], lr=1.0).step()


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


# -- on two processes --------------------------------------------------------------------------------------------------


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
