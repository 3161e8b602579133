# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=[...]``: each row of a batch by its own adapter, through the operator for all rows at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from osora.layers.batch import AdapterOfBatch, RowAdapters, RowTables
from osora.layers.formulas import Basis
from osora.peft.layer import AdapterLayer

BASE = "__base__"  # PEFT's name for no adapter


def _of_layer(layer: AdapterLayer, tables: RowTables) -> list[tuple[RowAdapters, Basis]]:
    """One entry for each basis that adapters of the batch have in the layer: as a rule there is one."""
    layer.settle()
    used = [name for name in dict.fromkeys(tables.names) if name in layer.adapters]
    found = []
    for first, members in layer.widest().items():
        here = [
            AdapterOfBatch(name, layer.adapters[name].formula, layer.deltas(name), layer.adapters[name].dropout)
            for name in used
            if name in members
        ]
        if here:
            basis = layer.basis(first)
            found.append((tables.of(here, basis[2], layer.out_features), basis))
    return found


def _checked(model: nn.Module, adapter_names: object) -> list[str]:
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list with an adapter's name for each row, got {adapter_names!r}")
    there = {name for layer in model.modules() if isinstance(layer, AdapterLayer) for name in layer.adapters}
    if missing := sorted(set(adapter_names) - there - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}")
    return list(adapter_names)


@contextmanager
def rows_of_adapters(model: nn.Module, adapter_names: object, num_beams: object = None) -> Iterator[None]:
    """Within it each row of a batch runs its own adapter, for inference; :data:`BASE` is the base model.

    With beam search a row becomes ``num_beams`` rows, but not in an encoder, which runs before.

    Raises:
        ValueError: no such adapter; the model is in training mode.
        TypeError: ``adapter_names`` is no list of names.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    names = _checked(model, adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in names for _ in range(beams)]
    getter = getattr(model, "get_encoder", None)
    encoder = (
        getter() if callable(getter) and beams > 1 and getattr(model.config, "is_encoder_decoder", False) else None
    )
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    tables, encoder_tables = RowTables(repeated), RowTables(names)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    with torch.no_grad():
        batches = [_of_layer(layer, encoder_tables if id(layer) in inside else tables) for layer in layers]
    hooks, switched = [], []
    off = any(layer.disable_adapters for layer in layers)
    try:
        for layer, batch in zip(layers, batches, strict=True):
            layer.batch = batch
        for module in model.modules():  # whole modules that are saved with an adapter: PEFT's own way
            if isinstance(module, AuxiliaryTrainingWrapper):
                own = names if id(module) in inside else repeated
                own = [name if name in module._adapters else BASE for name in own]  # PEFT's ends in a KeyError

                def add(_module: nn.Module, args: tuple, kwargs: dict, own: list[str] = own) -> tuple[tuple, dict]:
                    return args, kwargs | {"adapter_names": own}

                hooks.append(module.register_forward_pre_hook(add, with_kwargs=True))
                if module.disable_adapters and not off:  # PEFT 0.18 does so where the active adapter has no such module
                    module.enable_adapters(True)
                    switched.append(module)
        yield
    finally:
        for layer in layers:
            layer.batch = None
        for hook in hooks:
            hook.remove()
        for module in switched:
            module.enable_adapters(False)


__all__ = ["BASE", "rows_of_adapters"]
