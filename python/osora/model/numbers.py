# SPDX-License-Identifier: Apache-2.0
"""The numbers of a model: what an adapter trains or would train, of how much, and how well weights were decomposed."""

import math
import os
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from osora.config import AdapterConfig, OsoraConfig
from osora.layers.base_weight import base_weight, is_quantised
from osora.layers.formulas import formula_of
from osora.model.fresh import fresh_parts
from osora.model.state import adapted_layers, state_of
from osora.model.targets import base_modules, find_targets, whole_modules
from osora.model.whole_modules import find_whole, whole_names

_NOTES_SHOWN = 8
_READ = "the model reads its weight itself: right, and a product at each read"


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted layer: its weight's shape [out_features, in_features], rank, and the certificate of its factors."""

    name: str
    shape: tuple[int, int]
    rank: int
    trainable: int
    max_residual: float
    passes: int
    converged: bool
    method: str
    note: str = ""


@dataclass(frozen=True)
class WholeCount:
    """One module that is trained whole: its name, and how many numbers of it are trained."""

    name: str
    trainable: int


def _whole_line(whole: tuple[WholeCount, ...]) -> str:
    return "trained whole: " + ", ".join(f"{each.name} ({each.trainable:,})" for each in whole)


@dataclass(frozen=True)
class Summary:
    """The numbers of an adapted model; ``print`` it for a table."""

    modules: tuple[ModuleSummary, ...]
    trainable: int
    total: int
    seconds: float
    whole: tuple[WholeCount, ...] = ()
    """Modules that the adapter trains whole (``modules_to_save``); :attr:`trainable` has them."""

    @property
    def share(self) -> float:
        """Trainable numbers over the base model's."""
        return self.trainable / max(1, self.total)

    @property
    def max_residual(self) -> float:
        """The largest certified residual of any singular triplet."""
        return max(module.max_residual for module in self.modules)

    @property
    def converged(self) -> bool:
        """Whether every decomposition reached its tolerance."""
        return all(module.converged for module in self.modules)

    def __str__(self) -> str:
        """Shapes with their counts and ranks (least-most), the totals, and the first notes."""
        groups: dict[tuple, list[ModuleSummary]] = defaultdict(list)
        for module in self.modules:
            groups[(*module.shape, module.method)].append(module)
        lines = [f"{'layers':>6}  {'weight':>14}  {'rank':>9}  {'trainable':>10}  {'method':>8}  {'max residual':>12}"]
        for (d, k, method), group in groups.items():
            trainable, residual = sum(m.trainable for m in group), max(m.max_residual for m in group)
            least, most = min(m.rank for m in group), max(m.rank for m in group)
            rank = str(most) if least == most else f"{least}-{most}"
            lines.append(
                f"{len(group):>6}  {f'{d} x {k}':>14}  {rank:>9}  {trainable:>10,}  {method:>8}  {residual:>12.1e}"
            )
        if self.whole:
            lines.append(_whole_line(self.whole))
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} ({self.share:.3%}); decomposed in {self.seconds:.1f} s, "
            f"largest residual {self.max_residual:.1e}" + ("" if self.converged else ", NOT ALL CONVERGED")
        )
        notes = [f"{module.name}: {module.note}" for module in self.modules if module.note]
        lines += notes[:_NOTES_SHOWN]
        if len(notes) > _NOTES_SHOWN:
            lines.append(f"and {len(notes) - _NOTES_SHOWN} more notes: see modules")
        return os.linesep.join(lines)


def _base_numbers(model: nn.Module) -> int:
    """Of the base model, shared ones once."""
    numbers: dict[int, int] = {}
    for _, module in base_modules(model):
        numbers |= {id(p): p.numel() for p in module.parameters(recurse=False)}
        if is_quantised(module):  # what its codes stand for, and not the bytes that they take
            numbers[id(module.weight)] = base_weight(module).numel
    return sum(numbers.values())


def summary(model: nn.Module) -> Summary:
    """How many numbers are trained, of how many, and how well each weight was decomposed; of the active adapter."""
    active, state, readers = state_of(model).active, state_of(model).current, state_of(model).readers
    modules = tuple(
        ModuleSummary(
            name,
            (layer.out_features, layer.in_features),
            layer.rank,
            sum(p.numel() for p in layer.trained(active)),
            *layer.certificate,
            "; ".join(filter(None, (state.notes.get(name), _READ * (name in readers.names)))),
        )
        for name, layer in adapted_layers(model).items()
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = tuple(
        WholeCount(name, sum(p.numel() for p in each.trained(active)))
        for name, each in whole_modules(model, active).items()
    )
    return Summary(modules, trainable, _base_numbers(model), state.seconds, whole)


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
    whole: tuple[WholeCount, ...] = ()
    """Modules that would be trained whole (``modules_to_save``)."""

    @property
    def trainable(self) -> int:
        """Numbers that would be trained, those of whole modules too."""
        return sum(m.trainable for m in self.modules) + sum(w.trainable for w in self.whole)

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
    wholes = find_whole(model, config.modules_to_save, planned=True)
    for target in find_targets(model, config, fresh_parts(model), whole_names(wholes)):
        (d, k), r = target.weight.shape, target.rank
        shapes = formula.shapes(d, k, r)
        trainable = sum(math.prod(shapes[kind]) for kind in formula.trained)
        modules.append(ModuleCount(target.name, (d, k), r, trainable, r * (d + k + 1), target.note))
    counted = tuple(WholeCount(whole.name, sum(p.numel() for p in whole.module.parameters())) for whole in wholes)
    return ParameterCount(tuple(modules), _base_numbers(model), counted)
