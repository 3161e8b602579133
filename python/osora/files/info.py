# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk, without its base model: its config, what it is, the changes of weights that it holds."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from osora.config import CONFIGS, AdapterConfig
from osora.files.evidence import check_stored
from osora.files.format import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSOR_FILE,
    AdapterError,
    Description,
    method_options,
)
from osora.files.tensors import SavedAdapter, read_adapter
from osora.layers.formulas import formula_of


@dataclass(frozen=True)
class SavedModule:
    """One adapted layer of a saved adapter: its size, the certificate of its SVD, and its base weight's fingerprint."""

    name: str
    rank: int
    out_features: int
    in_features: int
    dtype: str
    """Of the base weight, as torch names it."""
    max_residual: float
    passes: int
    converged: bool
    method: str
    """How it was decomposed."""
    weight_sha256: str
    weight_sketch: tuple[float, ...]


@dataclass(frozen=True)
class SavedWhole:
    """One module that was trained and saved whole: its name, and the numbers of its tensors."""

    name: str
    numbers: int


@dataclass(frozen=True)
class AdapterInfo:
    """What a saved adapter is, as its files say; no base was looked at."""

    folder: Path
    method: str
    """ "osora" or "sorsa"."""
    config: AdapterConfig
    """What it was trained with."""
    base_model: str | None
    """The base's folder, or its name on the hub, if the file has it."""
    task: str | None
    """PEFT's name for the base's task, if the file has it."""
    has_basis: bool
    modules: tuple[SavedModule, ...]
    trainable: int
    """Numbers that were trained; of modules trained whole, all that are in the file."""
    bytes: int
    """Of the two files."""
    format_version: int = FORMAT_VERSION
    whole: tuple[SavedWhole, ...] = ()
    """Modules that were trained whole (``modules_to_save``)."""

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank of a layer."""
        ranks = [module.rank for module in self.modules]
        return min(ranks), max(ranks)

    @property
    def max_residual(self) -> float:
        """The largest certified residual of any singular triplet."""
        return max(module.max_residual for module in self.modules)

    @property
    def converged(self) -> bool:
        """Whether every decomposition reached its tolerance."""
        return all(module.converged for module in self.modules)


def _module(item: Mapping[str, Any]) -> SavedModule:
    known: dict[str, Any] = {field.name: item[field.name] for field in fields(SavedModule)}
    return SavedModule(**known | {"weight_sketch": tuple(item["weight_sketch"])})


def _text(description: Description, key: str) -> str | None:
    value = description.options.get(key)
    return value if isinstance(value, str) and value else None


def config_of(description: Description) -> AdapterConfig:
    """The config that a saved adapter was trained with. Raises AdapterError for an unknown option or a bad value."""
    kind = CONFIGS[description.method.name]
    options = method_options(description, {field.name for field in fields(kind)})
    try:
        return kind.from_dict(options)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{description.path}: {error}") from error


def info_of(folder: Path, description: Description, config: AdapterConfig) -> AdapterInfo:
    """What a description in ``folder``, of an adapter of that config, says; the tensors are not read."""
    shapes, trained = description.shapes(), formula_of(config).trained
    whole = tuple(SavedWhole(each["name"], each["numbers"]) for each in description.whole or ())
    own = sum(math.prod(shapes[description.method.key(name, kind)]) for name in description.modules for kind in trained)
    return AdapterInfo(
        folder,
        description.method.name,
        config,
        _text(description, "base_model_name_or_path"),
        _text(description, "task_type"),
        description.save_basis,
        tuple(_module(item) for item in description.modules.values()),
        own + sum(each.numbers for each in whole),
        sum((folder / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE)),
        whole=whole,
    )


def adapter_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Read and check an adapter's folder, without its base model.

    Args:
        folder: what :func:`osora.save_adapter` wrote.

    Raises:
        FileNotFoundError: no adapter in ``folder``.
        AdapterError: a damaged or foreign file.
    """
    return info_of_saved(folder, read_adapter(folder))


def info_of_saved(folder: str | os.PathLike[str], saved: SavedAdapter) -> AdapterInfo:
    """:func:`adapter_info` of what has been read from ``folder``."""
    return info_of(Path(folder), saved.description, config_of(saved.description))


def stored_changes(folder: str | os.PathLike[str], saved: SavedAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name → ``(left [d, q], right [k, q])``, ``ΔW = left rightᵀ``, of an adapter with its basis.

    Raises:
        AdapterError: there is no basis in the file, or tensors and options do not give the change that was saved.
    """
    if not saved.description.save_basis:
        raise AdapterError(f"{folder} was saved without its basis, so that its base is needed: pass base")
    formula = formula_of(config_of(saved.description))
    changes = {}
    for name, t in saved.tensors.items():
        basis = t["U"], t["V"], t["S0"]
        changes[name] = formula.factors(basis, formula.named(t))
        check_stored(saved.description.modules[name], basis, changes[name], t["S0"])
    return changes


__all__ = [
    "AdapterInfo",
    "SavedModule",
    "SavedWhole",
    "adapter_info",
    "config_of",
    "info_of",
    "info_of_saved",
    "stored_changes",
]
