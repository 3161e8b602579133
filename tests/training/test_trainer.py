# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with the native API: train, checkpoint, resume to the bit, load into another process's base."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, token_ids
from processes import on_processes, run_program
from torch import nn
from training_stacks import assert_small, base, losses, rows, settings, tokenizer

import osora

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from osora.trainer import AdapterTraining, Trainer  # noqa: E402

CONFIGS = {
    "osora": osora.OsoraConfig(r=4),
    "sorsa": osora.SorsaConfig(r=4, gamma=0.1),
}
every_method = pytest.mark.parametrize("method", CONFIGS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing. is deprecated:FutureWarning",  # a new name for it comes with transformers 6
)


def adapted(method: str = "osora", dropout: float = 0.1) -> nn.Module:
    from dataclasses import replace

    return osora.attach(base(), replace(CONFIGS[method], dropout=dropout))


def trainer(folder, model, data=None, **options):
    args = settings(transformers.TrainingArguments, folder, **({"gradient_accumulation_steps": 2} | options))
    return Trainer(model=model, args=args, train_dataset=data or rows(), eval_dataset=rows(4))


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in osora.adapter_parameters(model)]


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_method
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adamw_torch_fused", "weight_decay": 0.1}],
    ids=["float32", "bf16", "checkpointing", "fused"],
)
def test_train_resume_and_load(method, options, tmp_path):
    """Interrupted after three of six steps or not: the same bits, with dropout, accumulation and a penalty."""
    whole = trainer(tmp_path, adapted(method), **options)
    whole.train()
    assert len(losses(whole)) == 6 and any(v.abs().max() > 0 for v in values(whole.model))
    assert_small(tmp_path / "checkpoint-3")
    resumed = trainer(tmp_path / "other", adapted(method), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)  # those of the first three steps are in the checkpoint
    assert_equal(values(resumed.model), values(whole.model))

    fresh, ids = osora.load_adapter(base(), tmp_path / "checkpoint-6"), token_ids()
    assert_equal(values(fresh), values(whole.model))
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):  # accelerate has put it into the other one
        assert torch.equal(logits(fresh.eval(), ids).float(), logits(whole.model.eval(), ids))
    assert all(p.dtype == torch.float32 for p in osora.adapter_parameters(whole.model))
    plain = osora.detach(whole.accelerator.unwrap_model(whole.model, keep_fp32_wrapper=False))
    assert torch.equal(logits(plain, ids), logits(base().eval(), ids))


def test_it_learns(tmp_path):
    options = {"max_steps": 15, "learning_rate": 5e-2, "save_strategy": "no"}
    ours = trainer(tmp_path, adapted(dropout=0.0), rows(4), **options)
    ours.train()
    assert losses(ours)[-1] < losses(ours)[0] - 0.3


def test_the_best_adapter_is_loaded(tmp_path):
    """And the model evaluates as it did when that one was saved. The "best" is the worst here, that is the first."""
    ours = trainer(
        tmp_path,
        adapted(dropout=0.0),
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    ours.train()
    seen = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    assert max(seen) != seen[-1]  # else there would be nothing to load
    assert ours.evaluate()["eval_loss"] == pytest.approx(max(seen), rel=1e-6)


def test_save_model_writes_what_a_new_process_loads(tmp_path):
    """With the tokenizer, as Trainer does it."""
    model = move_adapter(adapted(dropout=0.0))
    args = settings(transformers.TrainingArguments, tmp_path)
    Trainer(model=model, args=args, train_dataset=rows(), processing_class=tokenizer()).save_model(tmp_path / "last")
    assert_small(tmp_path / "last")
    assert (tmp_path / "last/tokenizer.json").exists()
    ids = token_ids()
    torch.save(ids, tmp_path / "ids.pt")
    program = """
import sys, torch, osora
from training_stacks import base
model = osora.load_adapter(base(), sys.argv[1] + "/last").eval()
torch.save(model(torch.load(sys.argv[1] + "/ids.pt")).logits.detach(), sys.argv[1] + "/logits.pt")
"""
    run_program(tmp_path, program, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model.eval(), ids))


def test_without_a_basis_in_each_checkpoint(tmp_path):
    model = osora.attach(base(), osora.OsoraConfig(r=4, tol=1e-5))
    ours = trainer(tmp_path, model)
    ours.save_basis = False
    ours.train()
    size = (tmp_path / "checkpoint-6/adapter_model.safetensors").stat().st_size
    numbers = sum(p.numel() for p in osora.adapter_parameters(model))
    assert size < 4 * numbers * 1.5 + 200 * 3 * 14  # S0 beside o and s, and some 200 bytes of header a tensor
    again = osora.attach(base(), osora.OsoraConfig(r=4, tol=1e-5))
    resumed = trainer(tmp_path / "other", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(values(again), values(model))


def test_a_model_without_an_adapter_is_transformers_own_business(tmp_path):
    ours = trainer(tmp_path, base(), max_steps=2, save_steps=2)
    ours.train()
    assert (tmp_path / "checkpoint-2/model.safetensors").exists()
    trainer(tmp_path, base(), max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_does_not_fit_is_refused(tmp_path):
    """And leaves the model's adapter as it was."""
    other = {
        "other layers": osora.attach(base(), osora.OsoraConfig(r=4, target_modules=["q_proj"])),
        "ranks": osora.attach(base(), osora.OsoraConfig(r=3)),
    }
    model = move_adapter(adapted())
    want = values(model)
    for what, wrong in other.items():
        osora.save_adapter(wrong, tmp_path / what)
        with pytest.raises(ValueError, match=r"is an adapter of other layers|has .*the model's adapter"):
            osora.restore_adapter(model, tmp_path / what)
    changed = base()
    changed.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    osora.save_adapter(osora.attach(changed, osora.OsoraConfig(r=4)), tmp_path / "base")
    with pytest.raises(osora.AdapterError, match="not the one this adapter was trained on"):
        osora.restore_adapter(model, tmp_path / "base")
    assert_equal(values(model), want)
    assert osora.adapter_names(model) == ["default"]


@pytest.mark.parametrize(
    "config, saved",
    [
        (osora.OsoraConfig(r=4), osora.SorsaConfig(r=4)),
        (osora.SorsaConfig(r=4), osora.SorsaConfig(r=4, alpha=8)),
        (osora.OsoraConfig(r=4), osora.OsoraConfig(r=4, side="input")),
        (osora.OsoraConfig(r=4), osora.OsoraConfig(r=4, initial_o=0.5)),
    ],
    ids=["method", "alpha", "side", "initial_o"],
)
def test_restoring_another_method_is_refused(config, saved, tmp_path):
    """Square layers have the same shapes on either side; the function would be another one."""
    osora.save_adapter(osora.attach(base(), saved), tmp_path)
    model = osora.attach(base(), config)
    before = values(model)
    with pytest.raises(ValueError, match=r"was trained as .*, and the model's adapter 'default' is"):
        osora.restore_adapter(model, tmp_path)
    assert_equal(values(model), before)
    assert osora.adapter_names(model) == ["default"]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_model(kind, tmp_path):
    """Which transformers alone would refuse to train."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from helpers import tiny_llama

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "4bit" else {"load_in_8bit": True}
    config = transformers.BitsAndBytesConfig(**options)

    def model() -> nn.Module:
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        return osora.attach(found, osora.OsoraConfig(r=4))

    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model(), args=settings(transformers.TrainingArguments, tmp_path))
    whole = trainer(tmp_path, model(), eval_strategy="steps", eval_steps=2, eval_on_start=True)
    whole.train()
    assert whole.model.is_quantized
    assert_small(tmp_path / "checkpoint-3")
    resumed = trainer(tmp_path / "other", model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(values(resumed.model), values(whole.model))


def train_accelerate(rank: int, folder: str, precision: str) -> tuple[list, list]:
    """Two steps of two accumulated micro-batches on this process's rows; process 0 saves."""
    import os

    from accelerate import Accelerator, DistributedDataParallelKwargs

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # not used: the processes have found each other
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[kwargs], mixed_precision=precision
    )
    assert accelerator.num_processes == 2
    model = osora.attach(base(), CONFIGS["sorsa"])
    optimizer = torch.optim.SGD(osora.adapter_parameters(model), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    mine = torch.tensor([row["input_ids"] for row in rows(8)])[rank::2]
    for ids in mine:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=ids[None], labels=ids[None]).loss)
            optimizer.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        osora.save_adapter(accelerator.unwrap_model(prepared), folder)
    accelerator.wait_for_everyone()
    loaded = osora.load_adapter(base(), folder)
    return values(model), values(loaded)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_on_two_processes(precision, tmp_path):
    """Which end with the same adapter, that of one process with all rows (and one penalty a step)."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    (ours, loaded), (theirs, also) = on_processes(tmp_path, train_accelerate, str(tmp_path / "adapter"), precision)
    for others in (theirs, loaded, also):
        assert_equal(ours, others)
    if precision == "bf16":
        return
    model = osora.attach(base(), CONFIGS["sorsa"])
    optimizer = torch.optim.SGD(osora.adapter_parameters(model), lr=0.1)
    for ids in torch.tensor([row["input_ids"] for row in rows(8)]).split(4):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for got, want in zip(ours, values(model), strict=True):
        # sums in another order, float32; entries are of size 0.1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def on_two_processes(rank: int) -> None:
    """What torchrun would set."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # not used: the processes have found each other


def resume_accelerate(rank: int, folder: str, config: osora.OsoraConfig | osora.SorsaConfig, save_basis: bool) -> tuple:
    """Four steps of two accumulated micro-batches, whole, and from a checkpoint after two; the checkpoint's files."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    on_two_processes(rank)
    mine = torch.tensor([row["input_ids"] for row in rows(16)])[rank::2]

    def train(steps: slice, load: bool = False, save: bool = False) -> list[torch.Tensor]:
        torch.manual_seed(rank + 100 * load)
        kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[kwargs])
        osora.checkpoint_adapters(accelerator, save_basis=save_basis)
        model = osora.attach(base(), config)
        optimizer = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        other = torch.nn.Linear(2, 2)  # a model without an adapter is accelerate's own matter
        prepared, other, optimizer, schedule = accelerator.prepare(model, other, optimizer, schedule)
        if load:
            accelerator.load_state(folder)
        else:
            with torch.no_grad():
                other.module.bias.fill_(7.0)
        for ids in mine[steps]:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(input_ids=ids[None], labels=ids[None]).loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if save:
            accelerator.save_state(folder)
        assert float(other.module.bias[0]) == 7.0
        accelerator.free_memory()
        return values(model)

    whole, half = train(slice(0, 8)), train(slice(0, 4), save=True)
    names = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    return whole, half, train(slice(4, 8), load=True), names


@pytest.mark.parametrize("method", CONFIGS)
def test_accelerate_resumes_on_two_processes(method, tmp_path):
    """To the bit, dropout included, from a checkpoint that holds no frozen weight."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = dataclasses.replace(CONFIGS[method], dropout=0.2, tol=1e-4)
    folder, save_basis = tmp_path / "checkpoint", method == "osora"
    found = on_processes(tmp_path, resume_accelerate, str(folder), config, save_basis)
    saved = values(osora.load_adapter(base(), folder / "adapter"))
    for whole, half, resumed, names in found:
        assert_equal(half, saved)
        assert_equal(whole, resumed)
        assert_equal(whole, found[0][0])
        assert any(value.abs().max() > 0 for value in whole)
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= names
    assert (folder / "model.safetensors").stat().st_size < 1000, "the other model alone"


def test_accelerate_that_hands_over_no_model_is_refused():
    """As under FSDP, where the list of weights is empty."""

    class Accelerator:
        distributed_type = "FSDP"
        register_load_state_pre_hook = staticmethod(lambda hook: None)

        def register_save_state_pre_hook(self, hook):
            self.hook = hook

    accelerator = Accelerator()
    osora.checkpoint_adapters(accelerator)
    with pytest.raises(
        ValueError, match="saves models by itself under FSDP: checkpoint_adapters is for one process or"
    ):
        accelerator.hook([adapted()], [], "nowhere")


def resume_trainer(rank: int, folder: str, config: osora.OsoraConfig | osora.SorsaConfig) -> tuple[list, list]:
    """osora's Trainer, whole, and from its checkpoint."""
    on_two_processes(rank)

    def train(name: str, checkpoint: str | None) -> list[torch.Tensor]:
        options = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "ddp_broadcast_buffers": False}
        args = settings(transformers.TrainingArguments, Path(folder, name), max_steps=4, save_steps=2, **options)
        assert args.world_size == 2
        trainer = Trainer(model=osora.attach(base(), config), args=args, train_dataset=rows(16))
        trainer.train(resume_from_checkpoint=checkpoint)
        return values(trainer.accelerator.unwrap_model(trainer.model))

    whole = train("whole", None)
    return whole, train("resumed", f"{folder}/whole/checkpoint-2")


def test_trainer_resumes_on_two_processes(tmp_path):
    config = dataclasses.replace(CONFIGS["sorsa"], dropout=0.2)
    for whole, resumed in (found := on_processes(tmp_path, resume_trainer, str(tmp_path), config)):
        assert_equal(whole, resumed)
        assert_equal(whole, found[0][0])
        assert any(value.abs().max() > 0 for value in whole)
    assert_small(tmp_path / "whole/checkpoint-2")


def test_it_goes_before_any_trainer():
    assert issubclass(Trainer, AdapterTraining) and issubclass(Trainer, transformers.Trainer)
    assert Trainer.__mro__.index(AdapterTraining) < Trainer.__mro__.index(transformers.Trainer)
