# SPDX-License-Identifier: Apache-2.0
"""Adapters under transformers' ``Trainer`` and its descendants, such as TRL's (docs/train.md, docs/resume.md).

A model with an adapter trains under any of them. What they would get wrong is what is saved: the whole model, with the
frozen weights, which nothing loads. :class:`AdapterTraining` makes checkpoints that are adapters.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer as _Trainer
from transformers.utils import logging

from osora.files.adapter import save_adapter
from osora.files.resume import restore_adapter
from osora.model.parameters import adapter_parameters
from osora.model.state import has_adapter

log = logging.get_logger("osora")


class AdapterTraining:
    """For a trainer's class, before transformers' own: its checkpoints, and what ``save_model`` writes, are adapters.

    ``class AdapterSFTTrainer(AdapterTraining, SFTTrainer): ...``; :class:`Trainer` is that of transformers. With a
    model that has an adapter (:func:`osora.attach`) what is saved is the active one, with its basis unless
    ``save_basis`` is set to False on the class or the trainer. With another model nothing changes.
    """

    save_basis: bool = True
    model: Any
    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("model", args[0] if args else None)
        with _as_trainable(given):
            super().__init__(*args, **kwargs)

    def _adapted(self) -> nn.Module | None:
        """The model as it was given, if it has an adapter."""
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        return model if has_adapter(model) else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        save_adapter(model, folder, save_basis=self.save_basis)
        processor = getattr(self, "processing_class", None)
        if processor is None:
            processor = getattr(getattr(self, "data_collator", None), "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            restore_adapter(adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        state = self.state  # type: ignore[attr-defined]
        log.info(f"Loading the best adapter, {state.best_model_checkpoint} (score: {state.best_metric}).")
        restore_adapter(adapted, state.best_model_checkpoint)


class Trainer(AdapterTraining, _Trainer):
    """``transformers.Trainer`` whose checkpoints are adapters; see :class:`AdapterTraining`."""


@contextmanager
def _as_trainable(model: Any) -> Iterator[None]:
    """Let a trainer take a quantised model: it knows of PEFT's adapters alone, and rounds what it trains to bfloat16.

    Of 16-bit parameters small steps are lost, so they are made float32 again.
    """
    if not (isinstance(model, nn.Module) and has_adapter(model) and getattr(model, "is_quantized", False)):
        yield
        return
    before = [(parameter, parameter.detach().clone()) for parameter in adapter_parameters(model)]
    model.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.is_quantized = True  # type: ignore[assignment]
        for parameter, values in before:
            if parameter.dtype != values.dtype:
                parameter.data = values


__all__ = ["AdapterTraining", "Trainer"]
