# SPDX-License-Identifier: Apache-2.0
"""Going on from a saved adapter: its values into the parameters that an optimiser holds (docs/resume.md)."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osora.files.adapter import save_adapter
from osora.files.load import load_adapter
from osora.model.adapters import active_adapter, remove_adapter
from osora.model.state import adapted_layers, has_adapter, refuse_sharded, trained_whole

_RESTORED = "restored from a checkpoint"


def restore_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a saved adapter's values into the model's active adapter: the same parameters, which an optimiser may have.

    All of :func:`osora.load_adapter`'s checks are made: of the files, of the base weights, and that the adapter was
    trained in the basis which the model has.

    Args:
        model: a model with an adapter, not merged.
        folder: what :func:`osora.save_adapter` or a trainer's checkpoint wrote.

    Returns:
        ``model`` itself. If anything is wrong, it is as it was.

    Raises:
        ValueError: no adapter, or merged; the saved one is for other layers, of other ranks, or of another method.
        AdapterError, FileNotFoundError: as for :func:`osora.load_adapter`.
    """
    name = active_adapter(model)
    before = adapted_layers(model)
    refuse_sharded({**before, **trained_whole(model, name)}, "restored")
    load_adapter(model, folder, name=_RESTORED)
    try:
        saved = adapted_layers(model, _RESTORED)
        if saved.keys() != before.keys():
            other = sorted(saved.keys() ^ before.keys())
            raise ValueError(
                f"{os.fspath(folder)} is an adapter of other layers than the model's {name!r}: {len(other)} differ, "
                f"the first is {other[0]}"
            )
        for module, layer in before.items():
            formulas = [layer.formula(which) for which in (name, _RESTORED)]
            if formulas[0] != formulas[1]:
                raise ValueError(
                    f"{os.fspath(folder)} was trained as {formulas[1]}, and the model's adapter {name!r} is "
                    f"{formulas[0]}: attach one with the saved adapter's config"
                )
            shapes = [[p.shape for p in layer.deltas(which)] for which in (name, _RESTORED)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{os.fspath(folder)}: {module} has {shapes[1]}, the model's adapter {shapes[0]}")
        whole, saved_whole = (trained_whole(model, which) for which in (name, _RESTORED))
        if other := sorted(saved_whole.keys() ^ whole.keys()):
            raise ValueError(
                f"{os.fspath(folder)} is an adapter that trains other modules whole than the model's {name!r}: "
                f"{', '.join(other)}"
            )
        with torch.no_grad():
            for each in whole.values():
                each.copy_of(name).load_state_dict(each.values(_RESTORED))
            for layer in before.values():
                for parameter, value in zip(layer.deltas(name), layer.deltas(_RESTORED), strict=True):
                    parameter.copy_(value)
    finally:
        remove_adapter(model, _RESTORED)
    return model


def checkpoint_adapters(accelerator: Any, *, save_basis: bool = True) -> None:
    """Have accelerate's ``save_state`` write adapters, and ``load_state`` restore them.

    Left alone, accelerate writes each model whole, with the frozen weights. Of a model that has an adapter
    (:func:`osora.attach`) the active one is saved instead, by the main process, to ``adapter`` in the checkpoint's
    folder (``adapter_1`` for the second model, and so on); ``load_state`` puts it back with :func:`restore_adapter`.
    Optimisers, schedulers, random states and models without an adapter are accelerate's own, as before.

    Args:
        accelerator: an ``accelerate.Accelerator``, before its first ``save_state`` or ``load_state``.
        save_basis: as for :func:`osora.save_adapter`.

    Raises:
        ValueError: from ``save_state`` under FSDP, DeepSpeed or Megatron, where accelerate hands no model over. What
            :func:`osora.save_adapter` and :func:`restore_adapter` raise comes from ``save_state`` and ``load_state``.
    """

    def adapted(models: list[nn.Module]) -> list[tuple[int, nn.Module, str]]:
        plain = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]
        found = [(i, model, f"adapter_{i}" if i else "adapter") for i, model in enumerate(plain) if has_adapter(model)]
        return found[::-1]  # last first, to take them out of a list

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        if len(weights) != len(models):
            raise ValueError(
                f"accelerate saves models by itself under {accelerator.distributed_type}: checkpoint_adapters is for "
                "one process or DDP"
            )
        for index, model, name in adapted(models):
            if accelerator.is_main_process:
                save_adapter(model, Path(folder, name), save_basis=save_basis)
            weights.pop(index)
        accelerator.wait_for_everyone()

    def load(models: list[nn.Module], folder: str) -> None:
        for index, model, name in adapted(models):
            restore_adapter(model, Path(folder, name))
            models.pop(index)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


__all__ = ["checkpoint_adapters", "restore_adapter"]
