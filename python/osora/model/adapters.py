# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one model, and in one batch (docs/many_adapters.md).

They share the base weights and, in each layer, one basis; an OSoRA adapter is an o and an s a layer, kilobytes each.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from osora.config import AdapterConfig
from osora.layers.adapted import AdaptedLinear
from osora.layers.base_weight import dense_weight
from osora.layers.batch import AdapterOfBatch, RowAdapters, RowTables
from osora.layers.formulas import formula_of
from osora.layers.linears import make_layer
from osora.layers.undo import AllOrNothing
from osora.model.attach import install_beside, unwrap
from osora.model.decompose import as_asked, decompose_targets, notes_of, with_enough
from osora.model.fresh import fresh_parts
from osora.model.parameters import adapter_parameters
from osora.model.state import (
    AdapterState,
    State,
    adapted_layers,
    all_layers,
    check_new_name,
    refuse_if_busy,
    refuse_late,
    refuse_sharded,
    state_of,
)
from osora.model.targets import Target, find_targets, refuse_wrapped, whole_modules
from osora.model.whole_modules import find_whole, whole_names
from osora.svd.certificate import Unconverged


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
        ValueError: no adapter of that name; the model is merged, within :func:`adapters_in_batch`, or sharded or in
            DistributedDataParallel, which knows the adapter that was active then.
    """
    state = state_of(model)
    adapter = state.of(name)
    refuse_if_busy(model)
    if name == state.active:
        return model
    refuse_wrapped(model)
    refuse_sharded(all_layers(model), "given another adapter", "choose the adapter before the model is sharded")
    trainable = any(parameter.requires_grad for parameter in adapter_parameters(model))
    layers, wholes = all_layers(model).values(), whole_modules(model).values()
    with AllOrNothing(*layers, *wholes, others=(state,), alone=True):
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(False)
        for layer in layers:
            layer.select_adapter(name)
            layer.dropout = adapter.config.dropout
        for whole in wholes:
            whole.select_adapter(name)
        state.active = name
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(trainable)
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter. Layers that no other one is in are their base layers again; bases keep their columns.

    So are modules that no other one trains whole.

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
    wholes = whole_modules(model, name).values()
    with AllOrNothing(model):
        del state.adapters[name]
        for layer in layers:
            layer.remove_adapter(name)
        for whole in wholes:
            whole.remove_adapter(name)
        unwrap(model, [layer for layer in layers if not layer.adapters()])
        unwrap(model, [whole for whole in wholes if not whole.adapters()])
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


@torch.inference_mode(False)
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
    refuse_wrapped(model)
    refuse_late(model, {module: layer.base_layer for module, layer in all_layers(model).items()}, "decomposed")
    began = time.perf_counter()
    new: list[tuple[Target, AdaptedLinear]] = []
    notes: dict[str, str] = {}
    if config is None:
        config = state.current.config
        wholes = find_whole(model, state.current.whole or None, exact=True)
        joined = [(layer, layer.rank) for layer in adapted_layers(model).values()]
        formula = formula_of(config)
    else:
        formula = formula_of(config)
        there = {id(layer.base_layer): layer for layer in all_layers(model).values()}
        wholes = find_whole(model, config.modules_to_save)
        targets = find_targets(model, config, fresh_parts(model), whole_names(wholes), whole_modules(model))
        fitted = [_fitted(t, there[id(t.module)], config) for t in targets if id(t.module) in there]
        joined = [(there[id(target.module)], target.rank) for target in fitted]
        missing = [target for target in targets if id(target.module) not in there]
        for target, factors in decompose_targets(
            missing, config, max_memory=max_memory, unconverged=unconverged, progress=progress
        ):
            target, factors = as_asked(target, factors, config)
            new.append((target, make_layer(target.module, factors, formula, config.dropout, name)))
        notes = notes_of([*fitted, *(target for target, _ in new)])
    trained = whole_modules(model)
    copies = [whole.placed(trained.get(whole.name), name) for whole in wholes]
    whole_too = [whole.name for whole in wholes]
    with AllOrNothing(model):
        for layer, rank in joined:
            layer.add_adapter(name, formula, rank)
        install_beside(model, new, copies, name, AdapterState(config, time.perf_counter() - began, notes, whole_too))
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


def _rows_of(layer: AdaptedLinear, tables: RowTables, state: State) -> RowAdapters:
    has = set(layer.adapters())
    here = [name for name in dict.fromkeys(tables.names) if name in has]
    found = [
        AdapterOfBatch(name, layer.formula(name), layer.deltas(name), state.of(name).config.dropout) for name in here
    ]
    return tables.of(found, layer.S0, layer.out_features)


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
    tables, state = RowTables(_checked_names(model, names)), state_of(model)
    layers = all_layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: call osora.unmerge(model) first")
    wholes = whole_modules(model).values()
    before, before_whole = {name: layer.batch for name, layer in layers.items()}, [whole.batch for whole in wholes]
    with torch.no_grad():
        batches = {name: _rows_of(layer, tables, state) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.batch = batches[name]
        for whole in wholes:
            whole.batch = tables.names
        yield model
    finally:
        for name, layer in layers.items():
            layer.batch = before[name]
        for whole, batch in zip(wholes, before_whole, strict=True):
            whole.batch = batch


__all__ = ["active_adapter", "adapter_names", "adapters_in_batch", "add_adapter", "remove_adapter", "set_adapter"]
