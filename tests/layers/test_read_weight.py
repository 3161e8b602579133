# SPDX-License-Identifier: Apache-2.0
"""A model that reads the weight of an adapted layer gets W0 + ΔW with its gradients, and its shape for nothing."""

import copy
import logging
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

import osora
import osora.peft
from osora.layers.read_weight import ReadWeight

CONFIGS = {
    "osora": (osora.OsoraConfig, osora.peft.OsoraConfig),
    "sorsa": (osora.SorsaConfig, osora.peft.SorsaConfig),
}


class Reader(nn.Module):
    """As WavLM and state-space models do: it takes the weight, and never calls the layer."""

    def __init__(self, dtype: torch.dtype = torch.float32, conv1d: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = transformers.pytorch_utils.Conv1D(9, 12) if conv1d else nn.Linear(12, 9)
        self.inner.to(dtype)
        self.conv1d = conv1d

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight
        return x @ weight + self.inner.bias if self.conv1d else x @ weight.t() + self.inner.bias


class Caller(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def adapted(model: nn.Module, api: str, method: str, **options) -> nn.Module:
    native, peft = CONFIGS[method]
    if api == "native":
        return osora.attach(model, native(r=4, target_modules=["inner"], **options))
    return get_peft_model(model, peft(r=4, target_modules=["inner"], **options))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake(*models: nn.Module) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(3)
        for p in trained(model).values():
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("api", ["native", "peft"])
def test_reading_gives_what_calling_gives_and_its_gradients(api, method, conv1d):
    reader, caller = (adapted(kind(conv1d=conv1d), api, method) for kind in (Reader, Caller))
    x = torch.randn(5, 12, requires_grad=True)
    assert torch.equal(reader(x), Reader(conv1d=conv1d)(x)), "untrained: the base's values, bit for bit"
    shake(reader, caller)
    grads = []
    for model in (reader, caller):
        y = model(x)
        y.square().sum().backward()
        grads.append([y, x.grad, *(p.grad for p in trained(model).values())])
        x.grad = None
    assert len(grads[0]) > 3
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("api", ["native", "peft"])
def test_merging_keeps_what_was_read(api):
    reader = adapted(Reader(), api, "osora").eval()
    shake(reader)
    x, base = torch.randn(5, 12), Reader()
    with torch.no_grad():
        read = reader(x)
        assert not torch.allclose(read, base(x), atol=1e-3)
        merge, unmerge = (osora.merge, osora.unmerge) if api == "native" else (None, None)
        merge(reader) if merge else reader.merge_adapter()
        torch.testing.assert_close(reader(x), read, rtol=1e-6, atol=1e-6)
        unmerge(reader) if unmerge else reader.unmerge_adapter()
        assert torch.equal(reader(x), read)
        with osora.disabled(reader) if api == "native" else reader.disable_adapter():
            assert torch.equal(reader(x), base(x)), "off: the base's own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_sum_is_rounded_once_to_the_dtype_of_the_weight(dtype):
    reader = adapted(Reader(dtype), "native", "osora")
    shake(reader)
    layer = reader.inner
    exact = layer.base_layer.weight.to(layer.S0.dtype) + layer.delta_weight()
    with torch.no_grad():
        assert torch.equal(layer.weight + 0, exact.to(dtype))
    reader(torch.randn(5, 12).to(dtype)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(reader).values())


def test_metadata_costs_nothing_and_is_the_weights():
    reader = adapted(Reader(), "native", "osora")
    weight, base = reader.inner.weight, reader.inner.base_layer.weight
    assert isinstance(weight, ReadWeight) and not isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (base.dtype, base.device, base.shape, 2)
    assert (weight.size(0), weight.stride(), weight.numel(), len(weight)) == (9, base.stride(), 108, 9)
    assert weight.is_floating_point() and weight.is_contiguous() and not weight.is_cuda and weight.requires_grad
    assert weight.grad_fn is not None and not weight.is_leaf
    assert weight.made == {}, "no product yet"
    (weight * 2).sum()
    assert list(weight.made) == [True]


class Product(torch.autograd.Function):
    """A function of autograd that takes the weight as an argument, as fused kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@pytest.mark.parametrize("method", CONFIGS)
def test_a_function_of_autograd_hands_its_gradient_on(method):
    reader, other = (adapted(Reader(), "native", method) for _ in range(2))
    shake(reader, other)
    x = torch.randn(5, 12)
    Product.apply(x, reader.inner.weight).square().sum().backward()
    (x @ other.inner.weight.t()).square().sum().backward()
    for mine, theirs in zip(trained(reader).values(), trained(other).values(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_who_writes_into_it_is_told():
    reader = adapted(Reader(), "native", "osora")
    for write in (lambda w: w.div_(2), lambda w: w.__setitem__(0, 1.0), lambda w: w.copy_(w), lambda w: w.__imul__(2)):
        with pytest.raises(RuntimeError, match=r"inner\.weight is that of an adapted layer.*exclude_modules"):
            write(reader.inner.weight)


def test_many_functions_take_it():
    reader = adapted(Reader(), "native", "osora")
    shake(reader)
    weight, x = reader.inner.weight, torch.randn(5, 12)
    dense = (weight + 0).detach()
    with torch.no_grad():
        for call in (
            lambda w: nn.functional.linear(x, w),
            lambda w: torch.einsum("ni,oi->no", x, w),
            lambda w: torch.cat([w, w.detach()]),
            lambda w: torch.stack(list(w)),
            lambda w: w[2:5].t().contiguous(),
            lambda w: w.to(torch.bfloat16).float(),
            lambda w: torch.addmm(torch.zeros(9), x, w.mT),
            lambda w: x @ w.data.t(),
            lambda w: copy.deepcopy(w),
            lambda w: pickle.loads(pickle.dumps(w)),
        ):
            assert torch.equal(torch.as_tensor(call(weight)), torch.as_tensor(call(dense)))
        assert weight.data_ptr() != reader.inner.base_layer.weight.data_ptr()
        assert weight.tolist() == dense.tolist() and str(weight) == str(dense)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own, within jvp
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("api", ["native", "peft"])
def test_transforms_of_torch_func(api, method, conv1d):
    """Gradients of each row's loss by grad and vmap are those of a loop of backwards."""
    reader = adapted(Reader(conv1d=conv1d), api, method)
    shake(reader)
    x, parts = torch.randn(3, 12), {name: p.detach() for name, p in trained(reader).items()}

    def loss(parts: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(reader, parts, (row[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parts, x)
    jacobian = torch.func.jacrev(loss)(parts, x[0])
    tangents = {name: torch.ones_like(p) for name, p in parts.items()}
    _, forward = torch.func.jvp(lambda parts: loss(parts, x[0]), (parts,), (tangents,))
    total = 0.0
    for i, row in enumerate(x):
        reader.zero_grad()
        loss(trained(reader), row).backward()
        for name, p in trained(reader).items():
            assert p.grad is not None and p.grad.abs().max() > 0
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-4, atol=1e-5)
            if i == 0:
                torch.testing.assert_close(jacobian[name], p.grad, rtol=1e-4, atol=1e-5)
                total += float(p.grad.sum())
    assert abs(float(forward) - total) <= 1e-4 * (1 + abs(total))


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_it_compiles_and_traces():
    reader = adapted(Reader(), "native", "osora")
    shake(reader)
    x = torch.randn(5, 12)
    compiled = torch.compile(reader, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reader(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in trained(reader).values())
    with torch.no_grad():
        traced = torch.jit.trace(reader, (x,), check_trace=False)
        torch.testing.assert_close(traced(x), reader(x))


def test_an_encoder_layer_of_torch_takes_no_shortcut_past_its_adapters():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    osora.attach(layer, osora.OsoraConfig(r=4, target_modules=["linear1", "linear2"]))
    shake(layer)
    x = torch.randn(2, 5, 16)
    layer.train()
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layer.self_attn.dropout = 0.0
    slow = layer(x).detach()
    layer.eval()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), slow)
        osora.merge(layer)
        torch.testing.assert_close(layer(x), slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("api", ["native", "peft"])
def test_readers_are_told_once_and_listed(api, caplog):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.called = Reader(), Reader(), Caller()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) + self.called(x)

    model = adapted(Two(), api, "osora")
    with caplog.at_level(logging.WARNING, logger="osora"):
        for _ in range(2):
            model(torch.randn(5, 12))
    assert [record.message for record in caplog.records if "reads" in record.message] == [
        "the model reads first.inner.weight itself instead of calling the layer. It gets W0 + ΔW, which is right, and "
        "costs a product of the weight's size at each read; osora.summary(model) names all such layers"
    ]
    if api == "native":
        notes = {module.name: module.note for module in osora.summary(model).modules}
        assert [name for name, note in notes.items() if "reads its weight itself" in note] == [
            "first.inner",
            "second.inner",
        ]


def test_copies_read_their_own():
    reader = adapted(Reader(), "native", "osora")
    other = copy.deepcopy(reader)
    shake(reader)
    x = torch.randn(5, 12)
    assert torch.equal(other(x), Reader()(x)) and not torch.allclose(reader(x), other(x), atol=1e-3)
    assert torch.equal(pickle.loads(pickle.dumps(reader.inner)).weight + 0, reader.inner.weight + 0)
