# SPDX-License-Identifier: Apache-2.0
"""Execution plans of a model: the same training as split, a weight that is never old, and what is refused."""

import copy
import gc
import io
import pickle

import pytest
import torch
from composed import from_dynamo
from helpers import logits, move_adapter, saved_tensors, tiny_gpt2, tiny_llama, token_ids
from layer_makers import make_layer, moved
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers import OsoraLinear
from osora.layers.base_weight import oriented_weight
from osora.ops import materialised as ops_materialised


def materialised(layer: OsoraLinear) -> OsoraLinear:
    layer.set_execution("materialised")
    return layer


def kept(layer: OsoraLinear) -> list[Tensor]:
    return ops_materialised.kept_weights(oriented_weight(layer.base_layer), layer.o)


def check_now(layer: OsoraLinear) -> None:
    """What the layer computes is what its parameters say now."""
    x = torch.randn(5, layer.in_features, dtype=layer.U.dtype)
    with torch.no_grad():
        wish = layer.base_layer(x) + x @ layer.delta_weight().to(x.dtype).t()
        torch.testing.assert_close(layer(x), wish)


# -- a model ---------------------------------------------------------------------------------------------------------


def adapted(make=tiny_llama, **config) -> nn.Module:
    return move_adapter(osora.attach(make(), osora.OsoraConfig(r=4, **config)))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor], micro: int = 2) -> list[float]:
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        for part in ids.chunk(micro):
            loss = model(input_ids=part, labels=part, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["Llama", "GPT-2"])
def test_it_trains_as_split_does(make, fused):
    """In float32, step for step, with micro-batches; a weight one step old would be off by a whole step."""
    batches = [token_ids(4, 9) for _ in range(4)]
    found = {}
    for plan in ("split", "materialised"):
        torch.manual_seed(0)
        model = osora.set_execution(adapted(make), plan).train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        optimizer = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2, fused=fused)
        losses = trained(model, optimizer, batches)
        found[plan] = losses, logits(model.eval(), batches[0])
    assert found["split"][0][-1] != found["split"][0][0]
    torch.testing.assert_close(found["materialised"][0], found["split"][0], rtol=1e-4, atol=1e-4)
    # Adam divides by the size of a gradient: a rounding of a small one is a part of a step
    torch.testing.assert_close(found["materialised"][1], found["split"][1], rtol=1e-2, atol=1e-2)


def test_the_default_is_split_and_the_choice_is_of_layers():
    model = adapted()
    layers = adapted_layers(model)
    assert {layer.execution for layer in layers.values()} == {"split"}
    assert osora.set_execution(model, "materialised", ["q_proj"]) is model
    assert {name.rsplit(".", 1)[-1] for name, layer in layers.items() if layer.execution == "materialised"} == {
        "q_proj"
    }
    osora.set_execution(model, "materialised", r".*\.1\..*")
    assert layers["model.layers.1.mlp.up_proj"].execution == "materialised"
    assert layers["model.layers.0.mlp.up_proj"].execution == "split"
    assert "execution=materialised" in repr(layers["model.layers.1.mlp.up_proj"])
    osora.set_execution(model, "split")
    assert {layer.execution for layer in layers.values()} == {"split"}


def test_wrong_calls():
    model = adapted()
    with pytest.raises(ValueError, match=r'"split" or "materialised", got .merged.'):
        osora.set_execution(model, "merged")
    with pytest.raises(ValueError, match=r"no adapted layer matches layers=\['nothing'\]"):
        osora.set_execution(model, "split", ["nothing"])
    with pytest.raises(ValueError, match="no osora adapter"):
        osora.set_execution(tiny_llama(), "split")
    with pytest.raises(ValueError, match="no osora adapter"):
        osora.refresh(tiny_llama())


def test_it_is_no_part_of_what_an_adapter_is(tmp_path):
    """Not in the configuration, the files or the state dict."""
    model, ids = adapted(), token_ids()
    before = set(model.state_dict())
    osora.set_execution(model, "materialised")
    wish = logits(model, ids)
    assert set(model.state_dict()) == before and "execution" not in osora.OsoraConfig().to_dict()
    osora.save_adapter(model, tmp_path)
    loaded = osora.load_adapter(tiny_llama(), tmp_path)
    assert {layer.execution for layer in adapted_layers(loaded).values()} == {"split"}
    torch.testing.assert_close(logits(loaded, ids), wish, rtol=1e-4, atol=1e-4)


def test_h_is_all_that_a_model_saves_and_one_weight_a_layer_all_that_it_keeps():
    ids = token_ids(2, 9)

    def saved(model: nn.Module) -> int:
        weights = [t for layer in adapted_layers(model).values() for t in kept(layer)] if adapted_layers(model) else []
        with saved_tensors(*model.parameters(), *model.buffers(), *weights) as found:
            model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits.sum().backward()
        return sum(t.untyped_storage().nbytes() for t in found)

    model = tiny_llama().requires_grad_(False)
    base = saved(model)
    osora.set_execution(move_adapter(osora.attach(model, osora.OsoraConfig(r=5))), "materialised")
    logits(model, ids)
    assert saved(model) - base == 14 * 18 * 5 * 4
    for layer in adapted_layers(model).values():
        assert [(t.shape, t.dtype) for t in kept(layer)] == [(layer.base_layer.weight.shape, torch.float32)]


@from_dynamo
def test_compile_a_model():
    """Forward and backward in one graph, over steps of an optimiser that does not count its writes."""
    torch._dynamo.reset()
    model, ids = osora.set_execution(adapted(lambda: tiny_llama(layers=1)), "materialised"), token_ids()
    plain = osora.set_execution(copy.deepcopy(model), "split")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients(function: nn.Module, of: nn.Module) -> list[Tensor]:
        of.zero_grad()
        function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in osora.adapter_parameters(of)]

    optimizers = [torch.optim.SGD(osora.adapter_parameters(m), lr=0.05, fused=True) for m in (model, plain)]
    for _ in range(3):
        for got, wish in zip(gradients(compiled, model), gradients(plain, plain), strict=True):
            torch.testing.assert_close(got, wish, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # the only name in older versions
def test_gradient_checkpointing_of_a_model():
    ids, gradients = token_ids(), []
    for use in (False, True):
        torch.manual_seed(3)
        model = osora.set_execution(adapted(), "materialised").train()
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in osora.adapter_parameters(model)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# -- never old -------------------------------------------------------------------------------------------------------


FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
def test_fused_optimisers_are_seen(kind, copied):
    """They write to parameters and leave the version as it was; Trainer takes one by default."""
    layer = materialised(moved(make_layer()))
    if copied:
        layer = copy.deepcopy(layer)
    optimizer = kind([layer.o, layer.s], lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(3, 12)).square().sum().backward()
        before = layer.o.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layer.o)
        check_now(layer)


@from_dynamo
def test_a_compiled_fused_optimiser_is_seen():
    torch._dynamo.reset()
    layer = materialised(moved(make_layer()))
    optimizer = torch.optim.AdamW([layer.o, layer.s], lr=0.1, fused=True)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(3, 12)).square().sum().backward()
        step()
        check_now(layer)
    torch._dynamo.reset()


def test_another_optimiser_s_step_between_forward_and_backward_does_no_harm():
    layer, other = materialised(moved(make_layer())), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, fused=True)
    other(torch.randn(2, 3)).sum().backward()
    y = layer(torch.randn(3, 12))
    optimizer.step()
    y.sum().backward()
    assert layer.o.grad is not None


def test_a_step_between_forward_and_backward_is_an_error():
    """Also of a fused optimiser, of which the split plan hears nothing."""
    layer = materialised(moved(make_layer()))
    optimizer = torch.optim.SGD([layer.o, layer.s], lr=0.1, fused=True)
    layer(torch.randn(3, 12)).sum().backward()
    y = layer(torch.randn(3, 12))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_load_state_dict_is_seen():
    layer, other = materialised(moved(make_layer())), moved(make_layer())
    check_now(layer)
    layer.load_state_dict(other.state_dict())
    check_now(layer)


def test_refresh_sees_what_nobody_counted():
    model = osora.set_execution(adapted(), "materialised")
    ids, layer = token_ids(), next(iter(adapted_layers(model).values()))
    logits(model, ids)
    addresses = [t.data_ptr() for each in adapted_layers(model).values() for t in kept(each)]
    for parameter in osora.adapter_parameters(model):
        parameter.data.normal_(std=0.3)
    assert osora.refresh(model) is model
    check_now(layer)
    got = logits(model, ids)
    torch.testing.assert_close(got, logits(osora.set_execution(model, "split"), ids), rtol=1e-3, atol=1e-3)
    osora.set_execution(model, "materialised")
    assert len(addresses) == 14 and len(set(addresses)) == 14


def test_refresh_keeps_the_address():
    layer = materialised(moved(make_layer()))
    layer(torch.randn(3, 12))
    (before,) = kept(layer)
    layer.o.data.fill_(1.0)
    layer.refresh()
    (after,) = kept(layer)
    assert before.data_ptr() == after.data_ptr()
    check_now(layer)


@pytest.mark.parametrize("name", ["o", "s", "base_layer.weight"])
def test_a_replaced_parameter_is_refused(name):
    """FSDP replaces parameters by others, which it fills without counting."""
    layer = materialised(moved(make_layer()))
    path, _, last = name.rpartition(".")
    owner = layer.get_submodule(path)
    setattr(owner, last, nn.Parameter(getattr(owner, last).detach().clone(), requires_grad="base" not in name))
    for call in (lambda: layer(torch.randn(3, 12)), layer.refresh):
        with pytest.raises(RuntimeError, match="was replaced after its execution was set to materialised"):
            call()
    materialised(layer)
    check_now(layer)


def test_a_functional_call_is_refused():
    layer = materialised(moved(make_layer()))
    with pytest.raises(RuntimeError, match="was replaced"):
        torch.func.functional_call(layer, {"o": torch.zeros(10)}, (torch.randn(3, 12),))


def test_a_parameter_of_another_kind_is_refused_and_nothing_changes():
    """DTensor, say; here a subclass that stands for it."""

    class Sharded(nn.Parameter):
        pass

    model = adapted()
    layers = adapted_layers(model)
    *_, (name, last) = layers.items()
    last.o = Sharded(last.o.detach())
    with pytest.raises(TypeError, match=rf"{name}: o is a Sharded, not a plain torch\.nn\.Parameter"):
        osora.set_execution(model, "materialised")
    assert {layer.execution for layer in layers.values()} == {"split"}


# -- the life of a layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64])
def test_casts(there):
    layer = materialised(moved(make_layer()))
    check_now(layer)
    layer.to(there)
    assert layer.execution == "materialised" and kept(layer) == []
    layer(torch.randn(3, 12, dtype=there))
    assert [t.dtype for t in kept(layer)] == [there]
    layer.to(torch.float32)
    check_now(layer)
    layer.to("meta")
    assert layer(torch.randn(3, 12, device="meta")).shape == (3, 10)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_plan_and_a_weight_of_their_own(copy_of):
    layer, x = materialised(moved(make_layer())), torch.randn(3, 12)
    y = layer(x)
    other = copy_of(layer)
    assert other.execution == "materialised" and kept(other) == []
    assert torch.equal(other(x), y)
    with torch.no_grad():
        other.o.zero_()
    check_now(other)
    assert torch.equal(layer(x), y)


def test_a_saved_module_holds_no_materialised_weight():
    layer = moved(make_layer(300, 400, 2))
    sizes = []
    for plan in ("split", "materialised"):
        layer.set_execution(plan)
        layer(torch.randn(3, 300))
        file = io.BytesIO()
        torch.save(layer, file)
        sizes.append(file.tell())
    assert sizes[1] - sizes[0] < 4000


def test_merge_and_detach_free_it():
    model, ids = osora.set_execution(adapted(), "materialised"), token_ids()
    wish = logits(model, ids)
    layers = adapted_layers(model)
    osora.merge(model)
    first = next(iter(layers.values()))
    assert ops_materialised.kept_weights(first.kept_weight(), first.o) == []
    torch.testing.assert_close(logits(model, ids), wish, rtol=1e-4, atol=1e-4)
    osora.unmerge(model)
    assert torch.equal(logits(model, ids), wish)
    weight, o = first.base_layer.weight, first.o
    assert len(ops_materialised.kept_weights(weight, o)) == 1
    osora.detach(model)
    del layers, first
    gc.collect()
    assert ops_materialised.kept_weights(weight, o) == []


def test_split_frees_it():
    layer = materialised(moved(make_layer()))
    layer(torch.randn(3, 12))
    assert len(kept(layer)) == 1
    layer.set_execution("split")
    assert kept(layer) == []


def test_disabled_and_enabled_again():
    model, ids = osora.set_execution(adapted(), "materialised"), token_ids()
    wish = logits(model, ids)
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    assert torch.equal(logits(model, ids), wish)


# -- where either plan computes split --------------------------------------------------------------------------------


def test_training_with_dropout_computes_split():
    layer, x = materialised(moved(make_layer(dropout=0.5))).train(), torch.randn(4, 12)
    assert not torch.equal(layer(x), layer(x)) and kept(layer) == []
    check_now(layer.eval())
    assert len(kept(layer)) == 1


def test_hooks_of_the_base_see_its_own_output():
    layer, x, seen = materialised(moved(make_layer())), torch.randn(4, 12), []
    plain = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    torch.testing.assert_close(layer(x), plain)
    handle.remove()
    assert torch.equal(seen[0], layer.base_layer(x))


def test_autocast():
    """The weight in autocast's dtype beside that of x without autocast."""
    layer, x = materialised(moved(make_layer())), torch.randn(4, 12)
    for _ in range(2):
        check_now(layer)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y.float(), layer(x).detach(), rtol=3e-2, atol=3e-2)
        y.sum().backward()
        with torch.no_grad():
            layer.o.add_(0.1)
    assert sorted(str(t.dtype) for t in kept(layer)) == ["torch.bfloat16", "torch.float32"]


def test_it_starts_as_its_base():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = materialised(make_layer(dtype=dtype))
        for x in (torch.randn(3, 12), torch.randn(2, 3, 12), torch.randn(0, 12), torch.randn(12)):
            assert torch.equal(layer(x.to(dtype)), layer.base_layer(x.to(dtype)))
