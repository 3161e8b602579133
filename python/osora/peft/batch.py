# SPDX-License-Identifier: Apache-2.0
"""``adapter_names=[...]``: each row of a batch by its own adapter, through the operator for all rows at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from osora.formulas import Basis
from osora.peft.layer import AdapterLayer
from osora.rows import EachInTurn, InOneOperator, OneAdapter, RowAdapters

BASE = "__base__"  # PEFT's name for no adapter


class _Tables:
    """What the layers get for the rows ``names``; small integer tensors are shared among layers."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.shared: dict[tuple, Tensor] = {}

    def _integers(self, values: list[int], device: torch.device) -> Tensor:
        key = (device, *values)
        if key not in self.shared:
            self.shared[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self.shared[key]

    def of(self, layer: AdapterLayer) -> list[tuple[RowAdapters, Basis]]:
        """One entry for each basis that adapters of the batch have in the layer: as a rule there is one."""
        layer.settle()
        used = dict.fromkeys(name for name in self.names if name in layer.has)
        found = []
        for first, members in layer.widest().items():
            here = [name for name in used if name in members]
            if here:
                basis = layer.basis(first)
                found.append((self._rows(layer, here, basis[2].numel()), basis))
        return found

    def _rows(self, layer: AdapterLayer, here: list[str], rank: int) -> RowAdapters:
        deltas = [layer.deltas(name) for name in here]
        device = deltas[0][0].device
        dropout = any(layer.has[name].dropout > 0 for name in here)
        common = len(self.names), dropout, any(p.requires_grad for each in deltas for p in each)
        if any(not layer.has[name].formula.standard for name in here):
            each = []
            for name, own in zip(here, deltas, strict=True):
                rows = self._integers([i for i, row in enumerate(self.names) if row == name], device)
                each.append(OneAdapter(layer.has[name].formula, [t.detach().clone() for t in own], rows))
            return EachInTurn(*common, tuple(each))
        ranks = [s.numel() for _, s in deltas]
        o_table = deltas[0][0].new_zeros(len(here), layer.out_features)
        s_table = deltas[0][1].new_zeros(len(here), rank)
        for i, (o, s) in enumerate(deltas):
            o_table[i].copy_(o)
            s_table[i, : ranks[i]].copy_(s)
        place = {name: i for i, name in enumerate(here)}
        return InOneOperator(
            *common,
            s_table,
            o_table,
            None if all(r == rank for r in ranks) else self._integers(ranks, device),
            self._integers([place.get(name, -1) for name in self.names], device),
        )


def _checked(model: nn.Module, adapter_names: object) -> list[str]:
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names must be a list with an adapter's name for each row, got {adapter_names!r}")
    there = {name for layer in model.modules() if isinstance(layer, AdapterLayer) for name in layer.has}
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
    tables, encoder_tables = _Tables(repeated), _Tables(names)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    with torch.no_grad():
        batches = [(encoder_tables if id(layer) in inside else tables).of(layer) for layer in layers]
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
