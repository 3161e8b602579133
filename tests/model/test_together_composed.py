# SPDX-License-Identifier: Apache-2.0
"""Layers that work together within torch's other machinery, calls within calls, and the life of a model."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from composed import from_dynamo, gradients
from helpers import logits, move_adapter, tiny_llama, token_ids
from side_by_side import FEW, MANY, Pair, adapt, assert_same, both, called, hooks_of, step
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers import together as layers_together


@pytest.fixture(autouse=True)
def joined_on_a_cpu(monkeypatch):
    """Siblings share a product here too, so that it is tested."""
    monkeypatch.setattr(layers_together, "JOINED_ON", ("cpu", "cuda"))


# -- within torch's machinery ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_gradient_checkpointing(reentrant, tokens):
    alone, together = both()
    ids, found = token_ids(*tokens), []
    for model in (alone, together):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found.append(step(model, ids))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if tokens == FEW else 1e-4, atol=0 if tokens == FEW else 1e-5)


def test_under_hooks_on_what_is_saved():
    alone, together = both()
    with torch.autograd.graph.save_on_cpu():
        ids = token_ids(*FEW)
        found = [step(model, ids) for model in (alone, together)]
    assert_same(*found)


@from_dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at every input's
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "one block"])
def test_compiled(whole):
    torch._dynamo.reset()
    alone, model = both(lambda: tiny_llama(layers=1))
    if whole:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        model.model.layers[0].mlp.compile(backend="aot_eager", fullgraph=True)
        compiled = model
    ids = token_ids(*MANY)
    for _ in range(2):
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for got, wish in zip(gradients(model), step(alone, ids)[1:], strict=True):
            torch.testing.assert_close(got, wish, rtol=1e-3, atol=1e-4)
        model.zero_grad()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_exported_and_traced():
    alone, model = both(Pair)
    model.eval(), alone.eval()
    x = torch.randn(40, 12)
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        assert not [n for n in exported.graph.nodes if "fold_many" in str(n.target)]
        torch.testing.assert_close(exported.module()(x), alone(x))
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    assert "fold_many" not in str(traced.inlined_graph)
    with torch.no_grad():
        model.gate.o.add_(1), alone.gate.o.add_(1)
    torch.testing.assert_close(traced(x), alone(x))
    torch.testing.assert_close(model(x), alone(x))


def test_torch_func():
    alone, model = both(Pair)
    x = torch.randn(40, 12)
    deltas = {name: p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}

    def loss(m: nn.Module, deltas: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(m, deltas, (x,)).square().sum()

    got, wish = (torch.func.grad(loss, argnums=1)(m, deltas) for m in (model, alone))
    torch.testing.assert_close(got, wish)
    torch.testing.assert_close(loss(model, deltas), loss(alone, deltas))  # without a transform
    got = torch.func.vmap(model)(x.view(4, 10, 12))
    torch.testing.assert_close(got, alone(x.view(4, 10, 12)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode):
    alone, model = both(Pair)
    with mode():
        x = torch.randn(40, 12)
        got, wish = model(x), alone(x)
    torch.testing.assert_close(got.clone(), wish.clone())


def test_a_gradient_after_a_part_in_inference_mode():
    """D of inference mode cannot be kept for a backward."""

    def first(pair: Pair, x: Tensor) -> None:
        with torch.inference_mode():
            pair.down(torch.zeros(3, 20))

    alone, model = both(lambda: Pair(between=first))
    for m in (alone, model):
        m.up.forward = lambda x, m=m: torch.zeros(x.shape[0], 20)
        m(torch.ones(3, 12)).sum().backward()
    for m in (alone, model):
        del m.up.forward
        m.zero_grad()
        m(torch.ones(3, 12)).sum().backward()
    assert_same(gradients(model), gradients(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    alone, model = both(lambda: Pair().to(dtype))
    x = torch.randn(40, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = called(lambda: model(x))
        got, wish = model(x), alone(x)
    assert found["fold_many"] == (dtype == torch.bfloat16)  # float32 factors would be cast one by one
    torch.testing.assert_close(got, wish, rtol=2e-2, atol=2e-2)


# -- calls within calls, and side by side ----------------------------------------------------------------------------


def test_a_model_that_calls_itself():
    def again(pair: Pair, x: Tensor) -> None:
        if x.shape[0] == 3:
            pair(torch.ones(4, 12))

    alone, model = both(lambda: Pair(between=again))
    x = torch.randn(3, 12)
    for _ in range(2):
        assert_same([model(x)], [alone(x)])


def test_a_model_within_a_model():
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.before, self.inner, self.after = nn.Linear(12, 12), inner, nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.inner(self.before(x)) + self.before(x))

    inner = both(Pair)
    x, outer = torch.randn(40, 12), [Outer(m) for m in inner]
    torch.manual_seed(3)
    outer[1].before.load_state_dict(outer[0].before.state_dict())
    outer[1].after.load_state_dict(outer[0].after.state_dict())
    for _ in range(2):
        torch.testing.assert_close(outer[1](x), outer[0](x))


@pytest.mark.parametrize("rows", [3, 40])
def test_threads_have_calls_of_their_own(rows):
    """Each changes nothing of the other's: they meet in the middle of the forward."""
    barrier = threading.Barrier(2, timeout=60)
    alone, model = both(lambda: Pair(between=lambda pair, x: barrier.wait() if threading.active_count() > 1 else None))
    alone.between = lambda pair, x: None
    inputs, found = [torch.randn(rows, 12) for _ in range(2)], [None, None]

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = model(inputs[number]).detach()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(got, alone(x).detach())


def test_replicas_share_hooks_and_nothing_else():
    """As torch.nn.DataParallel makes them: shallow copies, whose parameters are no leaves."""
    alone, model = both(Pair)
    x = torch.randn(40, 12)
    model(x)
    replica = model._replicate_for_data_parallel()
    for name in ("up", "gate", "down"):
        layer = getattr(model, name)._replicate_for_data_parallel()
        layer._parameters = {key: p for key, p in layer._parameters.items() if key not in "os"}
        layer.o, layer.s = getattr(model, name).o * 1.0, getattr(model, name).s * 2.0
        replica._modules[name] = layer
    for m in (alone,):
        for name in ("up", "gate", "down"):
            getattr(m, name).s.data.mul_(2.0)
    torch.testing.assert_close(replica(x), alone(x))
    for name in ("up", "gate", "down"):
        getattr(alone, name).s.data.mul_(0.5)
    torch.testing.assert_close(model(x), alone(x))


# -- the life of a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_work_together_too_and_by_themselves(again):
    alone, model = both()
    ids = token_ids(*FEW)
    logits(model, ids)
    other = again(model)
    for parameter in osora.adapter_parameters(model):
        parameter.data.zero_()
    assert called(lambda: logits(other, ids))["fold_many"] == 1
    assert_same([logits(other, ids)], [logits(alone, ids)])
    assert set(other.state_dict()) == set(alone.state_dict())


def test_casts():
    alone, model = both()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        ids = token_ids(*FEW)
        assert_same(*[[logits(m.to(dtype), ids)] for m in (model, alone)])
    ids = token_ids(*MANY)
    torch.testing.assert_close(*(logits(m, ids) for m in (model, alone)))


def test_layers_of_several_dtypes_fold_by_dtype():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12).double(), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x.double()).float())

    alone, model = both(Mixed)
    x = torch.randn(40, 12)
    for _ in range(2):
        torch.testing.assert_close(model(x), alone(x))
    assert called(lambda: model(x))["fold_many"] == 2


def test_adapters():
    """A wider one beside it, its choice, a batch of both, and away with the first."""
    alone, model = both(lambda: Pair(between=lambda pair, x: None), r=6)
    x = torch.randn(40, 12)
    for m in (alone, model):
        torch.manual_seed(5)
        osora.add_adapter(m, "small", osora.OsoraConfig(r=3))
        for layer in adapted_layers(m, "small").values():
            for parameter in layer.deltas("small"):
                parameter.data.normal_(std=0.1)
    for name in ("small", "default", "small"):
        for m in (alone, model):
            osora.set_adapter(m, name)
        torch.testing.assert_close(model(x), alone(x))
        assert called(lambda: model(x))["fold_many"] == 1
    names = ["small", "default", None] * 13 + [None]
    with osora.adapters_in_batch(model, names), osora.adapters_in_batch(alone, names), torch.no_grad():
        assert not called(lambda: model(x))["fold_many"]
        torch.testing.assert_close(model(x), alone(x))
    for m in (alone, model):
        osora.remove_adapter(m, "default")
    torch.testing.assert_close(model(x), alone(x))


def test_merged_and_disabled():
    alone, model = both(Pair)
    x = torch.randn(40, 12)
    model(x)
    for change, back in ((osora.merge, osora.unmerge),):
        for m in (alone, model):
            change(m)
        assert_same([model(x)], [alone(x)])
        for m in (alone, model):
            back(m)
    torch.testing.assert_close(model(x), alone(x))
    with osora.disabled(model), osora.disabled(alone):
        assert_same([model(x)], [alone(x)])


def test_layers_that_cannot_take_part_do_not():
    """Dropout in training, hooks on a base layer; beside them the others go on."""
    alone, model = both(Pair, dropout=0.5)
    assert not called(lambda: model.train()(torch.randn(40, 12)))["fold_many"]
    x = torch.randn(40, 12)
    torch.testing.assert_close(model.eval()(x), alone.eval()(x))
    seen = []
    model.gate.base_layer.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    torch.testing.assert_close(model(x), alone(x))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "config", [osora.SorsaConfig(r=4), osora.OsoraConfig(r=4, side="input"), osora.OsoraConfig(r=4, initial_o=0)]
)
def test_other_methods_compute_alone(config):
    model = move_adapter(osora.attach(Pair(), config))
    x = torch.randn(40, 12)
    wish = model(x)
    osora.set_execution(model, "split", together=True)
    assert_same([model(x)], [wish])
    assert not called(lambda: model(x))["fold_many"]


def test_choosing_it():
    model = adapt(Pair())
    assert hooks_of(model) == 0
    for _ in range(2):
        assert osora.set_execution(model, "split", together=True) is model
        assert hooks_of(model) == 3 and all(layer.together for layer in adapted_layers(model).values())
    assert "together" in repr(model.gate) and model.gate.execution == "split"
    osora.set_execution(model, "materialised", ["gate"])
    assert [layer.together for layer in adapted_layers(model).values()] == [True, False, True]
    x = torch.randn(40, 12)
    torch.testing.assert_close(model(x), osora.set_execution(copy.deepcopy(model), "split")(x))
    with pytest.raises(ValueError, match=r"up: together=True is the split plan's"):
        osora.set_execution(model, "materialised", together=True)
    assert [layer.together for layer in adapted_layers(model).values()] == [True, False, True]
    osora.set_execution(model, "split")
    assert hooks_of(model) == 0 and "together" not in repr(model.gate)


def test_detach_and_share_base_leave_no_hooks():
    _, model = both()
    other = osora.share_base(model)
    assert hooks_of(other) == 0 and hooks_of(model) == 3
    logits(other, token_ids(*FEW))
    osora.detach(model)
    assert hooks_of(model) == 0


def test_nothing_is_left_of_a_call():
    """Without a gradient D and the joint h are freed at the end of the forward; seen inside, they are there."""
    context = torch.multiprocessing.get_context("spawn")  # to look at every object is rude where other threads run
    queue = context.SimpleQueue()
    process = context.Process(target=_live_inside_and_after, args=(queue,))
    process.start()
    inside, after = queue.get()
    process.join(60)
    assert inside >= 3  # two D, and the h that waits
    assert after == 0


def _live_inside_and_after(queue) -> None:
    layers_together.JOINED_ON = ("cpu", "cuda")
    inside: list[weakref.ref[Tensor]] = []
    _, model = both(lambda: Pair(between=lambda pair, x: inside.extend(map(weakref.ref, new()))))

    def large() -> list[Tensor]:
        return [each for each in gc.get_objects() if type(each) is Tensor and each.shape in ((20, 4), (40, 4))]

    before = large()

    def new() -> list[Tensor]:
        return [each for each in large() if not any(each is known for known in before)]

    with torch.no_grad():
        model(torch.randn(40, 12))
    gc.collect()  # of frames that were looked at
    queue.put((len(inside), len([each for each in inside if each() is not None])))
