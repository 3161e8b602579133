# SPDX-License-Identifier: Apache-2.0
"""The numbers of an adapted model: what is trained, of how much, and how well its weights were decomposed."""

import os
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from osora.bases import base_weight, is_quantised
from osora.patch import adapted_layers, osora_layers, state_of
from osora.targets import base_modules

_NOTES_SHOWN = 8


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted layer: its weight's shape [out_features, in_features], rank, and the proof of its factors."""

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
class Summary:
    """The numbers of an adapted model; ``print`` it for a table."""

    modules: tuple[ModuleSummary, ...]
    trainable: int
    total: int
    seconds: float

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
    layers = osora_layers(model).values()
    own = {id(t) for layer in layers for name in layer.adapters() for t in layer.deltas(name)}
    numbers = sum(p.numel() for p in model.parameters() if id(p) not in own)
    for module in {id(module): module for _, module in base_modules(model)}.values():
        if is_quantised(module):  # what its codes stand for, and not the bytes that they take
            numbers += base_weight(module).numel - module.weight.numel()  # type: ignore[operator,union-attr]
    return numbers


def summary(model: nn.Module) -> Summary:
    """How many numbers are trained, of how many, and how well each weight was decomposed; of the active adapter."""
    active, state = state_of(model).active, state_of(model).current
    modules = tuple(
        ModuleSummary(
            name,
            (layer.out_features, layer.in_features),
            layer.rank,
            sum(p.numel() for p in layer.trained(active)),
            layer.max_residual,
            layer.passes,
            layer.converged,
            layer.method,
            state.notes.get(name, ""),
        )
        for name, layer in adapted_layers(model).items()
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Summary(modules, trainable, _base_numbers(model), state.seconds)
