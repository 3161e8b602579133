# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose names are not the model's, as transformers renames them: merged, verified, exported, compared."""

import json
import re

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama
from torch import nn

import osora
from osora import AdapterError
from osora.files.renamed import Renamed, renamed

transformers = pytest.importorskip("transformers")
every_config = pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig], ids=["osora", "sorsa"])

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PICTURES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> nn.Module:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**PICTURES)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=vision))


def qwen_vl() -> nn.Module:
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_scaling": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


RENAMED = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURES)),
    "llava": llava,
    "qwen-vl": qwen_vl,
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=2)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@every_config
@pytest.mark.parametrize("family", RENAMED)
def test_transformers_own_names_are_followed(family, config, tmp_path):
    """Merged on disk as in memory, verified, exported without a basis, and compared layer by layer."""
    torch.manual_seed(0)
    RENAMED[family]().save_pretrained(tmp_path / "base")
    kind = type(RENAMED[family]())
    model = osora.attach(kind.from_pretrained(tmp_path / "base"), config(r=4, tol=1e-4))
    names = set(osora.adapted_layers(model))
    for save_basis in (True, False):
        osora.save_adapter(move_adapter(model), tmp_path / str(save_basis), save_basis=save_basis)
    assert osora.verify_adapter(tmp_path / "True", tmp_path / "base").ok
    osora.export_lora(tmp_path / "False", tmp_path / "lora", base=tmp_path / "base", equal_ranks=True)
    changes = osora.weight_changes(tmp_path / "base", model)
    assert names <= {change.name for change in changes}
    assert all((change.relative > 0) == (change.name in names) for change in changes)
    osora.merge_saved(tmp_path / "base", tmp_path / "False", tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged").state_dict()
    wish = osora.detach(model, merged=True).state_dict()
    assert all(torch.equal(merged[key], wish[key]) for key in wish)


def test_a_checkpoint_that_transformers_does_not_know(tmp_path):
    """The message says that, and why transformers could not be asked for other names."""
    tiny_llama().save_pretrained(tmp_path / "base")
    osora.save_adapter(osora.attach(tiny_gpt2(), osora.OsoraConfig(r=4)), tmp_path / "adapter")
    known = json.loads((tmp_path / "base" / "config.json").read_text())
    for text, why in (
        (None, "that name$"),
        ("{", r"that name \(whether transformers calls it otherwise could not be told: OSError: "),
        (
            '{"model_type": "nobodys"}',
            r"could not be told: ValueError: The checkpoint you are trying to load .*nobodys",
        ),
        (
            json.dumps(known | {"architectures": ["Mine"]}),
            "told: Mine, in its config.json's architectures, is no class",
        ),
        (json.dumps(known | {"architectures": None}), "told: nothing, in its config.json's architectures, is no class"),
        ("", "has no config.json"),
    ):
        if text is not None:
            (tmp_path / "base" / "config.json").write_text(text)
        if text == "":
            (tmp_path / "base" / "config.json").unlink()
        with pytest.raises(
            AdapterError, match=r"is for transformer\.h\.0\.attn\.c_attn, and .* has no weight of that name"
        ) as told:
            osora.verify_adapter(tmp_path / "adapter", tmp_path / "base")
        assert re.search(why, str(told.value)), str(told.value)
        if why != "that name$":
            with pytest.raises(ValueError, match=why.removeprefix("that name ")):
                osora.weight_changes(tmp_path / "base", tiny_gpt2())


def test_a_checkpoint_with_code_of_its_own_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch):
    """transformers asks at a terminal whether to trust it, and waits, unless it is told not to."""
    code = "open({!r}, 'w')\nfrom transformers import PretrainedConfig as Own\n".format(str(tmp_path / "has run"))
    (tmp_path / "configuration_own.py").write_text(code, encoding="utf-8")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    found = renamed(tmp_path, ["a.weight"])
    assert found == Renamed(why_not=found.why_not) and "ValueError: " in found.note and "custom code" in found.note
    assert not (tmp_path / "has run").exists()
