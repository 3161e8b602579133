# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with the native API: supervised, with packing and gradient checkpointing, and DPO."""

import pytest
import torch
from helpers import logits, token_ids
from torch import nn
from training_stacks import assert_small, base, losses, settings, tokenizer

import osora

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from osora.trainer import AdapterTraining  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and of datasets, which are many

CONFIGS = {"osora": osora.OsoraConfig(r=4), "sorsa": osora.SorsaConfig(r=4, gamma=0.1)}


class SFTTrainer(AdapterTraining, trl.SFTTrainer):
    pass


class DPOTrainer(AdapterTraining, trl.DPOTrainer):
    pass


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in osora.adapter_parameters(model)]


def assert_same(resumed, whole, folder) -> None:
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    assert all(torch.equal(a, b) for a, b in zip(values(resumed.model), values(whole.model), strict=True))
    assert_small(folder)
    fresh, ids = osora.load_adapter(base(), folder).eval(), token_ids()
    plain = whole.accelerator.unwrap_model(whole.model, keep_fp32_wrapper=False).eval()
    assert torch.equal(logits(fresh, ids), logits(plain, ids))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"gradient_checkpointing": False, "packing": True, "bf16": True}],
    ids=["checkpointing", "packing"],
)
def test_sft(method, options, tmp_path):
    text = [" ".join(f"w{3 + (7 * i + j) % 90}" for j in range(4 + i % 5)) for i in range(16)]
    data = datasets.Dataset.from_dict({"text": text})

    def trainer(folder):
        args = settings(trl.SFTConfig, folder, **({"max_length": 24, "bf16": False} | options))
        model = osora.attach(base(), CONFIGS[method])
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())

    whole = trainer(tmp_path)
    whole.train()
    assert any(v.abs().max() > 0 for v in values(whole.model))
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole, tmp_path / "checkpoint-6")


@pytest.mark.parametrize("method", CONFIGS)
def test_dpo_with_the_base_as_its_reference(method, tmp_path):
    """On the same weights. Before the first step the policy is the reference, so that the loss is ln 2."""
    data = datasets.Dataset.from_dict(
        {
            "prompt": [f"w{3 + i} w{20 + i}" for i in range(8)],
            "chosen": [f" w{40 + i} w{41 + i}" for i in range(8)],
            "rejected": [f" w{60 + i} w{61 + i} w{62 + i}" for i in range(8)],
        }
    )

    def trainer(folder):
        model = osora.attach(base(), CONFIGS[method])
        reference = osora.share_base(model)
        own, theirs = (
            {n.replace("base_layer.", ""): p.data_ptr() for n, p in m.named_parameters()} for m in (model, reference)
        )
        assert all(own[name] == address for name, address in theirs.items())
        args = settings(trl.DPOConfig, folder, bf16=False, gradient_checkpointing=False)
        return DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer())

    whole = trainer(tmp_path)
    whole.train()
    assert losses(whole)[0] == pytest.approx(0.6931, abs=1e-3) and losses(whole)[-1] < losses(whole)[0]
    with torch.no_grad():
        ids = token_ids()
        assert torch.equal(whole.ref_model.eval()(ids).logits, base().eval()(ids).logits)
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole, tmp_path / "checkpoint-6")
