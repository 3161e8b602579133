# SPDX-License-Identifier: Apache-2.0
"""Base models of which accelerate keeps weights elsewhere, in memory or on disk, until a layer is called."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.files.info import adapter_info

pytest.importorskip("accelerate")
from accelerate import cpu_offload, disk_offload, dispatch_model

WAYS = ["cpu", "disk", "device_map"]
BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CONFIGS = {"osora": osora.OsoraConfig(r=3), "sorsa": osora.SorsaConfig(r=3, gamma=0.1)}


def offloaded(base: str, way: str, folder: Path) -> nn.Module:
    model, cpu = BASES[base](), torch.device("cpu")
    if way == "cpu":
        cpu_offload(model, execution_device=cpu)
    elif way == "disk":
        disk_offload(model, str(folder / "weights"), execution_device=cpu)
    else:  # what from_pretrained(device_map=...) does; a part stays
        blocks = "transformer.h" if base == "gpt2" else "model.layers"
        inner = model.transformer if base == "gpt2" else model.model
        places = {name: "cpu" for name, _ in inner.named_children()}
        prefix = blocks.rsplit(".", 1)[0]
        del places[blocks.rsplit(".", 1)[1]]
        device_map = {f"{prefix}.{name}": place for name, place in places.items()}
        device_map |= {f"{blocks}.0": "cpu", f"{blocks}.1": "disk", "lm_head": "cpu"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder / "weights"), force_hooks=True)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def train(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(4)
    ids, trained = token_ids(3), osora.adapter_parameters(model)
    optimiser = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return [p.detach().clone() for p in trained]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_adapter_of_the_model_in_memory(tmp_path, way, base, method):
    model, plain, ids = offloaded(base, way, tmp_path), BASES[base](), token_ids(3)
    before = logits(plain, ids)
    for each in (model, plain):
        osora.attach(each, CONFIGS[method])
    assert any(layer.base_layer.weight.is_meta for layer in adapted_layers(model).values())
    assert torch.equal(logits(model, ids), before)
    for each in (model, plain):
        torch.manual_seed(5)
        move_adapter(each)
    for now, wish in zip(train(model), train(plain), strict=True):
        torch.testing.assert_close(now, wish, rtol=1e-5, atol=1e-6)
    assert any(layer.base_layer.weight.is_meta for layer in adapted_layers(model).values())
    osora.save_adapter(model, tmp_path / "ours")
    osora.save_adapter(plain, tmp_path / "plain")
    assert adapter_info(tmp_path / "ours").modules == adapter_info(tmp_path / "plain").modules
    osora.export_lora(model, tmp_path / "lora")
    after = logits(model, ids)
    loaded = osora.load_adapter(offloaded(base, way, tmp_path / "again"), tmp_path / "ours")
    assert torch.equal(logits(loaded, ids), after)
    torch.testing.assert_close(logits(osora.load_adapter(BASES[base](), tmp_path / "ours"), ids), after)
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), before)
    osora.detach(model)
    assert torch.equal(logits(model, ids), before) and not adapted_layers(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", WAYS)
def test_with_a_basis_it_is_that_of_the_model_in_memory(tmp_path, way, base):
    BASES[base]().save_pretrained(tmp_path / "base")
    basis = tmp_path / "basis"
    osora.initialise(tmp_path / "base", basis, osora.OsoraConfig(r=4), progress=False)
    model, plain, ids = offloaded(base, way, tmp_path), BASES[base](), token_ids(3)
    for each in (model, plain):
        osora.attach(each, CONFIGS["sorsa"], basis=basis)
    layers, wish = adapted_layers(model), adapted_layers(plain)
    assert any(layer.base_layer.weight.is_meta for layer in layers.values())
    for name, layer in layers.items():
        for mine, theirs in zip(layer.basis(), wish[name].basis(), strict=True):
            assert torch.equal(mine, theirs) and mine.device == theirs.device
    for each in (model, plain):
        torch.manual_seed(5)
        move_adapter(each)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    for now, then in zip(train(model), train(plain), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)
    osora.save_adapter(model, tmp_path / "ours", save_basis=False)
    osora.save_adapter(plain, tmp_path / "plain", save_basis=False)
    assert adapter_info(tmp_path / "ours").modules == adapter_info(tmp_path / "plain").modules
    loaded = osora.load_adapter(offloaded(base, way, tmp_path / "again"), tmp_path / "ours", basis=basis)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("way", WAYS)
def test_a_basis_of_another_offloaded_base_is_refused(tmp_path, way):
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-6
    changed.save_pretrained(tmp_path / "base")
    osora.initialise(tmp_path / "base", tmp_path / "basis", osora.OsoraConfig(r=4), progress=False)
    model = offloaded("llama", way, tmp_path)
    with pytest.raises(osora.BasisError, match=r"the weight of model\.layers\.1\.mlp\.up_proj is not the one"):
        osora.attach(model, CONFIGS["osora"], basis=tmp_path / "basis")
    assert not adapted_layers(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_base_that_was_not_the_adapters_is_refused(tmp_path, way):
    osora.save_adapter(osora.attach(tiny_llama(), CONFIGS["osora"]), tmp_path / "adapter")
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    dispatch_model(other, device_map, main_device="cpu", offload_dir=str(tmp_path / "w"), force_hooks=True)
    with pytest.raises(osora.AdapterError, match=r"layers\.1\.mlp\.up_proj is not the one"):
        osora.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("way", WAYS)
def test_merging_is_refused_and_nothing_is_merged(tmp_path, way):
    model = move_adapter(osora.attach(offloaded("llama", way, tmp_path), CONFIGS["osora"]))
    with pytest.raises(ValueError, match=r"offloaded the base weight.*osora\.merge_saved"):
        osora.merge(model)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    with pytest.raises(ValueError, match="not offloaded: leave it on the split plan"):
        osora.set_execution(model, "materialised")


def test_nan_in_an_offloaded_weight_is_found_before_any_work(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        osora.attach(model, CONFIGS["osora"])
    assert not adapted_layers(model)


def test_a_weight_that_nobody_brings_is_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="meta device and has no values"):
        osora.attach(model, CONFIGS["osora"])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what PEFT asks
def test_peft_has_it_too(tmp_path):
    peft = pytest.importorskip("peft")
    from osora.peft import OsoraConfig

    config, ids = OsoraConfig(r=3, target_modules="all-linear"), token_ids(2)
    model = peft.get_peft_model(offloaded("llama", "cpu", tmp_path), copy.deepcopy(config))
    wish = tiny_llama()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wish)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
