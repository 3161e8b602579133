# SPDX-License-Identifier: Apache-2.0
"""Exported LoRAs of models that PEFT treats in a way of their own: experts, classifiers, state spaces."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import move_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import osora
from osora import OsoraConfig, SorsaConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = ROUTED | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GLM = ROUTED | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
NEXT = ROUTED | {
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
EXPERTS = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": GLM,
    "qwen3_next": NEXT,
    "qwen2_moe": ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": ROUTED | {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0, 2]},
    "mixtral": {"num_local_experts": 4},
    "dots1": GLM,
}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CLASSIFIERS = [
    *(("Llama", head) for head in HEADS),
    *(("Bert", head) for head in HEADS),
    ("Roberta", HEADS[0]),  # two layers in its head
    ("GPT2", HEADS[0]),
]


def of_kind(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL | EXPERTS.get(kind, {}) | options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def classifier(family: str, head: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    options = {key: value for key, value in SMALL.items() if family == "Llama" or "key_value" not in key}
    if family == "GPT2":
        options = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, f"{family}{head}")(config).eval()


@torch.no_grad()
def outputs(model: nn.Module, rows: int = 2) -> Tensor:
    found = model(input_ids=torch.arange(3, 3 + 7 * rows).reshape(rows, 7))
    return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits))


def read_by_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by warnings PEFT says that it leaves weights out
        warnings.simplefilter("ignore", FutureWarning)  # PEFT about transformers
        return peft.PeftModel.from_pretrained(base, folder).eval()


def moved(model: nn.Module, config: osora.OsoraConfig | osora.SorsaConfig | None = None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        osora.attach(
            model, config or OsoraConfig(r=4, tol=1e-4, rank_pattern={r".*layers?\.1\..*|.*layers\.0\.mlp.*": 3})
        )
    return move_adapter(model, 0.1 if config is None else 0.03)


def assert_equal_in_peft(model: nn.Module, base: nn.Module, folder: Path) -> nn.Module:
    wish, without = outputs(model), outputs(base)
    assert (wish - without).abs().max() > 5e-3  # the adapter does something
    there = read_by_peft(base, folder)
    torch.testing.assert_close(outputs(there), wish, rtol=0, atol=1e-5)
    return there


@pytest.mark.parametrize("kind", EXPERTS)
def test_dense_layers_beside_experts_are_found(kind, tmp_path):
    """PEFT 0.21 takes gate_proj, up_proj and down_proj of these kinds for experts', and drops the dense ones."""
    model = moved(of_kind(kind))
    osora.export_lora(model, tmp_path, equal_ranks=False)
    there = assert_equal_in_peft(model, of_kind(kind), tmp_path)
    adapted = {name for name, module in there.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(osora.adapted_layers(model))
    with torch.no_grad():
        torch.testing.assert_close(outputs(there.merge_and_unload()), outputs(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("method", [OsoraConfig, SorsaConfig])
@pytest.mark.parametrize("way", ["folder", "folder and base", "base known by name"])
def test_folders_of_such_models(kind, method, way, tmp_path):
    model = of_kind(kind)
    model.save_pretrained(tmp_path / "base")
    if way == "base known by name":
        model.config._name_or_path = str(tmp_path / "base")
        model.name_or_path = str(tmp_path / "base")
    moved(model, method(r=4, tol=1e-4))
    osora.save_adapter(model, tmp_path / "adapter", save_basis=way != "folder and base")
    base = tmp_path / "base" if way == "folder and base" else None
    osora.export_lora(tmp_path / "adapter", tmp_path / "lora", base, equal_ranks=True)
    assert_equal_in_peft(model, of_kind(kind), tmp_path / "lora")


def test_one_dense_layer_alone(tmp_path):
    """No module is a target then, and of the layers with this name one is meant."""
    config = OsoraConfig(r=4, target_modules=["layers.2.mlp.shared_experts.up_proj"])
    model = moved(of_kind("deepseek_v3"), config)
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.normal_(std=1.0)
    osora.export_lora(model, tmp_path)
    there = read_by_peft(of_kind("deepseek_v3"), tmp_path)
    torch.testing.assert_close(outputs(there), outputs(model), rtol=0, atol=1e-5)
    adapted = [name for name, module in there.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["model.layers.2.mlp.shared_experts.up_proj"]


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1", "falcon_mamba"])
def test_layers_that_peft_refuses_are_refused_by_name(kind, tmp_path):
    options = {"state_size": 4} if "mamba" in kind else {}
    if kind == "falcon_h1":
        options |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    model = of_kind(kind, **options)
    out = next(name for name, module in model.named_modules() if name.endswith("out_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        osora.attach(model, OsoraConfig(r=4, target_modules=["in_proj", "out_proj"]))
    with pytest.raises(ValueError, match=rf"PEFT refuses a LoRA on out_proj.* of a {kind}.*{re.escape(out)}"):
        osora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("everything", [True, False], ids=["everything", "without the head"])
@pytest.mark.parametrize(("family", "head"), CLASSIFIERS)
def test_a_classifiers_lora_brings_its_head(family, head, everything, tmp_path):
    """PEFT's classes for these tasks take the head from the file: on a base with another fresh head too."""
    model = classifier(family, head)
    queries = {"Llama": "q_proj", "GPT2": "c_attn"}.get(family, "query")
    options = {} if everything else {"target_modules": [queries]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        osora.attach(model, OsoraConfig(r=2, tol=1e-4, **options))
    move_adapter(model, 0.3)
    osora.export_lora(model, tmp_path)
    wish, base = outputs(model, 1), classifier(family, head)
    names = {name for name, _ in base.named_modules() if name in ("score", "classifier", "qa_outputs")}
    torch.manual_seed(5)
    for name in names:
        for parameter in base.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    there = read_by_peft(base, tmp_path)
    torch.testing.assert_close(outputs(there, 1), wish, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == sorted(names)
    lora = {key for key in load_file(tmp_path / "adapter_model.safetensors") if ".lora_" in key}
    assert lora and not any(f".{name}." in key for key in lora for name in names)


def test_a_classifier_of_which_the_head_alone_is_adapted(tmp_path):
    model = osora.attach(classifier("Bert", HEADS[1]), OsoraConfig(r=2, target_modules=["classifier"]))
    with pytest.raises(ValueError, match="every adapted layer is within classifier"):
        osora.export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("with_base", [False, True])
def test_a_classifiers_folder(with_base, tmp_path):
    """A folder has no head: PEFT's general class reads it, with the base's own."""
    classifier("Bert", HEADS[0]).save_pretrained(tmp_path / "base")
    model = moved(classifier("Bert", HEADS[0]), OsoraConfig(r=2, tol=1e-4, exclude_modules=["classifier"]))
    osora.save_adapter(model, tmp_path / "adapter")
    osora.export_lora(tmp_path / "adapter", tmp_path / "lora", tmp_path / "base" if with_base else None)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["task_type"] is None
    there = read_by_peft(classifier("Bert", HEADS[0]), tmp_path / "lora")
    torch.testing.assert_close(outputs(there), outputs(model), rtol=0, atol=1e-5)


class Routed(nn.Module):
    """Experts in one tensor, and names of which one is another's end: PEFT has no expression for a model like this."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)})
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["up_proj"](self.inner["q"](self.q(x)))


def test_layers_that_would_get_a_lora_too_are_named(tmp_path):
    model = osora.attach(Routed(), OsoraConfig(r=2, target_modules="q|inner.up_proj"))
    with pytest.raises(ValueError, match=r"PEFT would also put a LoRA into inner\.q, whose names end as"):
        osora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    osora.detach(model)
    osora.attach(model, OsoraConfig(r=2, target_modules=["q", "up_proj"]))
    osora.export_lora(model, tmp_path / "lora")


def test_weights_that_are_stored_turned_are_no_parameters_of_peft(tmp_path):
    """PEFT takes a parameter for [out, in]."""
    model = Routed()
    model.inner["c"] = transformers.pytorch_utils.Conv1D(8, 8)
    osora.attach(model, OsoraConfig(r=2, target_modules=["c", "up_proj"]))
    with pytest.raises(
        ValueError, match=r"PEFT reads a LoRA on inner\.up_proj\.weight for weights stored as \[out, in\]"
    ):
        osora.export_lora(model, tmp_path / "lora")
