# SPDX-License-Identifier: Apache-2.0
"""How many numbers an adapter would train, from shapes alone: no weight is read, none need be there."""

import math
from dataclasses import dataclass

from torch import nn

from osora.bases import base_weight, is_quantised
from osora.config import AdapterConfig, OsoraConfig
from osora.formulas import formula_of
from osora.targets import base_modules, find_targets


@dataclass(frozen=True)
class ModuleCount:
    """One layer: its weight's shape [out_features, in_features], the adapter's rank there, and what it trains."""

    name: str
    shape: tuple[int, int]
    rank: int
    trainable: int
    basis: int
    note: str = ""


@dataclass(frozen=True)
class ParameterCount:
    """What :func:`count_parameters` found."""

    modules: tuple[ModuleCount, ...]
    total: int
    """Numbers of the base model, shared ones once."""

    @property
    def trainable(self) -> int:
        """Numbers that would be trained."""
        return sum(module.trainable for module in self.modules)

    @property
    def basis(self) -> int:
        """Numbers of the frozen U, V and S0."""
        return sum(module.basis for module in self.modules)


def count_parameters(model: nn.Module, config: AdapterConfig | None = None) -> ParameterCount:
    """What :func:`osora.attach` would train, without decomposing anything: the model may be on the meta device.

    Args:
        model: any model that can be adapted, as it came or with adapters, which are not looked at.
        config: as for :func:`osora.attach`. With rank_for_energy the ranks depend on the weights: counted is the most.

    Returns:
        Counts for every layer, and their sums.

    Raises:
        ValueError: what :func:`osora.attach` refuses about names and layers.
        TypeError: no config.
    """
    config = OsoraConfig() if config is None else config
    formula, modules = formula_of(config), []
    for target in find_targets(model, config):
        (d, k), r = base_weight(target.module).shape, target.rank
        shapes = formula.shapes(d, k, r)
        trainable = sum(math.prod(shapes[kind]) for kind in formula.trained)
        modules.append(ModuleCount(target.name, (d, k), r, trainable, r * (d + k + 1), target.note))
    return ParameterCount(tuple(modules), _base_numbers(model))


def _base_numbers(model: nn.Module) -> int:
    numbers: dict[int, int] = {}
    for _, module in base_modules(model):
        numbers |= {id(p): p.numel() for p in module.parameters(recurse=False)}
        if is_quantised(module):  # what its codes stand for, and not the bytes that they take
            numbers[id(module.weight)] = base_weight(module).numel
    return sum(numbers.values())


__all__ = ["ModuleCount", "ParameterCount", "count_parameters"]
