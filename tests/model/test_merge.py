# SPDX-License-Identifier: Apache-2.0
"""merge and unmerge of whole models: rounded once, and the way back exact."""

import copy

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers.base_weight import oriented_weight

every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def adapted(make, dtype: torch.dtype = torch.float32, step: float = 0.05, **config) -> nn.Module:
    return move_adapter(osora.attach(make(dtype=dtype), osora.OsoraConfig(**({"r": 6} | config))), step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight for name, layer in adapted_layers(model).items()}


@every_model
@dtypes
def test_merge_and_unmerge(make, dtype):
    model, ids = adapted(make, dtype), token_ids()
    base, wish = logits(base_of(model), ids), logits(model, ids)
    before = {name: (w, w.data_ptr(), w.clone()) for name, w in weights(model).items()}
    assert osora.merge(model) is model
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model, ids), wish, rtol=1e-5, atol=2e-5)
    assert not torch.equal(logits(model, ids), base)
    assert osora.unmerge(model) is model
    for name, weight in weights(model).items():
        same, address, bits = before[name]
        assert weight is same and weight.data_ptr() == address and torch.equal(weight, bits)
    assert torch.equal(logits(model, ids), wish)
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), base)


def base_of(model: nn.Module) -> nn.Module:
    """A copy that is its base."""
    other = copy.deepcopy(model)
    for layer in adapted_layers(other).values():
        layer.enabled = False
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_the_paper_s(dtype):
    """W_res + O (U S Vᵀ) in float64, then one rounding: within half a unit of the last place, and a little."""
    model = adapted(tiny_gpt2, dtype)
    wish, size = {}, {}
    for name, layer in adapted_layers(model).items():
        U, V, S0, s, o = (t.detach().double() for t in (layer.U, layer.V, layer.S0, layer.s, layer.o))
        base = oriented_weight(layer.base_layer).double()
        wish[name] = (base - (U * S0) @ V.t()) + (1 + o)[:, None] * ((U * (S0 + s)) @ V.t())
        size[name] = base.abs() + (U.abs() * S0) @ V.abs().t()
    osora.merge(model)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name, layer in adapted_layers(model).items():
        got = oriented_weight(layer.base_layer)
        assert got.dtype == dtype
        error = (got.double() - wish[name]).abs()
        allowed = 0.5001 * torch.finfo(dtype).eps * wish[name].abs() + 8 * torch.finfo(exact).eps * size[name]
        allowed += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (error <= allowed).all(), name


def test_small_updates_of_bfloat16_weights_show_what_merging_costs():
    """A merged bfloat16 weight drowns an update of 1e-4; the adapter beside it does not. So merging is for serving."""
    model = adapted(lambda dtype: tiny_llama(dtype=torch.bfloat16), step=1e-4)
    layer = next(iter(adapted_layers(model).values()))
    update = layer.delta_weight()
    x = torch.eye(32, dtype=torch.bfloat16)
    branch = osora.ops.linear(x, None, None, layer.U, layer.V, layer.S0, layer.s, layer.o).t().float()
    assert (branch - update).norm() < 0.02 * update.norm()
    layer.merge()
    merged = layer.base_layer.weight.float() - layer.kept_weight().float()
    assert (merged - update).norm() > 0.5 * update.norm()


def test_zero_deltas_merge_to_the_same_bits():
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=6))
    before = {name: weight.clone() for name, weight in weights(model).items()}
    osora.merge(model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_many_times():
    model, ids = adapted(tiny_llama), token_ids()
    wish, base = logits(model, ids), {name: w.clone() for name, w in weights(model).items()}
    merged = None
    for _ in range(5):
        now = logits(osora.merge(model), ids)
        assert merged is None or torch.equal(now, merged)
        merged = now
        osora.unmerge(model)
    assert torch.equal(logits(model, ids), wish)
    assert all(torch.equal(w, base[name]) for name, w in weights(model).items())


def test_a_merged_model_costs_what_its_base_does():
    model, ids = osora.merge(adapted(tiny_llama)), token_ids()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(model, ids)
    assert not any(event.name.startswith("osora::") for event in profile.events())


def test_merging_twice_is_refused_and_changes_nothing():
    model, ids = osora.merge(adapted(tiny_llama)), token_ids()
    wish = logits(model, ids)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: the adapter is merged already"):
        osora.merge(model)
    assert torch.equal(logits(model, ids), wish)
    osora.unmerge(model)
    with pytest.raises(ValueError, match=r"q_proj: the adapter is not merged"):
        osora.unmerge(model)


def test_one_layer_that_overflows_stops_all():
    model = adapted(tiny_llama, torch.float16)
    before = {name: (id(w), w.clone()) for name, w in weights(model).items()}
    with torch.no_grad():
        list(adapted_layers(model).values())[-1].s.fill_(1e6)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: merging gives NaN or infinite .*float16"):
        osora.merge(model)
    for name, weight in weights(model).items():
        assert id(weight) == before[name][0] and torch.equal(weight, before[name][1])
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_merged_models_do_not_train():
    """The adapter is in the weights: a step on o and s would change nothing, so there is no gradient to step on."""
    model, ids = osora.merge(adapted(tiny_llama)), token_ids()
    assert not model(ids).logits.requires_grad


def test_a_head_that_is_not_tied():
    model = adapted(lambda dtype: tiny_llama(tied=False), target_modules=["lm_head"])
    ids = token_ids()
    wish = logits(model, ids)
    torch.testing.assert_close(logits(osora.merge(model), ids), wish, rtol=1e-5, atol=1e-5)
