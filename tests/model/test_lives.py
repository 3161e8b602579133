# SPDX-License-Identifier: Apache-2.0
"""What may happen to a model after its adapter came: exchanged layers, interruptions, wrappers, other devices."""

import copy
import os
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_llama, token_ids
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import osora
import osora.peft
from osora import adapted_layers
from osora.layers import AdaptedLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def adapted(api: str = "native") -> nn.Module:
    if api == "native":
        model = osora.attach(Net(), osora.OsoraConfig(r=4))
    else:
        model = get_peft_model(Net(), osora.peft.OsoraConfig(r=4, target_modules=["a", "b", "c"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    return model.eval()


def bases(model: nn.Module) -> list[nn.Module]:
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


def merge(model: nn.Module, api: str) -> None:
    osora.merge(model) if api == "native" else model.merge_adapter()


def unmerge(model: nn.Module, api: str) -> None:
    osora.unmerge(model) if api == "native" else model.unmerge_adapter()


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 0.5


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight norm": parametrizations.weight_norm,
    "older weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("api", ["native", "peft"])
def test_a_base_weight_that_is_computed_is_read_anew_and_never_merged(api, change):
    model = adapted(api)
    before = model(X)
    CHANGES[change](bases(model)[1])  # b
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]

    def expected() -> Tensor:
        x = X
        for number, layer in enumerate(layers):
            delta = layer.delta_weight() if api == "native" else layer.get_delta_weight("default")
            x = layer.base_layer(x) + x @ delta.t()
            x = torch.relu(x) if number < 2 else x
        return x

    torch.testing.assert_close(model(X), expected(), rtol=1e-5, atol=1e-6)
    assert change == "weight norm" or change == "older weight norm" or not torch.allclose(model(X), before, atol=1e-4)
    y = model(X).detach()
    with pytest.raises(ValueError, match="base weight is computed anew in each forward"):
        merge(model, api)
    assert not any(layer.base_kept for layer in layers), "nor any other of its layers"
    assert torch.equal(model(X), y)
    model.train()(X).square().sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("api", ["native", "peft"])
def test_a_base_layer_that_was_exchanged_is_told(api):
    model = adapted(api)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    words = "the base layer is a torch.ao.*, whose weight is no tensor: it was exchanged after the adapter had come"
    for call in (lambda: model(X), lambda: merge(model, api)):
        with pytest.raises(ValueError, match=words):
            call()
    assert not any(module.base_kept for module in model.modules() if hasattr(module, "base_kept"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("api", ["native", "peft"])
def test_whatever_interrupts_a_merge_no_layer_is_merged(api, error, monkeypatch):
    model = adapted(api)
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    weights, y = [layer.base_layer.weight for layer in layers], model(X).detach()
    made = type(layers[2]).delta_weight

    def interrupted(layer, *args):
        if layer is layers[2]:
            raise error("in the last layer")
        return made(layer, *args)

    monkeypatch.setattr(type(layers[2]), "delta_weight", interrupted)
    with pytest.raises(error):
        merge(model, api)
    assert [layer.base_layer.weight is weight for layer, weight in zip(layers, weights, strict=True)] == [True] * 3
    assert torch.equal(model(X), y)
    monkeypatch.undo()
    merge(model, api)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)
    unmerge(model, api)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("api", ["native", "peft"])
def test_an_interruption_between_two_statements_loses_no_base_weight(api, monkeypatch):
    """The merged weight is about to take the base weight's place."""
    model = adapted(api)
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    weights, count = [layer.base_layer.weight for layer in layers], 0
    original = nn.Module.__setattr__

    def interrupted(self, name, value):
        nonlocal count
        if name == "weight" and self is layers[1].base_layer:
            count += 1
            if count == 1:
                raise KeyboardInterrupt
        original(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model, api)
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
    assert not any(layer.base_kept for layer in layers)


def test_what_an_interrupted_unmerge_has_left_is_undone_by_the_next():
    model = adapted()
    y = model(X).detach()
    osora.merge(model)
    model.b.unmerge()
    osora.unmerge(model)
    assert torch.equal(model(X), y)
    with pytest.raises(ValueError, match="not merged"):
        osora.unmerge(model)


# -- inference mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["native", "peft"])
def test_an_adapter_that_came_in_inference_mode_can_be_trained(api, tmp_path):
    model = Net()
    with torch.inference_mode():
        if api == "native":
            osora.attach(model, osora.OsoraConfig(r=4))
            osora.add_adapter(model, "second", osora.OsoraConfig(r=2))
        else:
            model = get_peft_model(model, osora.peft.OsoraConfig(r=4, target_modules=["a", "b", "c"]))
    model(X).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    if api == "native":
        osora.save_adapter(model, tmp_path)
        loaded = Net()
        with torch.inference_mode():
            osora.load_adapter(loaded, tmp_path)
        loaded(X).square().sum().backward()


def test_weights_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = Net()
    with pytest.raises(ValueError, match=r"a\.weight was made within torch\.inference_mode\(\)"):
        osora.attach(model, osora.OsoraConfig(r=4))
    assert not adapted_layers(model)


@pytest.mark.parametrize("api", ["native", "peft"])
def test_what_came_and_was_made_in_inference_mode_is_served_and_not_trained(api):
    with torch.inference_mode():
        model = Net()
        if api == "native":
            osora.attach(model, osora.OsoraConfig(r=4))
        else:
            model = get_peft_model(model, osora.peft.OsoraConfig(r=4, target_modules=["a", "b", "c"]))
        served = model(X)
    with pytest.raises(
        RuntimeError, match=r"made within torch\.inference_mode\(\), and nothing can be trained on it: load"
    ):
        model(X)
    with torch.no_grad():
        assert torch.equal(model(X), served)


@pytest.mark.parametrize("plan", ["split", "materialised"])
def test_evaluation_in_inference_mode_between_steps(plan):
    model = adapted()
    osora.set_execution(model, plan)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        with torch.inference_mode():
            seen = model.eval()(X)
        torch.testing.assert_close(seen, model(X).detach(), rtol=1e-5, atol=1e-6)
        model.train()(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "compiled DDP":
        return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    return {"DDP": nn.parallel.DistributedDataParallel, "DP": nn.DataParallel, "averaged": AveragedModel}[kind](model)


KINDS = ["DDP", "DP", "averaged", "compiled", "compiled DDP"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch 2.11's compiler
@pytest.mark.parametrize("kind", KINDS)
def test_every_function_finds_the_model_inside_a_wrapper(kind, process_group, tmp_path):
    model = adapted()
    outer = wrapped(kind, model)
    assert list(adapted_layers(outer)) == ["a", "b", "c"]
    assert [module.name for module in osora.summary(outer).modules] == ["a", "b", "c"]
    assert osora.active_adapter(outer) == "default" and osora.adapter_names(outer) == ["default"]
    assert len(list(osora.adapter_parameters(outer))) == 6
    y = outer(X).detach()
    with osora.disabled(outer):
        assert torch.equal(outer(X), Net()(X))
    osora.merge(outer)
    osora.unmerge(outer)
    assert torch.equal(outer(X), y)
    osora.set_execution(outer, "materialised")
    osora.refresh(outer)
    osora.set_execution(outer, "split")
    osora.save_adapter(outer, tmp_path / "adapter")
    torch.testing.assert_close(osora.load_adapter(Net(), tmp_path / "adapter")(X), y)
    osora.export_lora(outer, tmp_path / "lora")
    osora.count_parameters(outer)
    if kind in ("DP", "compiled"):
        osora.add_adapter(outer, "second", osora.OsoraConfig(r=2))
        osora.remove_adapter(outer, "second")
    osora.detach(outer)
    assert not adapted_layers(outer)


@pytest.mark.parametrize("kind", ["DDP", "averaged", "compiled DDP"])
def test_it_is_too_late_for_an_adapter_in_what_has_taken_stock_of_parameters(kind, process_group, tmp_path):
    outer = wrapped(kind, Net())
    with pytest.raises(ValueError, match=r"which knows the parameters it was made with.*Give model\.module its"):
        osora.attach(outer, osora.OsoraConfig(r=4))
    osora.save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match="which knows the parameters"):
        osora.load_adapter(outer, tmp_path)
    assert not any(isinstance(module, AdaptedLinear) for module in outer.modules())


def test_what_no_process_has_whole_is_refused_before_any_work(process_group, tmp_path):
    model = adapted()
    y = model(X).detach()
    osora.save_adapter(model, tmp_path / "adapter")
    fully_shard(model)
    torch.testing.assert_close(model(X), y)
    model.reshard()  # the root keeps what its forward has gathered
    for wish, call in (
        ("merged", lambda: osora.merge(model)),
        ("exported", lambda: osora.export_lora(model, tmp_path / "lora")),
        ("restored", lambda: osora.restore_adapter(model, tmp_path / "adapter")),
    ):
        with pytest.raises(
            ValueError, match=rf"a\.\S+ is sharded over processes, and cannot be {wish} there: load full"
        ):
            call()
    with pytest.raises(ValueError, match="cannot be decomposed there: attach the adapter before the model is sharded"):
        osora.attach(fully_shard(Net()), osora.OsoraConfig(r=4))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "group") == ["adapter"]
    torch.testing.assert_close(model(X), y)


def test_what_is_no_module_is_told():
    for call in (osora.summary, osora.merge, osora.detach, osora.adapted_layers):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            call([1, 2])


# -- another default device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_tensors_are_made_where_they_belong_whatever_the_default_device(method, tmp_path):
    model = tiny_llama()
    ids = token_ids()
    with torch.device("meta"):
        osora.attach(model, getattr(osora, method)(r=4))
        assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.01)
        y = model(ids).logits
        y.float().square().mean().backward()
        if method == "SorsaConfig":
            osora.orthonormality(model)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
        y = model(ids).logits.detach()
        osora.merge(model)
        osora.unmerge(model)
        str(osora.summary(model))
        osora.save_adapter(model, tmp_path / "a")
        osora.export_lora(model, tmp_path / "b")
        other = osora.load_adapter(copy.deepcopy(osora.detach(model)), tmp_path / "a")
        assert torch.equal(other(ids).logits, y)


@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
@pytest.mark.parametrize("api", ["native", "peft"])
def test_a_gradient_for_each_sample(api, method):
    if api == "native":
        model = osora.attach(Net(), getattr(osora, method)(r=4))
    else:
        model = get_peft_model(Net(), getattr(osora.peft, method)(r=4, target_modules=["a", "b", "c"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.normal_(0, 0.1)

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, tensors, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, X)
    model(X).square().sum().backward()
    for name, p in trained.items():
        assert each[name].shape == (3, *p.shape)
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_it_can_be_traced(method, gradients):
    model = osora.attach(Net(), getattr(osora, method)(r=4))
    with torch.no_grad():
        for p in osora.adapter_parameters(model):
            p.normal_(0, 0.1)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (X,), check_trace=False)
        torch.testing.assert_close(traced(X[:2]), model(X[:2]))


@pytest.mark.parametrize("start", ["spawn"])
@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_an_adapted_model_goes_to_another_process(method, start):
    model = osora.attach(Net(), getattr(osora, method)(r=4))
    context = torch.multiprocessing.get_context(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        queue = context.SimpleQueue()
        process = context.Process(target=_run, args=(queue, model))
        process.start()
        found = torch.tensor(queue.get())
        process.join(60)
    torch.testing.assert_close(found, model(X).detach())
    assert process.exitcode == 0


def _run(queue, model: nn.Module) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    queue.put(model(X).tolist())
