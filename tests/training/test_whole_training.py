# SPDX-License-Identifier: Apache-2.0
"""Modules trained whole under Trainer, accelerate and ``osora train``, and what the command line makes of them."""

import json
from pathlib import Path

import pytest
import torch
from commands import osora_json, osora_says
from helpers import logits, tiny_llama, token_ids
from safetensors.torch import load_file
from torch import nn
from training_stacks import base, losses, rows, settings, tokenizer

import osora

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate")

from osora.trainer import Trainer  # noqa: E402

CONFIGS = {"osora": osora.OsoraConfig, "sorsa": osora.SorsaConfig}
every_method = pytest.mark.parametrize("method", CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
NORM = "model.norm"


def adapted(method: str) -> nn.Module:
    return osora.attach(base(), CONFIGS[method](r=4, modules_to_save=[NORM]))


def trained(folder: Path, model: nn.Module, **options) -> Trainer:
    args = settings(transformers.TrainingArguments, folder, **({"gradient_accumulation_steps": 2} | options))
    return Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))


@every_method
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bf16"])
def test_trainer_resumes_to_the_bit(method, options, tmp_path):
    whole = trained(tmp_path, adapted(method), **options)
    whole.train()
    weight = whole.accelerator.unwrap_model(whole.model).model.norm
    assert not torch.equal(weight.copy_of("default").weight, weight.base_layer.weight)
    resumed = trained(tmp_path / "other", adapted(method), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for one, other in zip(*(osora.adapter_parameters(each.model) for each in (whole, resumed)), strict=True):
        assert torch.equal(one, other)
    stored = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{NORM}.weight"], weight.copy_of("default").weight)


@every_method
def test_accelerates_own_states(method, tmp_path):
    """Every tensor is in the state, and comes back: copies own their memory."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted(method)
    optimizer = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ids = token_ids()
    accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
    optimizer.step()
    wish = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.add_(1)
    accelerator.load_state(tmp_path)
    got = model.state_dict()
    assert got.keys() == wish.keys() and all(torch.equal(got[name], wish[name]) for name in wish)
    assert f"{NORM}.copy@default.weight" in wish
    accelerator.free_memory()


def test_the_command_line(tmp_path, monkeypatch):
    """Trained by a file of settings; told, verified, merged and exported."""
    for package in ("yaml", "huggingface_hub", "typer", "peft"):
        pytest.importorskip(package)
    import peft

    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tokenizer().save_pretrained("base")
    Path("data.jsonl").write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(3, 9)))
    run = {"model": "base", "data": "data.jsonl", "output": "run", "rank": 3, "steps": 4, "device": "cpu", "lr": 0.05}
    Path("run.json").write_text(json.dumps(run | {"adapter": {"modules_to_save": [NORM]}}))
    report = osora_json("train", "run.json")
    assert report["trainable"] == osora.adapter_info("run/adapter").trainable
    assert f"{NORM} (32)" in osora_says("info", "run/adapter")
    assert osora_json("info", "run/adapter")["whole"] == [{"name": NORM, "numbers": 32}]
    assert f"{NORM} (32)" in Path("run/adapter/README.md").read_text()
    assert osora_json("verify", "run/adapter", "base")["ok"]
    merged = osora_json("merge", "run/adapter", "base", "merged")
    assert f"{NORM}.weight" in merged["merged"] and merged["added"] == []
    osora_json("export-lora", "run/adapter", "lora")
    model, ids = osora.load_adapter(tiny_llama().eval(), "run/adapter"), token_ids()
    wish = logits(model, ids)
    kind = transformers.AutoModelForCausalLM
    torch.testing.assert_close(logits(kind.from_pretrained("merged").eval(), ids), wish, rtol=0, atol=1e-5)
    lora = peft.PeftModel.from_pretrained(kind.from_pretrained("base").eval(), "lora")
    torch.testing.assert_close(logits(lora, ids), wish, rtol=0, atol=1e-5)
    Path("next.json").write_text(json.dumps(run | {"output": "more", "start": "run/adapter"}))
    osora_json("train", "next.json")
    assert osora.adapter_info("more/adapter").config.modules_to_save == (NORM,)
    key = f"base_model.model.{NORM}.weight"
    first, second = (load_file(f"{each}/adapter/adapter_model.safetensors")[key] for each in ("run", "more"))
    assert not torch.equal(first, second)
