# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's model as a tree of modules without weights, and where in the files each weight is.

transformers makes the tree on the meta device from ``config.json``, and its own rules say what a tensor is called.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.files.base_folder import BaseFolder, BaseFolderError

_KEPT_EXACT = {  # where transformers lists modules that stay in float32 when a model is loaded in that dtype
    torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    torch.float16: ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"),
}


@dataclass(frozen=True)
class Origin:
    """The tensors of a checkpoint that a weight is made from: the one that it is, or some with transformers' rule."""

    keys: tuple[str, ...]
    rule: Any = None
    """transformers' converter, whose tensors come by ``patterns``."""
    patterns: tuple[str, ...] = ()
    made: str = ""
    """The name under which the converter knows them."""

    def weight(self, name: str, tensors: Sequence[Tensor], model: nn.Module) -> Tensor:
        """The weight of that name from the tensors of :attr:`keys`. Raises BaseFolderError if the rule gives none."""
        if self.rule is None:
            return tensors[0]
        rule = deepcopy(self.rule)
        for key, pattern, tensor in zip(self.keys, self.patterns, tensors, strict=True):
            rule.add_tensor(self.made, key, pattern, tensor)
        found = rule.convert(self.made, model=model, config=getattr(model, "config", None))
        value = found.get(name)
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, Tensor):
            raise BaseFolderError(f"transformers makes no {name} from {', '.join(self.keys)}")
        return value.contiguous()


def snapshot(folder: Path) -> Path:
    """The folder itself, or the snapshot that ``main`` stands for where it is a model's in the hub's cache."""
    reference = folder / "refs" / "main"
    if (folder / "snapshots").is_dir() and reference.is_file():
        return folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return folder


def model_of(base: BaseFolder) -> nn.Module:
    """The model that a checkpoint's ``config.json`` names, on the meta device.

    Raises:
        ValueError: no config.json, or none that transformers makes a model of; what to do about it.
    """
    if not (base.folder / "config.json").is_file():
        raise BaseFolderError(
            f"{base.folder} has no config.json that says what its model is: give the model, made on the meta device"
        )
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        name = next(iter(config.architectures or ()), "")
        made = getattr(transformers, name, None)
        if made is None:
            raise ValueError(f"transformers has no class {name!r}" if name else "architectures names no class")
        with torch.device("meta"):
            model: nn.Module = made(config)
    except Exception as error:  # whatever somebody's config makes transformers raise
        raise BaseFolderError(
            f"{base.folder}/config.json: transformers makes no model of it ({error}): give the model, made on the meta "
            "device"
        ) from error
    return model


def _rules(base: BaseFolder, model: nn.Module) -> dict[str, Origin]:
    """The model's name of a tensor → its origin, by the rules that transformers has for the model."""
    origins = {key: Origin((key,)) for key in base.tensors}
    if "transformers" not in sys.modules:  # then the model is none of its
        return origins
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return origins
    if not isinstance(model, PreTrainedModel):
        return origins
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    there, origins = model.state_dict(), {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(base.tensors, key=_natural):
        new, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, there)
        if pattern is None:
            origins[new] = Origin((key,))
        else:
            groups.setdefault(new, []).append((key, pattern))
    for made, sources in groups.items():
        rule = by_pattern[sources[0][1]]
        keys, patterns = zip(*sources, strict=True)
        for target in rule.target_patterns:
            name = made.replace(rule.target_patterns[0], target)
            origins[name] = Origin(keys, rule, patterns, made)
    return origins


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Numbers in a name by their size: the order in which transformers hands experts to its rules."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", key) if part]


def origins_of(base: BaseFolder, model: nn.Module) -> dict[str, Origin]:
    """The model's name of a tensor → what it is made from.

    Raises:
        BaseFolderError: the rules of this transformers cannot be used, with its reason.
    """
    try:
        return _rules(base, model)
    except Exception as error:
        raise BaseFolderError(f"transformers cannot say how it names the tensors of {base.folder}: {error}") from error


def dtypes_of(
    base: BaseFolder, model: nn.Module, names: Iterable[str], asked: torch.dtype | None
) -> dict[str, torch.dtype | None]:
    """Parameter name → the dtype it has in the model when that is loaded; None: as it is stored.

    Args:
        base: whose config names a dtype, most often.
        model: of transformers; some of its modules it keeps in float32.
        names: of the parameters.
        asked: a dtype for all, None for the config's.
    """
    config = getattr(model, "config", None)
    dtype = asked if asked is not None else getattr(config, "dtype", None)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    lists = _KEPT_EXACT.get(dtype, ()) if isinstance(dtype, torch.dtype) else ()
    exact = {name for each in lists for name in getattr(model, each, None) or ()}
    kept = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in exact)) if exact else None
    return {name: torch.float32 if kept is not None and kept.search(name) else dtype for name in names}


def refuse_quantised(base: BaseFolder) -> None:
    """Raise BaseFolderError for a checkpoint whose weights are quantised."""
    found: Any = base.config.get("quantization_config")
    if isinstance(found, Mapping):
        raise BaseFolderError(
            f"{base.folder} is quantised ({found.get('quant_method', 'unknown')}): make it of the checkpoint that "
            "it was made from"
        )


__all__ = ["Origin", "dtypes_of", "model_of", "origins_of", "refuse_quantised", "snapshot"]
