# SPDX-License-Identifier: Apache-2.0
"""OsoraLinear alone: the start, dropout, hooks, casts, copies, merge."""

import copy
import pickle

import pytest
import torch
from helpers import linear_case, move_adapter, tiny_gpt2, token_ids
from layer_makers import make_layer, moved
from precision import every_dtype
from torch import Tensor, nn

from osora.layers import OsoraLinear
from osora.svd.certificate import Decomposition


@every_dtype
def test_it_starts_as_its_base(dtype):
    layer = make_layer(dtype=dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (torch.randn(3, 12), torch.randn(2, 3, 12), torch.randn(0, 12), torch.randn(12)):
        assert torch.equal(layer(x.to(dtype)), layer.base_layer(x.to(dtype)))
    assert {n: (p.dtype, tuple(p.shape)) for n, p in layer.named_parameters(recurse=False)} == {
        "o": (exact, (10,)),
        "s": (exact, (4,)),
    }
    assert {n: b.dtype for n, b in layer.named_buffers()} == {"U": dtype, "V": dtype, "S0": exact}


@every_dtype
def test_it_is_the_base_plus_its_update(dtype):
    layer, x = moved(make_layer(dtype=dtype)), torch.randn(50, 12, dtype=torch.float64).to(dtype)
    weight = layer.base_layer.weight.double() + layer.delta_weight().double()
    wish = x.double() @ weight.t() + layer.bias.double()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 5e-2)
    torch.testing.assert_close(layer(x).double(), wish, rtol=tolerance, atol=tolerance)
    assert torch.linalg.matrix_rank(layer.delta_weight().double(), tol=1e-4) <= 4


def test_what_models_look_at():
    layer = make_layer()
    base = layer.base_layer
    assert layer.bias is base.bias and layer.weight.dtype == base.weight.dtype and layer.weight.shape == (10, 12)
    assert torch.equal(layer.weight + 0, base.weight), "untrained"
    layer.enabled = False
    assert layer.weight is base.weight
    assert (layer.in_features, layer.out_features, layer.rank) == (12, 10, 4)
    assert "in_features=12, out_features=10, rank=4" in repr(layer)
    assert list(layer.state_dict()) == ["o", "s", "U", "V", "S0", "base_layer.weight", "base_layer.bias"]


# -- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_branch_while_training():
    layer, x = moved(make_layer(dropout=0.5)), torch.randn(4, 12)
    plain = layer.eval()(x)
    assert torch.equal(layer(x), plain)
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_is_unbiased():
    layer, x = moved(make_layer(dropout=0.3).train(), 0.5), torch.randn(1, 12)
    samples = torch.stack([layer(x) for _ in range(4000)])
    error = (samples.mean(0) - layer.eval()(x)) / (samples.std(0) / 4000**0.5)
    assert error.abs().max() < 5, "standard errors of the mean"


def test_dropout_starts_as_the_base():
    layer, x = make_layer(dropout=0.5).train(), torch.randn(4, 12)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_adds_to_the_base_s_output_in_place():
    """Two tensors of y's size would be one more than the frozen layer needs."""
    layer, x = moved(make_layer(64, 500, 4, dropout=0.5)).train(), torch.randn(80, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x)
    assert sum(e.self_cpu_memory_usage >= 80 * 500 * 4 for e in profile.events()) == 1


@pytest.mark.parametrize("everywhere", [False, True], ids=["of the base", "of every module"])
def test_a_hook_may_keep_what_the_base_gave(everywhere):
    layer, x, kept = moved(make_layer(dropout=0.5)).train(), torch.randn(4, 12), []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        if module is layer.base_layer:
            kept.append(output)

    register = nn.modules.module.register_module_forward_hook if everywhere else layer.base_layer.register_forward_hook
    handle = register(keep)
    y = layer(x)
    handle.remove()
    assert torch.equal(kept[0], layer.base_layer(x)) and not torch.equal(y, kept[0])


def test_dropout_in_a_model_of_conv1d():
    """Its base gives a view of the product."""
    import osora

    model = move_adapter(osora.attach(tiny_gpt2(), osora.OsoraConfig(r=4, dropout=0.3))).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    ids, results = token_ids(), []
    for in_place in (True, False):
        torch.manual_seed(5)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)  # these see y: it is left alone
        if in_place:
            handle.remove()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        handle.remove()
        results.append([loss.detach(), *(p.grad for p in osora.adapter_parameters(model))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dropout_compiles():
    torch._dynamo.reset()
    layer, x = moved(make_layer(dropout=0.5)).train(), torch.randn(4, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(2)
    y = compiled(x)
    y.sum().backward()
    got = [y.detach(), layer.o.grad, layer.s.grad]
    layer.zero_grad()
    torch.manual_seed(2)
    y = layer(x)
    y.sum().backward()
    for a, b in zip(got, [y.detach(), layer.o.grad, layer.s.grad], strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# -- the base layer stays a layer ------------------------------------------------------------------------------------


def test_hooks_of_the_base_fire():
    layer, x, seen = moved(make_layer()), torch.randn(3, 12, requires_grad=True), []
    plain = layer(x)
    base = layer.base_layer
    for register, name in [
        (base.register_forward_pre_hook, "pre"),
        (base.register_forward_hook, "forward"),
        (base.register_full_backward_hook, "backward"),
        (base.register_full_backward_pre_hook, "backward pre"),
    ]:
        seen.clear()
        handle = register(lambda *_, name=name: seen.append(name))
        y = layer(x)
        y.sum().backward()
        assert seen == [name]
        torch.testing.assert_close(y, plain)
        handle.remove()


def test_a_hook_that_changes_the_output_is_heard():
    layer, x = moved(make_layer()), torch.randn(3, 12)
    plain = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(layer(x), plain + 1)


def test_hooks_do_not_wake_dropout():
    layer, x = moved(make_layer(dropout=0.5)).eval(), torch.randn(3, 12)
    plain = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), plain)


def test_a_replaced_forward_is_called():
    """accelerate replaces the forward of a module to bring its weights in first."""
    layer, x = moved(make_layer()), torch.randn(3, 12)
    plain, old = layer(x), layer.base_layer.forward
    layer.base_layer.forward = lambda x: old(x) + 1
    torch.testing.assert_close(layer(x), plain + 1)


# -- casts, moves, copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_and_back_keeps_every_digit(there):
    layer = moved(make_layer())
    layer.o.grad, layer.s.grad = torch.randn(10), torch.randn(4)
    parameters = [layer.o, layer.s]
    before = [t.clone() for t in (layer.o, layer.s, layer.S0, layer.o.grad, layer.s.grad)]
    layer.to(there)
    exact = torch.float64 if there == torch.float64 else torch.float32
    assert layer.U.dtype == layer.V.dtype == layer.base_layer.weight.dtype == there
    assert layer.S0.dtype == layer.o.dtype == layer.s.dtype == exact
    assert torch.isfinite(layer(torch.randn(2, 12, dtype=there))).all()
    layer.to(torch.float32)
    assert layer.o is parameters[0] and layer.s is parameters[1], "an optimiser holds them"
    after = (layer.o, layer.s, layer.S0)
    assert all(torch.equal(a, b) for a, b in zip(after, before[:3], strict=True))
    assert layer.o.grad.dtype == layer.s.grad.dtype == torch.float32
    if there == torch.float64:
        assert torch.equal(layer.o.grad, before[3]) and torch.equal(layer.s.grad, before[4])


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.type(torch.bfloat16)]
)
def test_every_way_to_cast(cast):
    layer = moved(make_layer())
    before = [t.double() for t in (layer.o, layer.s, layer.S0)]
    cast(layer)
    assert all(torch.equal(a, b.double()) for a, b in zip(before, (layer.o, layer.s, layer.S0), strict=True))
    layer(torch.randn(2, 12, dtype=layer.U.dtype)).sum().backward()


def test_a_cast_keeps_the_merged_base():
    layer = moved(make_layer(dtype=torch.bfloat16))
    base = layer.base_layer.weight.clone()
    layer.merge()
    layer.to(torch.float32)
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.float32 and torch.equal(layer.base_layer.weight, base.float())


def test_the_meta_device_and_back():
    layer = make_layer().to("meta")
    assert layer(torch.randn(3, 12, device="meta")).shape == (3, 10)
    assert not layer.to_empty(device="cpu").o.is_meta


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_copies(copy_of, merged):
    layer, x = moved(make_layer(dropout=0.1)).eval(), torch.randn(3, 12)
    if merged:
        layer.merge()
    other = copy_of(layer)
    assert torch.equal(other(x), layer(x)) and other.merged == merged
    with torch.no_grad():
        other.o.zero_()
        other.base_layer.weight.zero_()
    assert not torch.equal(other(x), layer(x))
    if merged:
        other.unmerge()
        layer.unmerge()
        assert torch.equal(other.base_layer.weight, layer.base_layer.weight)


def test_state_dict_round_trip():
    layer, other, x = moved(make_layer()), make_layer(), torch.randn(3, 12)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


# -- merge -----------------------------------------------------------------------------------------------------------


@every_dtype
def test_merge_rounds_once(dtype):
    layer = moved(make_layer(dtype=dtype))
    base = layer.base_layer.weight
    bits, address = base.clone(), base.data_ptr()
    wish = (bits.to(layer.S0.dtype) + layer.delta_weight()).to(dtype)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, wish) and "merged" in repr(layer)
    assert not layer.base_layer.weight.requires_grad
    layer.unmerge()
    assert layer.base_layer.weight is base and base.data_ptr() == address and torch.equal(base, bits)


def test_merge_twice_and_unmerge_unmerged_are_refused():
    layer = make_layer()
    with pytest.raises(ValueError, match="is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()


def test_a_merge_that_overflows_changes_nothing():
    layer = moved(make_layer(dtype=torch.float16))
    with torch.no_grad():
        layer.s.fill_(1e6)
    base = layer.base_layer.weight
    with pytest.raises(ValueError, match=r"NaN or infinite weights in torch\.float16"):
        layer.merge()
    assert layer.base_layer.weight is base and not layer.merged


def test_factors_of_a_wide_and_a_tall_layer():
    for k, d in [(3, 9), (9, 3), (1, 5), (5, 1)]:
        layer = moved(make_layer(k, d, min(k, d)))
        x = torch.randn(4, k)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.delta_weight().t())


def test_it_takes_factors_as_they_are():
    """Not contiguous, of another dtype: as a basis file may hold them."""
    case = linear_case((3,), 12, 10, 4)
    base = nn.Linear(12, 10).requires_grad_(False)

    def strided(t: Tensor) -> Tensor:
        return t.double().t().contiguous().t()

    factors = Decomposition(
        "layer", strided(case.U), case.S0.double(), strided(case.V), torch.zeros(4), True, 0, "full"
    )
    layer = OsoraLinear(base, factors)
    assert layer.U.is_contiguous() and layer.V.is_contiguous() and layer.U.dtype == torch.float32
    assert torch.equal(layer.U, case.U) and torch.equal(layer.S0, case.S0)
