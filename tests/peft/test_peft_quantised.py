# SPDX-License-Identifier: Apache-2.0
"""PEFT models on quantised bases: the native API's function and files, and a base that nothing writes."""

import copy

import pytest
import torch
from helpers import logits, tiny_llama, token_ids
from peft import PeftModel, get_peft_model
from pefts import OsoraConfig, layers, move, quiet
from quantise import (
    CONFIGS,
    KINDS,
    assert_untouched,
    every_kind,
    every_method,
    loss,
    packs,
    quantised_llama,
    storages,
    unpacked,
)
from torch import nn

import osora
from osora import adapted_layers
from osora.layers.base_weight import is_quantised
from osora.layers.quantised import kind_of
from osora.peft import SorsaConfig

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
# bitsandbytes' 8-bit layers say in each forward of a float32 model that they cast x
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")]

PEFT = {"osora": OsoraConfig, "sorsa": SorsaConfig}
OPTIONS = {"r": 4, "tol": 1e-5}


def digests(model: nn.Module) -> list[str]:
    return [kind_of(m).digest(m) for m in model.modules() if is_quantised(m)]


def of_base(found: dict) -> dict:
    """By the names that the modules have without PEFT around them."""
    return {name.removeprefix("base_model.model."): value for name, value in found.items()}


def wrapped(kind: str, method: str = "osora", **options) -> nn.Module:
    return get_peft_model(quantised_llama(kind), PEFT[method](**(OPTIONS | options)))


@every_kind
@every_method
def test_the_same_bits_as_the_native_api(kind, method):
    """Untrained, trained, its gradients after an evaluation, and the base's storage after all of it."""
    own, model, ids = quantised_llama(kind), quantised_llama(kind), token_ids()
    base = logits(unpacked(copy.deepcopy(model)), ids)
    before, wish = storages(model), digests(model)
    osora.attach(own, CONFIGS[method](**OPTIONS))
    model = get_peft_model(model, PEFT[method](**OPTIONS))
    assert len(layers(model)) == 14 and torch.equal(logits(model, ids), base)
    twins = adapted_layers(own)
    with torch.no_grad():
        for layer in layers(model):
            assert all(
                torch.equal(a, b) for a, b in zip(layer.basis("default"), twins[layer.name].basis(), strict=True)
            )
            for a, b in zip(layer.deltas("default"), twins[layer.name].deltas("default"), strict=True):
                assert a.dtype == torch.float32
                b.copy_(a.normal_(std=0.05))
    assert torch.equal(logits(model, ids), logits(own, ids)) and not torch.equal(logits(model, ids), base)
    for net in (own, model):
        loss(net.train(), ids).backward()
    for layer in layers(model):
        for a, b in zip(layer.deltas("default"), twins[layer.name].deltas("default"), strict=True):
            assert torch.equal(a.grad, b.grad) and a.grad.abs().sum() > 0, layer.name
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    with pytest.raises(ValueError, match=r"base weight is quantised.*requantize=True"):
        model.merge_adapter()
    assert_untouched(nn.ModuleDict({"m": model.get_base_model()})["m"], before)
    assert digests(model) == wish
    assert torch.equal(logits(unpacked(model.unload()), ids), base)


@every_kind
@every_method
@pytest.mark.parametrize("save_basis", [True, False])
def test_saved_and_loaded(kind, method, save_basis, tmp_path):
    model, ids = move(wrapped(kind, method, save_basis=save_basis)), token_ids()
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert f'"quantization":"bnb-{kind}"' in (tmp_path / "adapter_config.json").read_text()
    fresh = quantised_llama(kind)
    before = storages(fresh)
    again = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=save_basis)
    assert torch.equal(logits(again, ids), want)
    assert_untouched(again.get_base_model(), before)
    own = osora.load_adapter(quantised_llama(kind), tmp_path)
    assert torch.equal(logits(own, ids), want)
    osora.save_adapter(own, tmp_path / "native", save_basis=save_basis)
    assert torch.equal(logits(PeftModel.from_pretrained(quantised_llama(kind), tmp_path / "native"), ids), want)
    other = quantised_llama(kind)
    other.model.layers[1].mlp.up_proj.weight.data.view(torch.uint8)[3, 0] += 1
    with pytest.raises(osora.AdapterError, match=r"up_proj is not the one this adapter was trained on"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not layers(other) and not hasattr(other, "peft_config")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_two_models_share_one_set_of_weights(kind):
    base = tiny_llama(hidden_size=64, intermediate_size=128) if kind is None else quantised_llama(kind)
    ids, other = token_ids(), osora.share_base(base)
    wish = logits(copy.deepcopy(base), ids)
    addresses = [{n: p.data_ptr() for n, p in m.named_parameters()} for m in (base, other)]
    assert addresses[0] == addresses[1]
    bits = {name: p.detach().clone() for name, p in base.named_parameters()}
    models = [
        move(get_peft_model(base, OsoraConfig(r=4))),
        move(get_peft_model(other, SorsaConfig(r=3, target_modules=["q_proj", "up_proj"]))),
    ]
    before = [logits(model, ids) for model in models]
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss(model.train(), ids).backward()
        optimizer.step()
        model.eval()
    for model, early in zip(models, before, strict=True):
        now = logits(model, ids)
        assert not torch.equal(now, early) and not torch.equal(early, wish)
    for model in models:
        with pytest.raises(ValueError, match="has adapters of PEFT, which would come along"):
            osora.share_base(model)
        plain = model.unload()
        assert {n: p.data_ptr() for n, p in plain.named_parameters()} == addresses[0]
        assert all(torch.equal(p, bits[name]) for name, p in plain.named_parameters())
        assert torch.equal(logits(plain, ids), wish)


@every_kind
def test_several_adapters_on_a_quantised_base(kind):
    model, ids = move(wrapped(kind)), token_ids(3)
    model.add_adapter("two", OsoraConfig(r=3, tol=1e-4, target_modules=["q_proj", "down_proj"]))
    move(model, "two", 0.3)
    with torch.no_grad():
        rows = model(ids, adapter_names=["two", "__base__", "default"]).logits
    alone = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    with model.disable_adapter():
        alone["__base__"] = logits(model, ids)
    for row, name in enumerate(["two", "__base__", "default"]):
        # 8-bit layers quantise x in 8 bits by rows: a difference of sums may move a code, of 127
        torch.testing.assert_close(rows[row], alone[name][row], rtol=0.05, atol=0.05)
    assert (alone["two"] - alone["default"]).abs().max() > 0.2


@pytest.mark.skipif(not packs(), reason="bitsandbytes packs on CPUs with AVX512-BF16 alone")
def test_packing_waits_until_the_last_adapter_is_gone():
    """Also through a copy, and after a refused second adapter; and not the head's alone."""

    def is_packed(net: nn.Module) -> bool:
        return any(
            getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in net.modules() if is_quantised(m)
        )

    model, ids = get_peft_model(quantised_llama("nf4"), OsoraConfig(r=4, target_modules=["q_proj"])), token_ids()
    with pytest.raises(ValueError, match="not found"):
        model.add_adapter("no", OsoraConfig(target_modules=["no_such"]))
    model.add_adapter("two", OsoraConfig(r=3, target_modules=["v_proj"]))
    other = copy.deepcopy(model)
    model.delete_adapter("two")
    for net in (model, other):
        logits(net, ids)
        assert not is_packed(net)
    plain = model.unload()
    logits(plain, ids)
    assert is_packed(plain)
    logits(other, ids)
    assert not is_packed(other)
    loss(other.train(), ids).backward()
