# SPDX-License-Identifier: Apache-2.0
"""An adapter as an ordinary LoRA of PEFT, which needs no osora: B = D and A = Vᵀ, since ΔW = D Vᵀ (docs/export.md)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from osora.files.adapter import load_adapter
from osora.files.base_folder import BaseFolder
from osora.files.format import holds_adapter, write_adapter
from osora.files.info import adapter_info, stored_changes
from osora.layers.base_weight import is_conv1d
from osora.model.state import adapted_layers, state_of
from osora.model.targets import base_modules

# Endings of transformers' class names, and what PEFT calls their tasks.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Source:
    """What is exported: each module's ``ΔW = left rightᵀ``, factors [d, q] and [k, q], and its base."""

    factors: Factors
    conv1d: bool
    """Whether layers store their weight as [in, out]."""
    base_name: str | None
    task: str | None
    others: tuple[str, ...] = ()
    """Names of the model's other modules, as far as they are known."""


def _task(architecture: str | None) -> str | None:
    return next((task for end, task in _TASKS.items() if (architecture or "").endswith(end)), None)


def _from_model(model: nn.Module, name: str | None) -> _Source:
    adapter = state_of(model).active if name is None else name
    state_of(model).of(adapter)
    layers = adapted_layers(model, adapter)
    names_of: dict[int, list[str]] = {}
    for module_name, module in base_modules(model):
        names_of.setdefault(id(module), []).append(module_name)
    for module_name, layer in layers.items():
        if len(names := names_of[id(layer.base_layer)]) > 1:
            raise ValueError(
                f"{module_name} is one module with the names {', '.join(names)}; PEFT puts a LoRA under the first of "
                "them alone, and the others would lose the adapter: merge it instead"
            )
    bases = {id(layer.base_layer) for layer in layers.values()}
    return _Source(
        {module_name: layer.delta_factors(adapter) for module_name, layer in layers.items()},
        any(is_conv1d(layer.base_layer) for layer in layers.values()),
        getattr(model, "name_or_path", None) or None,
        _task(type(model).__name__),
        tuple(module_name for module_name, module in base_modules(model) if id(module) not in bases),
    )


def _from_folder(folder: Path, base: str | os.PathLike[str] | None) -> _Source:
    info = adapter_info(folder)
    if base is None:
        return _Source(stored_changes(folder), False, info.base_model, info.task)
    checkpoint = BaseFolder(base)
    places = checkpoint.places(info)
    model = load_adapter(checkpoint.stand_in(places), folder)
    architectures = checkpoint.config.get("architectures")
    return _Source(
        {name: layer.delta_factors(state_of(model).active) for name, layer in adapted_layers(model).items()},
        any(place.transposed for place in places.values()),
        info.base_model or str(base),
        info.task or _task(architectures[0] if isinstance(architectures, list) and architectures else None),
    )


def _patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Anchored: PEFT takes them for regular expressions of a name's end."""
    return {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}


def _targets(names: list[str], others: tuple[str, ...]) -> list[str] | str:
    """The modules by their whole names, or an expression where PEFT would take such a name for another's end."""
    ends = tuple(f".{name}" for name in names)
    if any("." not in name for name in names) or any(f".{name}".endswith(ends) for name in others):
        return "|".join(re.escape(name) for name in names)
    return sorted(names)


def _config(source: _Source, ranks: dict[str, int]) -> dict[str, Any]:
    usual = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": source.task,
        "base_model_name_or_path": source.base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # over r it is the scale of B A: one
        "rank_pattern": _patterns(ranks, usual),
        "alpha_pattern": _patterns(ranks, usual),
        "target_modules": _targets(list(ranks), source.others),
        "lora_dropout": 0.0,
        "fan_in_fan_out": source.conv1d,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def export_lora(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    equal_ranks: bool = False,
) -> None:
    """Write an adapter as a LoRA that PEFT, and whatever loads PEFT's LoRAs, reads without osora.

    A layer's LoRA has the adapter's rank (SORSA: twice that), a scale of exactly 1, and gives the adapter's weight
    change up to the rounding of float32 (float64 for a float64 base); there is no decomposition in it.

    Args:
        source: a model with an adapter, or the folder of a saved one.
        path: the folder to write, which is made if need be.
        base: for a folder that was saved without its basis: the folder of the base's checkpoint, from which the basis
            is computed again. Where it is given for another one, the base is checked, and nothing else changes.
        name: which of a model's adapters; None for the active one.
        equal_ranks: fill layers of smaller rank with zeros up to the largest, for programs that know no
            ``rank_pattern``. The file grows.

    Raises:
        FileNotFoundError: no adapter, or no base, in the folder.
        AdapterError: a damaged adapter, another base, or no basis in the file and no base given.
        ValueError: the model has no such adapter; a layer that the model has under two names, of which PEFT would adapt
            one; NaN or infinite values; ``base`` or ``name`` where it has no meaning; ``path`` holds an adapter of
            osora's, be it this one; a model with PEFT around it, of which the saved folder is to be given.
        OSError: the folder cannot be written.
    """
    if holds_adapter(Path(path)):
        raise ValueError(f"{os.fspath(path)} holds an adapter, which a LoRA of the same file names would replace")
    if isinstance(source, nn.Module):
        if base is not None:
            raise ValueError("base is for the folder of a saved adapter: a model has its base")
        if getattr(source, "peft_config", None):
            raise ValueError(
                "the model has its adapters by PEFT: save one with model.save_pretrained(folder), and then call "
                "osora.export_lora(folder, path)"
            )
        found = _from_model(source, name)
    else:
        if name is not None:
            raise ValueError("name is for a model: the folder of a saved adapter holds one adapter")
        found = _from_folder(Path(source), base)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    most = max(left.shape[1] for left, _ in found.factors.values())
    for module, (left, right) in found.factors.items():
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"{module} has NaN or infinite values; nothing is exported")
        if equal_ranks:
            left, right = (nn.functional.pad(t, (0, most - t.shape[1])) for t in (left, right))
        ranks[module] = left.shape[1]
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.to(left.dtype).t().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.cpu().contiguous()
    write_adapter(Path(path), tensors, _config(found, ranks))
