# SPDX-License-Identifier: Apache-2.0
"""An adapter as an ordinary LoRA of PEFT, which needs no osora: B = D and A = Vᵀ, since ΔW = D Vᵀ (docs/export.md)."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from osora.files.base_folder import BaseFolder
from osora.files.format import holds_adapter, read_description, write_adapter
from osora.files.info import info_of_saved, stored_changes
from osora.files.load import load_layers
from osora.files.lora import Reader, heads_named_by, heads_of, model_options, saved_whole
from osora.files.tensors import read_adapter
from osora.layers.adapted import AdaptedLinear
from osora.layers.base_weight import dense_weight, is_conv1d
from osora.layers.whole_module import WholeModule
from osora.model.readers import read_in_kind, read_layers
from osora.model.state import adapted_layers, all_layers, refuse_sharded, state_of, trained_whole
from osora.model.targets import base_modules, uncompiled

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
    model: Reader
    whole: dict[str, Tensor] = field(default_factory=dict)
    """The tensors of modules that PEFT reads as trained whole, by their names in the model."""
    whole_ends: tuple[str, ...] = ()
    """What their names end in, for PEFT."""


def _task(architecture: str | None) -> str | None:
    return next((task for end, task in _TASKS.items() if (architecture or "").endswith(end)), None)


def _refuse_shared(model: nn.Module, layers: Mapping[str, AdaptedLinear | WholeModule]) -> None:
    names_of: dict[int, list[str]] = {}
    for module_name, module in base_modules(model):
        names_of.setdefault(id(module), []).append(module_name)
    for module_name, layer in layers.items():
        if len(names := names_of[id(layer.base_layer)]) > 1:
            raise ValueError(
                f"{module_name} is one module with the names {', '.join(names)}; PEFT puts a LoRA, or a module trained "
                "whole, under the first of them alone, and the others would lose the adapter: merge it instead"
            )


def _ends(task: str | None, names: list[str], whole: Iterable[str]) -> tuple[str, ...]:
    """What PEFT is told of modules that are whole in the file: those of the task, and the adapter's ``whole`` ones."""
    last = {name.rpartition(".")[2] for name in heads_of(task, names)}
    return tuple(sorted(last | {name for name in whole if not name.endswith(tuple(last))}))


def _whole_modules(
    model: nn.Module, heads: list[str], factors: Factors, trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors within ``heads`` with what the adapter has made of them: merged into it, or ``trained`` whole."""
    found: dict[str, Tensor] = {}
    for name, module in base_modules(model):
        own = any(name == head or name.startswith(f"{head}.") for head in heads)
        if not own or any(name.startswith(f"{adapted}.") for adapted in all_layers(model)):
            continue
        kept = {**module._parameters, **module._buffers}
        skipped = module._non_persistent_buffers_set
        found |= {f"{name}.{key}": t.detach() for key, t in kept.items() if t is not None and key not in skipped}
        if name in factors:
            left, right = factors[name]
            weight = dense_weight(module).detach()
            merged = (weight.to(left.dtype) + left @ right.to(left.dtype).t()).to(weight.dtype)
            found[f"{name}.weight"] = merged.t() if is_conv1d(module) else merged
    return found | {key: tensor.detach() for key, tensor in trained.items()}


def _from_model(model: nn.Module, name: str | None) -> _Source:
    state = state_of(model)
    adapter = state.active if name is None else name
    state.of(adapter)
    layers = adapted_layers(model, adapter)
    wholes = trained_whole(model, adapter)
    refuse_sharded({**layers, **wholes}, "exported")
    _refuse_shared(model, {**layers, **wholes})
    task = _task(type(model).__name__)
    names = list(dict.fromkeys(module_name for module_name, _ in base_modules(model)))
    ends = _ends(task, names, wholes)
    heads = saved_whole(ends, names)
    factors = {module_name: layer.delta_factors(adapter) for module_name, layer in layers.items()}
    trained = {f"{where}.{key}": t for where, each in wholes.items() for key, t in each.values(adapter).items()}
    whole = _whole_modules(model, heads, factors, trained)
    return _Source(
        {key: value for key, value in factors.items() if f"{key}.weight" not in whole},
        any(is_conv1d(layer.base_layer) for layer in layers.values()),
        getattr(model, "name_or_path", None) or None,
        task,
        Reader.of(names, model_options(model), heads, read_layers(uncompiled(model), factors, state.readers.names)),
        whole,
        ends,
    )


def _config_of(folder: str | None) -> dict[str, Any]:
    """``config.json`` of the base that an adapter names, if it is a folder that is here."""
    path = Path(folder or "") / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if folder and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}  # nobody asked to read it
    return found if isinstance(found, dict) else {}


def _read(folder: Path, options: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The layers that the model reads: as its adapter's file says, and by the model's kind, if that is known."""
    description = read_description(folder)
    library = str((description.options.get("auto_mapping") or {}).get("parent_library"))
    if (kind := re.match(r"transformers\.models\.(\w+)\.", library)) and not options.get("model_type"):
        options = {"model_type": kind[1]}
    return {*description.read, *read_in_kind(options, names)}


def _from_folder(folder: Path, base: str | os.PathLike[str] | None) -> _Source:
    saved = read_adapter(folder)
    info, trained = info_of_saved(folder, saved), saved.whole
    whole = {f"{where}.{key}": tensor for where, values in trained.items() for key, tensor in values.items()}
    if taken := saved_whole(trained, [module.name for module in info.modules]):
        raise ValueError(
            f"PEFT would take {taken[0]}, which is adapted, for a module trained whole, since its name ends as theirs "
            f"({', '.join(trained)}): load the adapter on its model, and give that to osora.export_lora"
        )
    ends = tuple(sorted(trained))
    if base is None:
        factors = stored_changes(folder, saved)
        task = None if heads_named_by(info.task) else info.task
        options = _config_of(info.base_model)
        reader = Reader.of(list(factors), options, ends, _read(folder, options, factors))
        return _Source(factors, False, info.base_model, task, reader, whole, ends)
    checkpoint = BaseFolder(base)
    places = checkpoint.places(info)
    model = load_layers(checkpoint.stand_in(places), saved)
    architectures = checkpoint.config.get("architectures")
    task = info.task or _task(architectures[0] if isinstance(architectures, list) and architectures else None)
    factors = {name: layer.delta_factors(state_of(model).active) for name, layer in adapted_layers(model).items()}
    return _Source(
        factors,
        any(place.transposed for place in places.values()),
        info.base_model or str(base),
        None if heads_named_by(task) else task,
        Reader.of(list(factors), checkpoint.config, ends, _read(folder, checkpoint.config, factors)),
        whole,
        ends,
    )


def _config(source: _Source, ranks: Mapping[str, int]) -> dict[str, Any]:
    usual = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": source.task,
        "base_model_name_or_path": source.base_name,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # for every layer: over its own rank it is the scale that its B is divided by
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual},
        "alpha_pattern": {},
        **source.model.targets(list(ranks)),
        "lora_dropout": 0.0,
        "fan_in_fan_out": source.conv1d,
        "bias": "none",
        "modules_to_save": list(source.whole_ends) or None,
        "use_rslora": False,
        "use_dora": False,
    }


def _refuse_meaningless(source: object, path: Path, base: object, name: str | None) -> None:
    if not isinstance(source, nn.Module | str | os.PathLike):
        raise TypeError(f"source must be a model or the folder of a saved adapter, got a {type(source).__name__}")
    if holds_adapter(path):
        raise ValueError(f"{path} holds an adapter, which a LoRA of the same file names would replace")
    if not isinstance(source, nn.Module):
        if name is not None:
            raise ValueError("name is for a model: the folder of a saved adapter holds one adapter")
        return
    if base is not None:
        raise ValueError("base is for the folder of a saved adapter: a model has its base")
    if getattr(source, "peft_config", None):
        raise ValueError(
            "the model has its adapters by PEFT: save one with model.save_pretrained(folder), and then call "
            "osora.export_lora(folder, path)"
        )


def _equalised(source: _Source, equal_ranks: bool | None) -> Factors:
    """The factors, filled with zeros where a reader needs the largest rank. Raises for values that are not finite."""
    for module, factors in source.factors.items():
        if not all(bool(each.isfinite().all()) for each in factors):
            raise ValueError(f"{module} has NaN or infinite values; nothing is exported")
    if not source.factors:
        raise ValueError(
            f"every adapted layer is within {', '.join(source.model.heads)}, which PEFT saves whole for this task, so "
            "that there is no LoRA to write: save the model with osora.merge instead"
        )
    ranks = {left.shape[1] for left, _ in source.factors.values()}
    found = dict(source.factors)
    for module, factors in source.factors.items():
        if equal_ranks or source.model.is_parameter(module):
            missing = max(ranks) - factors[0].shape[1]
            found[module] = (nn.functional.pad(factors[0], (0, missing)), nn.functional.pad(factors[1], (0, missing)))
    if len(ranks) > 1 and equal_ranks is None:
        warnings.warn(
            f"layers have ranks from {min(ranks)} to {max(ranks)}: PEFT and llama.cpp read this LoRA as it is, and "
            "programs that divide one lora_alpha by one r for all layers (vLLM, SGLang) read another change. For them "
            "export with equal_ranks=True; equal_ranks=False says that none of them is meant",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def export_lora(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    equal_ranks: bool | None = None,
) -> None:
    """Write an adapter as a LoRA that PEFT, and whatever loads PEFT's LoRAs, reads without osora.

    A layer's LoRA has the adapter's rank (SORSA: twice that) and gives the adapter's weight change up to the rounding
    of float32 (float64 for a float64 base); there is no decomposition in it. One ``lora_alpha`` serves all layers. What
    PEFT would find by the file is checked before it is written.

    Args:
        source: a model with an adapter, or the folder of a saved one.
        path: the folder to write, which is made if need be.
        base: for a folder that was saved without its basis: the folder of the base's checkpoint, from which the basis
            is computed again. Where it is given for another one, the base is checked, and nothing else changes.
        name: which of a model's adapters; None for the active one.
        equal_ranks: True fills layers of smaller rank with zeros up to the largest: the scale is then 1 under every
            rule, and the file grows. False leaves them, for PEFT and llama.cpp. None leaves them, with a warning where
            they differ.

    Raises:
        FileNotFoundError: no adapter, or no base, in the folder.
        AdapterError: a damaged adapter, another base, or no basis in the file and no base given.
        ValueError: the model has no such adapter; layers that PEFT would not find, that it refuses, or whose weights
            the model reads itself, so that a LoRA does nothing there, by name; a layer that the model has under two
            names, of which PEFT would adapt one; NaN or infinite values; ``base`` or ``name`` where it has no meaning;
            ``path`` holds an adapter of osora's, be it this one; a model with PEFT around it, of which the saved folder
            is to be given.
        OSError: the folder cannot be written.
        TypeError: ``source`` is neither a model nor a path.
    """
    _refuse_meaningless(source, Path(path), base, name)
    found = _from_model(source, name) if isinstance(source, nn.Module) else _from_folder(Path(source), base)
    factors = _equalised(found, equal_ranks)
    ranks = {module: left.shape[1] for module, (left, _) in factors.items()}
    config = _config(found, ranks)
    found.model.check(config, list(ranks))
    tensors = {
        f"base_model.model.{key}": tensor.to("cpu", copy=True).contiguous() for key, tensor in found.whole.items()
    }
    for module, (left, right) in factors.items():
        A, B = right.to(left.dtype).t(), left * (ranks[module] / config["lora_alpha"])
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.cpu().contiguous()
    write_adapter(Path(path), tensors, config)
