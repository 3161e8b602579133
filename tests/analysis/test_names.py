# SPDX-License-Identifier: Apache-2.0
"""Which matrices of two models are compared: by their names, all of a model's or none, without a word lost."""

import pytest
import torch
from helpers import tiny_llama
from torch import nn

import osora


def test_layers_that_the_other_side_does_not_have_are_an_error(tmp_path):
    """A checkpoint whose names are not the model's: of many layers, one or two were reported."""
    model = tiny_llama()
    tensors = {key.replace("self_attn", "attention"): value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"8 of the model's linear layers .*self_attn\.k_proj.* and 5 more .*modules="):
        osora.weight_changes(tensors, model)
    with pytest.raises(ValueError, match="8 of the model's linear layers"):
        osora.weight_changes(model, tensors)
    assert len(osora.weight_changes(tensors, model, modules=["up_proj", "down_proj"])) == 4
    with pytest.raises(ValueError, match="2 of the model's linear layers"):
        osora.weight_changes(tensors, model, modules=["up_proj", "q_proj"])
    other = tiny_llama(layers=1)
    with pytest.raises(ValueError, match=r"7 of the model's .*layers\.1"):
        osora.weight_changes(model, other)
    assert len(osora.weight_changes(model, other, modules=r".*layers\.0.*")) == 7


class Named(nn.Module):
    """Modules named as adapters name theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base_layer = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"base_layer": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        self.outer = nn.Module()
        self.outer.base_layer = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x):
        return self.outer.base_layer(self.inner["other"](self.inner["base_layer"](self.base_layer(x))))


@pytest.mark.parametrize("adapted", [False, True])
def test_modules_named_base_layer_keep_their_rows(adapted):
    names = ["base_layer", "inner.base_layer", "inner.other", "outer.base_layer.0"]
    model = Named()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if adapted:
        osora.attach(model, osora.OsoraConfig(r=2))
    found = osora.weight_changes(before, model)
    assert sorted(row.name for row in found) == names and all(row.relative == 0 for row in found)
    assert sorted(row.name for row in osora.weight_changes(before, model.state_dict())) == names


def test_two_tensors_of_one_module_are_an_error():
    twice = {"a.base_layer.weight": torch.eye(3), "a.weight": torch.eye(3), "a.lora_A.weight": torch.eye(3)}
    with pytest.raises(ValueError, match=r"both the weight of a: give one"):
        osora.weight_changes(twice, twice)


def tiny_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


def tiny_qwen_vl() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_scaling": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


@pytest.mark.parametrize("make", [tiny_vit, tiny_qwen_vl])
def test_a_checkpoint_of_other_names_is_compared_whole_or_not_at_all(make, tmp_path):
    """One row of many was all that one saw."""
    model = make()
    model.save_pretrained(tmp_path)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        found = osora.weight_changes(tmp_path, model, rank=1)
    except ValueError as error:
        assert "of the model's linear layers have no weight of their name" in str(error)
    else:
        assert {row.name for row in found} >= set(linear) and all(row.relative == 0 for row in found)
    again = type(model).from_pretrained(tmp_path)  # the cure that the message names
    assert {row.name for row in osora.weight_changes(again, model, rank=1)} == set(linear)
