# SPDX-License-Identifier: Apache-2.0
"""The training itself: transformers' Trainer, whose checkpoints are adapters, on token ids with a loss on the answers.

The optimiser is AdamW on :func:`osora.parameter_groups`. Everything that Trainer would ask the surroundings is fixed.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import osora
from osora.finetuning.data import Example
from osora.finetuning.listener import Listener, Request, Stopped, heeding_sigterm
from osora.finetuning.settings import TrainSettings
from osora.trainer import Trainer

IGNORED = -100  # a label that has no loss
_SCHEDULES = {"constant": "constant_with_warmup"}  # by another name in transformers; "constant" leaves out the warm-up


class Told(TrainerCallback):
    """Passes steps and losses on, and stops a run that is asked to, or whose loss is no number."""

    def __init__(self, listener: Listener, request: Request) -> None:
        self.listener, self.request = listener, request

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the listener; with a checkpoint, stop if asked to."""
        self.listener.step(state.global_step, state.max_steps)
        if self.request.made:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Tell the listener each loss; stop where one is no finite number."""
        for name, title in (("loss", "loss"), ("eval_loss", "evaluation loss")):
            value = (logs or {}).get(name)
            if value is None:
                continue
            if not math.isfinite(value):
                raise ValueError(f"the {title} is {value} at step {state.global_step}: try a smaller lr")
            self.listener.say(f"step {state.global_step} of {state.max_steps}   {title} {value:.4f}")


class Items(torch.utils.data.Dataset):
    """Examples as the token ids and labels of a causal language model, which shifts them itself."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Of any length; :func:`collate` pads them."""
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        return {
            "input_ids": example.prompt + example.answer,
            "labels": [IGNORED] * len(example.prompt) + example.answer,
        }


def collate(items: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded on the right to the longest: [rows, longest] each. The padding is masked, so its id does not matter."""
    longest = max(len(item["input_ids"]) for item in items)

    def padded(rows: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (longest - len(row)) for row in rows], device="cpu")

    ids = [item["input_ids"] for item in items]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded([item["labels"] for item in items], IGNORED),
    }


class AnswerTrainer(Trainer):
    """osora's Trainer, whose evaluation is the mean over all tokens of the answers and draws no random number.

    transformers' own is a mean of the batches' means, in which the tokens of short answers count more.
    """

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on ``eval_data``, logged."""
        data: Any = self.eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [[data[i] for i in range(start, min(start + size, len(data)))] for start in range(0, len(data), size)]
        model, total, tokens = self.model, 0.0, 0
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                for items in batches:
                    batch = {name: tensor.to(self.args.device) for name, tensor in collate(items).items()}
                    count = int((batch["labels"][:, 1:] != IGNORED).sum())
                    total += float(model(**batch, use_cache=False).loss) * count
                    tokens += count
        finally:
            model.train(training)
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _arguments(settings: TrainSettings, folder: Path, cpu: bool, resumed: bool) -> TrainingArguments:
    evaluated = settings.eval_data is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=cpu,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=1.0 if settings.epochs is None else settings.epochs,
        max_steps=-1 if settings.steps is None else settings.steps,
        learning_rate=settings.rates["lr"],  # for the log; the optimiser is given
        lr_scheduler_type=_SCHEDULES.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        eval_strategy="steps" if evaluated and settings.eval_steps else "no",
        eval_steps=settings.eval_steps if evaluated else None,
        eval_on_start=evaluated and not resumed,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else the model would be split over all cards by nn.DataParallel
    return arguments


def train(
    model: nn.Module,
    settings: TrainSettings,
    examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
    folder: Path,
    resume_from: Path | None,
    listener: Listener,
) -> Any:
    """Train the model's active adapter.

    Args:
        model: adapted, on its device.
        settings: of the run.
        examples: to train on.
        eval_examples: to evaluate on before and after it, or None.
        folder: for the checkpoints.
        resume_from: the checkpoint to go on from, or None.
        listener: is told of steps and losses.

    Returns:
        The state of transformers' Trainer: ``log_history``, ``global_step``, ``epoch``.

    Raises:
        ValueError: a loss that is no number.
        Stopped: by SIGTERM, after a checkpoint.
    """
    cpu = next(model.parameters()).device.type == "cpu"
    if settings.gradient_checkpointing:
        enable: Any = getattr(model, "activation_checkpointing_enable", None)  # its name before: gradient_…
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with heeding_sigterm() as request:
        trainer = AnswerTrainer(
            model=model,
            args=_arguments(settings, folder, cpu, resume_from is not None),
            train_dataset=Items(examples),
            eval_dataset=None if eval_examples is None else Items(eval_examples),
            data_collator=collate,
            optimizers=(torch.optim.AdamW(osora.parameter_groups(model, **settings.rates)), None),
            callbacks=[Told(listener, request)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.save_basis = settings.save_basis
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    if request.made and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(
            f"stopped by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, with a "
            f"checkpoint in {folder}: the run goes on with --resume"
        )
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if eval_examples is not None and evaluations[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    return trainer.state
