# SPDX-License-Identifier: Apache-2.0
"""What PEFT puts in beside an adapter's layers (whole modules, rows of embeddings, biases) goes out with it."""

import pytest
import torch
from helpers import logits, tiny_bert, tiny_llama, token_ids
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pefts import OsoraConfig, adapted, layers, move, quiet
from safetensors.torch import load_file, save_file
from torch import nn

import osora

pytestmark = [
    *quiet,
    # PEFT's, of a head that is trained whole; before 0.20 where it is not tied, too
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and:UserWarning"),
]


def untied() -> nn.Module:
    return tiny_llama(tied=False)


def picture(model: nn.Module) -> tuple:
    """Modules, parameters and what is trained of them, by identity; and values."""
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: id(module) for name, module in model.named_modules()}, parameters, values


def assert_as_it_was(model: nn.Module, before: tuple) -> None:
    modules, parameters, values = picture(model)
    assert modules == before[0] and parameters == before[1] and not hasattr(model, "peft_config")
    assert all(torch.equal(value, before[2][name]) for name, value in values.items())


WHOLE = [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}]


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("make", [tiny_llama, untied], ids=["tied", "untied"])
def test_an_adapter_that_cannot_be_made(make, options):
    model = make()
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = 1e38
    model.model.layers[1].mlp.down_proj.weight.data[2, 4] = float("inf")
    before = picture(model)
    with pytest.raises(ValueError, match="has NaN or infinite entries"):
        get_peft_model(model, OsoraConfig(r=2, target_modules=["down_proj"], **options))
    assert_as_it_was(model, before)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("options", [*WHOLE, {"bias": "all"}, {"bias": "osora_only"}], ids=str)
@pytest.mark.parametrize("damage", ["base", "tensors"])
def test_an_adapter_that_is_refused_on_loading(damage, options, low, tmp_path):
    make = tiny_bert if "bias" in options else untied
    model = adapted(make, **options)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    model = make()
    last = [module for name, module in model.named_modules() if "layer" in name and isinstance(module, nn.Linear)][-1]
    if damage == "base":
        last.weight.data[2, 3] += 0.1
    else:
        path = tmp_path / "adapter_model.safetensors"
        found = load_file(path)
        found[[key for key in found if key.endswith("osora_o.weight")][-1]][3] += 0.1
        save_file(found, path)
    before = picture(model)
    with pytest.raises(osora.AdapterError):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("low", [False, True])
def test_a_base_without_values(low, tmp_path):
    adapted().save_pretrained(tmp_path)
    model = tiny_llama().to("meta")
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"q_proj\.weight is on the meta device and has no values: load the weights"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low)
    assert [id(module) for module in model.modules()] == before and not hasattr(model, "peft_config")


def test_a_second_one_that_is_refused_leaves_the_firsts_whole_modules():
    model, ids = adapted(untied, modules_to_save=["lm_head"]), token_ids()
    wish, before = logits(model, ids), [(name, id(module)) for name, module in model.named_modules()]
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = float("nan")
    first = layers(model)[-2].adapters["default"]
    first.certificate = first.certificate._replace(max_residual=1.0)  # so that its basis is not taken
    with pytest.raises(ValueError, match="has NaN or infinite entries"):
        model.add_adapter("two", OsoraConfig(r=3, modules_to_save=["lm_head"]))
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data.copy_(
        untied().model.layers[1].mlp.up_proj.weight
    )
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(logits(model, ids), wish)


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_untouched_model(options, merged):
    model = untied()
    ids = torch.tensor([[3, 5, 7, 3]])
    wish, modules = logits(model, ids), {name: id(module) for name, module in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = get_peft_model(model, OsoraConfig(r=3, target_modules=["up_proj"], **options))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.equal(logits(model, ids), wish)
    if merged:
        model.merge_adapter()
    base = model.unload()
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert torch.equal(logits(base, ids), wish)
    assert all(torch.equal(tensor, values[name]) for name, tensor in base.state_dict().items())


def test_a_broken_adapter_is_merged_nowhere_not_into_rows_of_embeddings_either():
    model, ids = adapted(trainable_token_indices=[3, 5]), torch.tensor([[3, 5, 7]])
    wish, last = logits(model, ids), layers(model)[-1].deltas("default")[0]
    kept = last.detach().clone()
    last.data[2] = float("nan")
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            call()
        assert not [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m.merged]
    last.data.copy_(kept)
    assert torch.equal(logits(model, ids), wish)
    tokens = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    tokens[0].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert len(layers(model)) == 14 and not any(layer.merged for layer in layers(model))


def test_all_linear_beside_a_head_that_another_adapter_trains_whole(tmp_path):
    """PEFT sees linear layers within its own wrapper; the first adapter's head would be adapted by the second."""
    model, ids = adapted(untied, modules_to_save=["lm_head"]), token_ids()
    wish = logits(model, ids)
    model.add_adapter("two", OsoraConfig(r=3, tol=1e-4))
    move(model, "two", 0.3)
    assert len(layers(model)) == 14 and torch.equal(logits(model, ids), wish)
    model.save_pretrained(tmp_path)
    model.set_adapter("two")
    for name, folder in (("default", tmp_path), ("two", tmp_path / "two")):
        model.set_adapter(name)
        assert torch.equal(logits(PeftModel.from_pretrained(untied(), folder), ids), logits(model, ids))
    model = adapted(modules_to_save=["mlp"])
    for options in ({}, {"target_modules": ["up_proj"]}):
        with pytest.raises(ValueError, match=r"mlp\.\S+ is within model\.layers\.0\.mlp, which another adapter trains"):
            model.add_adapter("two", OsoraConfig(r=3, **options))
    assert list(model.peft_config) == ["default"]


# -- names and stacks ------------------------------------------------------------------------------------------------


def test_adapters_that_are_not_there_and_adapters_named_twice():
    model, ids = adapted(), token_ids()
    wish = logits(model, ids)
    for call in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(ValueError, match="there is no adapter 'defualt': the model has default"):
            call(["defualt"])
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model, ids), wish)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(logits(model, ids), wish, rtol=1e-4, atol=1e-4)


def test_weighted_sums_of_what_has_none():
    model = adapted(untied, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="trains whole modules or rows of embeddings"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    with pytest.raises(ValueError, match=r"weights must be finite numbers, got \[nan\]"):
        adapted().add_weighted_adapter(["default"], [float("nan")], "half")


def test_a_configuration_that_was_read_from_an_adapter_is_for_its_tensors(tmp_path):
    model, ids = adapted(), token_ids()
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    waiting = get_peft_model(tiny_llama(), config)
    with pytest.raises(osora.AdapterError, match=r"waits for the tensors .* set config\.osora = None"):
        logits(waiting, ids)
    waiting.load_adapter(tmp_path, "default")
    assert torch.equal(logits(waiting, ids), logits(model, ids))
    config = PeftConfig.from_pretrained(tmp_path)
    config.osora = None
    fresh = get_peft_model(tiny_llama(), config)
    assert torch.equal(logits(fresh, ids), logits(tiny_llama(), ids)) and len(layers(fresh)) == 14


def test_native_adapters_and_pefts_in_one_model():
    """Within each other's layers they would be ignored, in silence."""
    own = osora.attach(tiny_llama(), osora.OsoraConfig(r=2))
    before = [id(module) for module in own.modules()]
    with pytest.raises(ValueError, match=r"q_proj has an adapter by osora\.attach .* which PEFT would neither train"):
        get_peft_model(own, OsoraConfig(r=2))
    assert [id(module) for module in own.modules()] == before and not hasattr(own, "peft_config")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    for model in (adapted(), get_peft_model(tiny_llama(), lora)):
        with pytest.raises(ValueError, match=r"q_proj\.base_layer belongs to an adapter of PEFT, in \S+q_proj:"):
            osora.attach(model, osora.OsoraConfig(r=2))
        assert torch.equal(
            logits(osora.attach(model.unload(), osora.OsoraConfig(r=2)), ids := token_ids()), logits(tiny_llama(), ids)
        )


def test_a_lora_within_a_native_layer_counts():
    """PEFT's "all-linear" finds the base layers of native adapters."""
    model, ids = osora.attach(tiny_llama(), osora.OsoraConfig(r=2)), token_ids()
    wish = logits(model, ids)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.allclose(logits(model, ids), wish, atol=0.01)
