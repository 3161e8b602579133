# SPDX-License-Identifier: Apache-2.0
"""Trainer and TRL with osora's methods in PEFT: two lines change in a script, the import and the configuration."""

import pytest
import torch
from helpers import logits, token_ids
from torch import nn
from training_stacks import assert_small, base, losses, rows, settings, tokenizer

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import osora.peft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, datasets and PEFT, which are many

CONFIGS = {
    "osora": lambda: osora.peft.OsoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "sorsa": lambda: osora.peft.SorsaConfig(r=4, gamma=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
}
every_method = pytest.mark.parametrize("method", CONFIGS)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(resumed, whole, folder) -> None:
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    ours, theirs = values(resumed.model), values(whole.model)
    assert ours.keys() == theirs.keys() and ours and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(value.abs().max() > 0 for value in ours.values())
    assert_small(folder)
    fresh, ids = peft.PeftModel.from_pretrained(base(), folder).eval(), token_ids()
    assert torch.equal(logits(fresh, ids), logits(whole.model.eval(), ids))
    # the native API reads the same folder
    native = osora.load_adapter(base(), folder).eval()
    torch.testing.assert_close(logits(native, ids), logits(fresh, ids), rtol=1e-5, atol=1e-5)
    with whole.model.disable_adapter():
        assert torch.equal(logits(whole.model, ids), logits(base().eval(), ids))


@every_method
def test_trainer(method, tmp_path):
    def trainer(folder):
        model = peft.get_peft_model(base(), CONFIGS[method]())
        args = settings(transformers.TrainingArguments, folder, gradient_accumulation_steps=2)
        return transformers.Trainer(model=model, args=args, train_dataset=rows())

    whole, resumed = trainer(tmp_path), trainer(tmp_path / "other")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole, tmp_path / "checkpoint-6")


@every_method
def test_sft(method, tmp_path):
    """With packing and gradient checkpointing."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    text = [" ".join(f"w{3 + (7 * i + j) % 90}" for j in range(4 + i % 5)) for i in range(16)]
    data = datasets.Dataset.from_dict({"text": text})

    def trainer(folder):
        options = {"max_length": 24, "bf16": False, "packing": True, "gradient_checkpointing": True}
        return trl.SFTTrainer(
            model=base(),
            args=settings(trl.SFTConfig, folder, **options),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=CONFIGS[method](),
        )

    whole, resumed = trainer(tmp_path), trainer(tmp_path / "other")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole, tmp_path / "checkpoint-6")


@every_method
def test_dpo_with_the_adapter_off_as_its_reference(method, tmp_path):
    """Before the first step the policy is the reference, so that the loss is ln 2."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_dict(
        {
            "prompt": [f"w{3 + i} w{20 + i}" for i in range(8)],
            "chosen": [f" w{40 + i} w{41 + i}" for i in range(8)],
            "rejected": [f" w{60 + i} w{61 + i} w{62 + i}" for i in range(8)],
        }
    )

    def trainer(folder):
        args = settings(trl.DPOConfig, folder, bf16=False, gradient_checkpointing=False)
        return trl.DPOTrainer(
            model=base(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=CONFIGS[method](),
        )

    whole, resumed = trainer(tmp_path), trainer(tmp_path / "other")
    whole.train()
    assert whole.ref_model is None and losses(whole)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(whole)[-1] < losses(whole)[0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole, tmp_path / "checkpoint-6")
