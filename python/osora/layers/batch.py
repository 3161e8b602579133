# SPDX-License-Identifier: Apache-2.0
"""One batch, row by row: what :func:`osora.adapters_in_batch` gives to a layer, and what the layer does with it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from osora import ops
from osora.layers.formulas import Basis, Deltas, Formula, leading
from osora.layers.read_weight import Place, read_weight


@dataclass(frozen=True)
class RowAdapters(ABC):
    """The adapters of a batch's rows, as they were when it was entered."""

    rows: int
    dropout: bool  # whether one of the batch's adapters is to be trained with dropout
    trainable: bool  # whether a parameter behind them requires a gradient
    everywhere: tuple[Formula, Deltas] | None  # the adapter that all rows have, if they have one

    def check(self, x: Tensor, training: bool) -> None:
        """Raise ValueError or RuntimeError for an x or a mode that the batch is not for."""
        if x.dim() < 2 or x.shape[0] != self.rows:
            raise ValueError(
                f"adapters_in_batch has {self.rows} names, and a layer got x of shape {list(x.shape)}: the "
                "first dimension must be the batch, with a name for each of its rows (each beam counts as one)"
            )
        if training and self.dropout:
            raise ValueError("adapters_in_batch is for inference, and an adapter has dropout: call model.eval() first")
        self._check_gradient()

    def _check_gradient(self) -> None:
        if self.trainable and torch.is_grad_enabled():
            raise RuntimeError(
                "adapters_in_batch is for inference, and an adapter requires a gradient: run it under torch.no_grad()"
            )

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether every row is the base's."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, basis: Basis) -> Tensor:
        """Base and branches [rows, ..., d]; rows of the base have its very bits."""

    @abstractmethod
    def add(self, y: Tensor, x: Tensor, basis: Basis) -> Tensor:
        """Y of the base plus the branches, as a tensor of its own."""


def weight_of_rows(base_layer: nn.Module, batch: Sequence[tuple[RowAdapters, Basis]], place: Place) -> Tensor:
    """The weight of a layer whose model reads it within a batch: that of the adapter which all rows have.

    Args:
        base_layer: the layer without adapters; its own weight is given where all rows are the base's.
        batch: groups of the batch's adapters, each with the basis that its adapters share.
        place: the layer's.

    Returns:
        The weight, as the model stores it. Where rows have several adapters, or some have none, values of it raise
        ValueError as they are asked for: one weight cannot be each row's own. Its shape and dtype are known.
    """
    used = [(rows, basis) for rows, basis in batch if not rows.is_empty]
    if not used:
        return base_layer.weight  # type: ignore[return-value]
    rows, basis = used[0]

    def check() -> None:
        if rows.everywhere is None or len(used) > 1:
            raise ValueError(
                f"the model reads {place.name}.weight itself instead of calling the layer, and within a batch of "
                "several adapters one weight cannot be each row's own: give all rows of the batch one adapter, or "
                "leave the layer out of the adapters when they are trained (exclude_modules)"
            )
        rows._check_gradient()

    parts = []
    if rows.everywhere is not None:
        formula, deltas = rows.everywhere
        parts.append((formula, leading(basis, formula.rank(deltas)), deltas))
    return read_weight(base_layer, parts, place, check)


@dataclass(frozen=True)
class InOneOperator(RowAdapters):
    """Adapters of the paper's OSoRA: a table of them, and one operator for all rows."""

    s: Tensor  # [A, r of the basis], zero beyond an adapter's rank
    o: Tensor  # [A, d]
    ranks: Tensor | None  # [A]; None where all have the rank of the basis
    index: Tensor  # [rows]: the adapter of a row; -1 for the base, and for adapters that leave the layer alone

    @property
    def is_empty(self) -> bool:
        """Whether every row is the base's."""
        return not len(self.s)

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: Basis) -> Tensor:
        """Base and branches."""
        return ops.linear_multi(x, weight, bias, *basis, self.s, self.o, self.index, self.ranks)

    def add(self, y: Tensor, x: Tensor, basis: Basis) -> Tensor:
        """The branches alone are another call of the same operator."""
        return y + self.linear(x, None, None, basis)


@dataclass(frozen=True)
class AdapterRows:
    """One adapter of a batch and the rows that it is for."""

    formula: Formula
    deltas: Deltas
    rows: Tensor  # int64


@dataclass(frozen=True)
class EachInTurn(RowAdapters):
    """Adapters of any methods: the base once for all rows, then each adapter's branch for its rows."""

    each: tuple[AdapterRows, ...]

    @property
    def is_empty(self) -> bool:
        """Whether every row is the base's."""
        return not self.each

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, basis: Basis) -> Tensor:
        """Base and branches."""
        return self._add_(torch.nn.functional.linear(x, weight, bias), x, basis)

    def add(self, y: Tensor, x: Tensor, basis: Basis) -> Tensor:
        """The branches added to a copy."""
        return self._add_(y.clone(), x, basis)

    def _add_(self, y: Tensor, x: Tensor, basis: Basis) -> Tensor:
        for one in self.each:  # no row is in two of them
            mine = leading(basis, one.formula.rank(one.deltas))
            branch = one.formula.linear(x.index_select(0, one.rows), None, None, mine, one.deltas)
            y.index_copy_(0, one.rows, y.index_select(0, one.rows) + branch)
        return y


class AdapterOfBatch(NamedTuple):
    """An adapter of a batch as a layer has it."""

    name: str
    formula: Formula
    deltas: Sequence[nn.Parameter]
    dropout: float


class RowTables:
    """Makes what layers get for a batch: a table of o and s each, and an index that they share.

    Args:
        names: of each row's adapter; a name that a layer does not have is its base.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self._shared: dict[tuple, Tensor] = {}

    def _integers(self, values: Sequence[int], device: torch.device) -> Tensor:
        key = (device, *values)
        if key not in self._shared:
            self._shared[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._shared[key]

    def _everywhere(self, here: Sequence["AdapterOfBatch"]) -> tuple[Formula, Deltas] | None:
        if len(here) != 1 or any(name != here[0].name for name in self.names):
            return None
        return here[0].formula, [t.detach().clone() for t in here[0].deltas]

    def of(self, here: Sequence[AdapterOfBatch], S0: Tensor, out_features: int) -> RowAdapters:
        """For a layer that has the adapters ``here``, in a basis of singular values S0 [r]. Needs no_grad."""
        dropout, trainable = (
            any(adapter.dropout > 0 for adapter in here),
            any(p.requires_grad for adapter in here for p in adapter.deltas),
        )
        common = len(self.names), dropout, trainable, self._everywhere(here)
        if any(not adapter.formula.standard for adapter in here):
            each = []
            for name, formula, deltas, _ in here:
                rows = self._integers([i for i, row in enumerate(self.names) if row == name], S0.device)
                each.append(AdapterRows(formula, [t.detach().clone() for t in deltas], rows))
            return EachInTurn(*common, tuple(each))
        rank, ranks = S0.numel(), [adapter.formula.rank(adapter.deltas) for adapter in here]
        o_table, s_table = S0.new_zeros(len(here), out_features), S0.new_zeros(len(here), rank)
        for i, adapter in enumerate(here):
            o, s = adapter.deltas
            o_table[i].copy_(o)
            s_table[i, : ranks[i]].copy_(s)
        place: dict[str | None, int] = {adapter.name: i for i, adapter in enumerate(here)}
        return InOneOperator(
            *common,
            s_table,
            o_table,
            None if all(r == rank for r in ranks) else self._integers(ranks, S0.device),
            self._integers([place.get(name, -1) for name in self.names], S0.device),
        )
