# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one model, and in one batch (docs/many_adapters.md).

They share the base weights and, in each layer, one basis; an OSoRA adapter is an o and an s a layer, kilobytes each.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osora.adapted import AdaptedLinear
from osora.bases import dense_weight
from osora.config import AdapterConfig
from osora.factors import Unconverged
from osora.formulas import formula_of
from osora.layers import make_layer
from osora.patch import (
    AdapterState,
    adapted_layers,
    adapter_parameters,
    check_new_name,
    decompose_targets,
    install_beside,
    kept,
    notes_of,
    osora_layers,
    refuse_if_busy,
    state_of,
    unwrap,
    with_enough,
)
from osora.rows import EachInTurn, InOneOperator, OneAdapter, RowAdapters
from osora.targets import Target, find_targets


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order they came. Raises ValueError if it has none."""
    return list(state_of(model).adapters)


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that the model runs, trains, merges and saves. Raises ValueError if it has none."""
    return state_of(model).active


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make another adapter the active one: the one that runs, and that training, merging and saving are about.

    Its parameters are trainable if those of the one before were, which are frozen now: an optimiser needs the new ones,
    ``osora.adapter_parameters(model)``. Layers that it is not in are their bases.

    Args:
        model: a model with adapters.
        name: one of :func:`adapter_names`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter of that name; the model is merged, or within :func:`adapters_in_batch`.
    """
    state = state_of(model)
    adapter = state.of(name)
    refuse_if_busy(model)
    if name == state.active:
        return model
    trainable = any(parameter.requires_grad for parameter in adapter_parameters(model))
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(False)
    for layer in osora_layers(model).values():
        layer.select_adapter(name)
        layer.dropout = adapter.config.dropout
    state.active = name
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(trainable)
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter. Layers that no other one is in are their base layers again; bases keep their columns.

    Args:
        model: a model with several adapters.
        name: one of :func:`adapter_names`, but not the active one.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter of that name, or the active one; the model is merged, or within
            :func:`adapters_in_batch`.
    """
    state = state_of(model)
    state.of(name)
    refuse_if_busy(model)
    if name == state.active:
        raise ValueError(
            f"{name!r} is the active adapter: make another one active with osora.set_adapter first, or take all of "
            "them off with osora.detach"
        )
    layers = adapted_layers(model, name).values()
    for layer in layers:
        layer.remove_adapter(name)
    unwrap(model, [layer for layer in layers if not layer.adapters()])
    del state.adapters[name]
    return model


# -- a fresh one -----------------------------------------------------------------------------------------------------


def _fitted(target: Target, layer: AdaptedLinear, config: AdapterConfig) -> Target:
    """The target with the rank that the adapter takes of the layer's basis."""
    most = layer.S0.numel()
    if config.rank_for_energy is not None:
        norm = torch.linalg.vector_norm(dense_weight(layer.base_layer).detach(), dtype=torch.float64)
        target = with_enough(target, layer.S0[: target.rank], norm, config.rank_for_energy)
    if target.rank > most:
        raise ValueError(
            f"{target.name} has a basis of rank {most}, which its adapters share, and this one needs more (up to "
            f"{target.rank}): take a smaller r, or begin with the adapter of the largest rank"
        )
    return target


def add_adapter(
    model: nn.Module,
    name: str,
    config: AdapterConfig | None = None,
    *,
    max_memory: int | None = None,
    unconverged: Unconverged = "warn",
    progress: bool | None = None,
) -> nn.Module:
    """Put a fresh adapter, which changes nothing yet, beside those that the model has. The active one stays active.

    Where the model has an adapter already, the new one shares its basis, of which it takes the leading columns. Layers
    without one are decomposed, as :func:`osora.attach` does it.

    Args:
        model: a model with an adapter; the first one comes with :func:`osora.attach` or :func:`osora.load_adapter`.
        name: what to call it.
        config: what to adapt. None: the layers and ranks of the active adapter, and its config.
        max_memory: as for :func:`osora.attach`, of layers that have no basis yet.
        unconverged: as for :func:`osora.attach`.
        progress: as for :func:`osora.attach`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter yet; the name is taken; a rank above that of a basis which is there; the model is merged,
            or within :func:`adapters_in_batch`; and what :func:`osora.attach` refuses.
        TypeError: a wrong type, or a quantised or integer weight.
    """
    state = state_of(model)
    check_new_name(model, name)
    refuse_if_busy(model)
    began = time.perf_counter()
    new: list[tuple[Target, AdaptedLinear]] = []
    notes: dict[str, str] = {}
    if config is None:
        config = state.current.config
        joined = [(layer, layer.rank) for layer in adapted_layers(model).values()]
        formula = formula_of(config)
    else:
        formula = formula_of(config)
        there = {id(layer.base_layer): layer for layer in osora_layers(model).values()}
        targets = find_targets(model, config)
        fitted = [_fitted(t, there[id(t.module)], config) for t in targets if id(t.module) in there]
        joined = [(there[id(target.module)], target.rank) for target in fitted]
        missing = [target for target in targets if id(target.module) not in there]
        for target, factors in decompose_targets(
            missing, config, max_memory=max_memory, unconverged=unconverged, progress=progress
        ):
            target, factors = kept(target, factors, config)
            new.append((target, make_layer(target.module, factors, formula, config.dropout, name)))
        notes = notes_of([*fitted, *(target for target, _ in new)])
    for layer, rank in joined:
        layer.add_adapter(name, formula, rank)
    install_beside(model, new, name, AdapterState(config, time.perf_counter() - began, notes))
    return model


# -- one batch -------------------------------------------------------------------------------------------------------


def _checked_names(model: nn.Module, names: Sequence[str | None]) -> list[str | None]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list with an adapter's name, or None, for each row of a batch, got {names!r}")
    state = state_of(model)
    for name in set(names) - {None}:
        if not isinstance(name, str):
            raise TypeError(f"names must hold adapters' names, and None for the base, got {name!r}")
        state.of(name)
    return list(names)


class _Tables:
    """What the layers get: a table of o and s each, and an index, which all layers with the same adapters share."""

    def __init__(self, model: nn.Module, names: list[str | None]) -> None:
        self.names, self.state = names, state_of(model)
        self.used = [name for name in dict.fromkeys(names) if name is not None]
        self.shared: dict[tuple, Tensor] = {}

    def _integers(self, values: list[int], device: torch.device) -> Tensor:
        key = (device, *values)
        if key not in self.shared:
            self.shared[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self.shared[key]

    def of(self, layer: AdaptedLinear) -> RowAdapters:
        has = set(layer.adapters())
        here = [name for name in self.used if name in has]
        deltas = [layer.deltas(name) for name in here]
        dropout = any(self.state.adapters[name].config.dropout > 0 for name in here)
        trainable = any(p.requires_grad for each in deltas for p in each)
        common = len(self.names), dropout, trainable
        device = layer.U.device
        if any(not layer.formula(name).standard for name in here):
            rows = [[i for i, row in enumerate(self.names) if row == name] for name in here]
            each = [
                OneAdapter(layer.formula(name), [t.detach().clone() for t in own], self._integers(where, device))
                for name, own, where in zip(here, deltas, rows, strict=True)
            ]
            return EachInTurn(*common, tuple(each))
        place = {name: i for i, name in enumerate(here)}
        ranks = [s.numel() for _, s in deltas]
        s_table = layer.S0.new_zeros(len(here), layer.S0.numel())
        o_table = layer.S0.new_zeros(len(here), layer.out_features)
        for i, (o, s) in enumerate(deltas):
            o_table[i].copy_(o)
            s_table[i, : ranks[i]].copy_(s)
        return InOneOperator(
            *common,
            s_table,
            o_table,
            None if all(rank == layer.S0.numel() for rank in ranks) else self._integers(ranks, device),
            self._integers([-1 if name is None else place.get(name, -1) for name in self.names], device),
        )


@contextmanager
def adapters_in_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within it, each row of a batch runs its own adapter, for inference.

    Row i (of the first dimension of every layer's x) gives what the model gives with the adapter ``names[i]`` active,
    up to rounding, and its base for None. A batch of 64 adapters costs hardly more than one of 64 rows of one adapter.
    The adapters are taken as they are on entry. What is active does not matter, and is so again on leaving.

    Args:
        model: a model with adapters, not merged.
        names: for each row an adapter's name, or None. Where rows are repeated, for beam search say, so are names.

    Yields:
        ``model`` itself.

    Raises:
        ValueError: no adapter of that name; merged; and from the model, within: x has another number of rows, or an
            adapter with dropout is run in training mode.
        TypeError: ``names`` is no list of names.
        RuntimeError: from the model, within: a gradient would be needed.
    """
    tables = _Tables(model, _checked_names(model, names))
    layers = osora_layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: call osora.unmerge(model) first")
    before = {name: layer.batch for name, layer in layers.items()}
    with torch.no_grad():
        batches = {name: tables.of(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.batch = batches[name]
        yield model
    finally:
        for name, layer in layers.items():
            layer.batch = before[name]


__all__ = ["active_adapter", "adapter_names", "adapters_in_batch", "add_adapter", "remove_adapter", "set_adapter"]
