# SPDX-License-Identifier: Apache-2.0
"""Training on two processes: DDP and FSDP2, on the CPU."""

import multiprocessing
import tempfile
import time
from pathlib import Path

import processes
import pytest
import torch
from helpers import linear_case, move_adapter, tiny_llama, token_ids
from processes import SECONDS, on_processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import osora
from osora import adapted_layers
from osora.layers import OsoraLinear
from osora.svd.certificate import Decomposition

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return move_adapter(osora.attach(tiny_llama(dtype=dtype), osora.OsoraConfig(r=4)))


def batch() -> Tensor:
    torch.manual_seed(4)
    return token_ids(4)


def backward(model: nn.Module, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor from all its shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([whole(parameter.grad).flatten() for parameter in osora.adapter_parameters(model)])


def deltas(model: nn.Module) -> Tensor:
    return torch.cat([whole(parameter).detach().flatten() for parameter in osora.adapter_parameters(model)])


def sharded(model: nn.Module, policy: MixedPrecisionPolicy | None, where: str) -> nn.Module:
    """By block, as accelerate does; or by each adapted layer; or by each base layer alone, in its own unit."""
    options = {"mp_policy": policy} if policy else {}
    for layer in adapted_layers(model).values():
        if where == "layer":
            fully_shard(layer, **options)
        elif where == "base":
            fully_shard(layer.base_layer, **options)
    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


# -- DDP -------------------------------------------------------------------------------------------------------------


def train_ddp(rank: int) -> tuple[list[Tensor], Tensor]:
    model, ids = adapted(), batch().chunk(2)[rank]
    parallel = DistributedDataParallel(model, broadcast_buffers=False)  # U, V and S0 never change
    optimiser, found = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2), []
    for _ in range(2):
        optimiser.zero_grad()
        with parallel.no_sync():
            backward(parallel, ids[:1])
        backward(parallel, ids[1:])
        found.append(gradients(model))
        optimiser.step()
    return found, deltas(model)


def test_ddp_has_the_gradients_of_the_whole_batch(runs):
    """With gradients accumulated over two micro-batches, and steps between."""
    (first, ours), (second, theirs) = runs["train_ddp"]
    assert torch.equal(ours, theirs) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = adapted()
    optimiser = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2)
    for got in first:
        optimiser.zero_grad()
        backward(model, batch())
        # DDP's mean of two sums over two micro-batches, against the mean of all four
        torch.testing.assert_close(got / 2, gradients(model), rtol=1e-3, atol=1e-5)
        osora_step(model, optimiser, got)
    torch.testing.assert_close(deltas(model), ours, rtol=1e-5, atol=1e-6)


def osora_step(model: nn.Module, optimiser: torch.optim.Optimizer, gradient: Tensor) -> None:
    """A step with the very gradient that the processes had: Adam makes much of small differences."""
    for parameter in osora.adapter_parameters(model):
        taken, gradient = gradient[: parameter.numel()], gradient[parameter.numel() :]
        parameter.grad = taken.view_as(parameter).clone()
    optimiser.step()


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


PLACES = ("block", "layer", "base")
DTYPES = {
    "float32": (torch.float32, False),
    "float32 cast to bfloat16": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, deltas cast too": (torch.bfloat16, True),
}


def train_fsdp(rank: int) -> dict[tuple[str, str], tuple[float, Tensor, Tensor, Tensor]]:
    """Every way to shard."""
    found = {}
    for name, (dtype, half) in DTYPES.items():
        for where in PLACES:
            model = sharded(adapted(dtype), HALF if half else None, where)
            before = deltas(model)
            assert all(parameter.dtype == torch.float32 for parameter in osora.adapter_parameters(model))
            optimiser = torch.optim.SGD(osora.adapter_parameters(model), lr=1.0)
            loss = backward(model, batch().chunk(2)[rank])
            assert all(parameter.grad.dtype == torch.float32 for parameter in osora.adapter_parameters(model))
            gradient = gradients(model)
            optimiser.step()
            backward(model, batch().chunk(2)[rank])  # what was gathered is freed and comes back
            found[name, where] = loss, gradient, before, deltas(model)
    return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", DTYPES)
def test_fsdp2_has_the_gradients_of_the_whole_batch(runs, name, where):
    dtype, half = DTYPES[name]
    (loss, got, before, after), (_, same, _, _) = (run[name, where] for run in runs["train_fsdp"])
    assert torch.equal(got, same)
    model, ids = adapted(dtype), batch()
    assert torch.equal(before, deltas(model)) and torch.equal(after, before - got)
    backward(model, ids)
    wish = gradients(model)
    # float32 and bfloat16 throughout: the same numbers but for the order of sums, in bfloat16 also the rounding of
    # another number of rows. Cast: two layers' activations and the gradients themselves are rounded to 8 bits.
    tolerance = 0.15 if half else 1e-5 if dtype == torch.float32 else 0.05
    assert (got - wish).norm() < tolerance * wish.norm()
    assert abs(loss - backward(model, ids[:2])) < (1e-5 if not half and dtype == torch.float32 else 0.05)


def branch_alone(o: Tensor, s: Tensor) -> OsoraLinear:
    """A layer whose base weight is zero: its output is the adapter's and nothing else."""
    case = linear_case((1,), 48, 40, 12)
    base = nn.Linear(48, 40, bias=False).requires_grad_(False)
    layer = OsoraLinear(base, Decomposition("layer", case.U, case.S0, case.V, torch.zeros(12), True, 0, "full"))
    with torch.no_grad():
        base.weight.zero_()
        layer.o.copy_(o)
        layer.s.copy_(s)
    return layer


def small_update(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    layer = branch_alone(torch.zeros(40), torch.zeros(12))
    x = torch.randn(64, 48)
    fully_shard(layer, mp_policy=HALF)
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append((module.o.dtype, module.s.dtype)))
    optimiser = torch.optim.Adam([layer.o, layer.s], lr=1e-4)  # whose first step is 1e-4 in every number
    (layer(x).float() * torch.randn(64, 40)).sum().backward()
    optimiser.step()
    o, s = whole(layer.o).detach(), whole(layer.s).detach()
    y = layer(x)
    handle.remove()
    assert y.dtype == torch.bfloat16 and seen[-1] == (torch.bfloat16, torch.bfloat16)
    return x, y.detach(), o, s, layer.S0


def test_an_update_of_1e_4_survives_in_bfloat16(runs):
    """The deltas are cast, and keep 8 bits of 1e-4; O = 1 + 1e-4 in bfloat16 would be 1, and y zero."""
    (x, y, o, s, S0), _ = runs["small_update"]
    assert o.dtype == s.dtype == S0.dtype == torch.float32
    for delta in (o, s):
        torch.testing.assert_close(delta.abs(), torch.full_like(delta, 1e-4), rtol=1e-2, atol=0)
    torch.manual_seed(5)
    layer = branch_alone(o, s)
    wish = x.double() @ layer.delta_weight().double().t()
    error = (y.double() - wish).norm() / wish.norm()
    assert wish.norm() > 0 and error < 1e-2  # x, U, V, o, s, h, D and y are each rounded once to 8 bits


# -- what needs a whole weight ---------------------------------------------------------------------------------------


def use_sharded(rank: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        osora.save_adapter(adapted(), Path(folder, "adapter"))
        model, said = sharded(adapted(), None, "block"), {}
        for use, call in {
            "merged": lambda: osora.merge(model),
            "exported": lambda: osora.export_lora(model, Path(folder, "lora")),
            "restored": lambda: osora.restore_adapter(model, Path(folder, "adapter")),
            "checked": lambda: osora.load_adapter(sharded(tiny_llama(), None, "block"), Path(folder, "adapter")),
            "decomposed": lambda: osora.add_adapter(model, "b", osora.OsoraConfig(r=5)),
        }.items():
            try:
                call()
            except ValueError as error:
                said[use] = f"{error}; there is now: {[path.name for path in Path(folder).iterdir()]}"
    return said


@pytest.mark.parametrize("use", ["merged", "exported", "restored", "checked", "decomposed"])
def test_what_needs_a_whole_weight_is_refused_with_the_cure(runs, use):
    for said in runs["use_sharded"]:
        assert f"sharded over processes, and cannot be {use} there: " in said[use]
        assert "there is now: ['adapter']" in said[use]


# -- all of it at once -----------------------------------------------------------------------------------------------


def everything(rank: int) -> dict[str, object]:
    return {task.__name__: task(rank) for task in (train_ddp, train_fsdp, small_update, use_sharded)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each task gave on each process. One pair of processes for all: to start it takes longer than to train."""
    pytest.importorskip("transformers")
    found = on_processes(tmp_path_factory.mktemp("processes"), everything)
    return {name: [each[name] for each in found] for name in found[0]}


# -- the tests' own tool ---------------------------------------------------------------------------------------------


def fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("made to fail")
    time.sleep(10 * SECONDS)  # until it is stopped


def lasts(rank: int) -> None:
    time.sleep(10 * SECONDS)


def test_a_failing_process_fails_the_test(tmp_path):
    with pytest.raises(Exception, match="made to fail"):
        on_processes(tmp_path, fails)
    assert not multiprocessing.active_children()


def test_processes_that_do_not_end_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 1)
    with pytest.raises(pytest.fail.Exception, match="have not ended after 1 seconds"):
        on_processes(tmp_path, lasts)
    assert not multiprocessing.active_children()
