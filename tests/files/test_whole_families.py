# SPDX-License-Identifier: Apache-2.0
"""Heads of many families trained whole: into a model with another head, to PEFT as a LoRA, merged in memory."""

import warnings
from typing import Any

import pytest
import torch
from helpers import move_adapter
from torch import Tensor, nn

import osora

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
SEQUENCE = "ForSequenceClassification"
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "eos_token_id": 2}
PICTURE = {"image_size": 16, "patch_size": 8}
SOUND = {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # family -> end of the class, options, whole modules
    "Bert": (SEQUENCE, {}, ["classifier", "pooler"]),
    "Roberta": (SEQUENCE, {}, ["classifier"]),
    "Electra": (SEQUENCE, {}, ["classifier"]),
    "Albert": (SEQUENCE, {"embedding_size": 16}, ["classifier"]),
    "Camembert": ("ForTokenClassification", {}, ["classifier"]),
    "DistilBert": (SEQUENCE, DISTIL, ["classifier", "pre_classifier"]),
    "DebertaV2": (SEQUENCE, {}, ["classifier", "pooler"]),
    "ModernBert": (SEQUENCE, {}, ["head", "classifier"]),
    "XLMRoberta": ("ForQuestionAnswering", {"num_labels": 2}, ["qa_outputs"]),
    "Bart": (SEQUENCE, BART | HEADS, ["classification_head"]),
    "T5": (SEQUENCE, T5 | {"eos_token_id": 2}, ["classification_head"]),
    "Llama": (SEQUENCE, {}, ["score"]),
    "Qwen2": ("ForTokenClassification", {"num_key_value_heads": 2}, ["score"]),
    "GPTNeoX": (SEQUENCE, {}, ["score"]),
    "ViT": ("ForImageClassification", PICTURE, ["classifier"]),
    "Wav2Vec2": (SEQUENCE, SOUND, ["projector", "classifier"]),
}


def made(family: str, seed: int = 0) -> nn.Module:
    """The same body always, and a head by the seed."""
    end, options, heads = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TEXT | options)
    model = getattr(transformers, f"{family}{end}")(config).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in heads for part in name.split(".")):
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def outputs(family: str, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if family == "ViT":
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
    if family == "Wav2Vec2":
        return model(input_values=torch.randn(2, 400, generator=generator)).logits
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    ids[:, -1] = 2  # the end that BART and T5 look for
    found = model(input_ids=ids)
    return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_goes_wherever_its_adapter_goes(family, tmp_path):
    peft = pytest.importorskip("peft")
    heads, start = FAMILIES[family][2], outputs(family, made(family, 1))
    model = osora.attach(made(family, 1), osora.OsoraConfig(r=3, tol=1e-4, modules_to_save=heads))
    assert torch.equal(outputs(family, model), start)
    assert not any(part in heads for name in osora.adapted_layers(model) for part in name.split("."))
    wish = outputs(family, move_adapter(model, 0.1))
    assert not torch.allclose(wish, start)
    osora.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(outputs(family, osora.load_adapter(made(family, 2), tmp_path / "adapter")), wish)
    for source, name in ((model, "from a model"), (tmp_path / "adapter", "from a folder")):
        osora.export_lora(source, tmp_path / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing.*")
            plain = peft.PeftModel.from_pretrained(made(family, 3), tmp_path / name).eval()
        torch.testing.assert_close(outputs(family, plain), wish, rtol=0, atol=2e-5)
    torch.testing.assert_close(outputs(family, osora.detach(model, merged=True)), wish, rtol=0, atol=2e-5)
    assert not any(type(module).__module__.startswith("osora") for module in model.modules())
