# SPDX-License-Identifier: Apache-2.0
"""Modules that a saved adapter trained whole, found in the model that it is put on."""

from torch import nn

from osora.files.format import AdapterError
from osora.files.tensors import SavedAdapter
from osora.layers.whole_module import values_of
from osora.model.targets import base_modules, whole_modules, within
from osora.model.whole_modules import Copy, Whole, find_whole


def find_saved_whole(model: nn.Module, adapter: SavedAdapter) -> list[Whole]:
    """The modules in this model that the adapter trained whole. Raises AdapterError."""
    saved = adapter.whole
    for name in adapter.description.modules:
        if (outer := within(name, saved)) is not None:
            raise AdapterError(f"{adapter.description.path}: {name} is adapted, and {outer} trained whole")
    there = {name for name, _ in base_modules(model)}
    if missing := [name for name in saved if name not in there]:
        raise AdapterError(f"the adapter was trained with {missing[0]} whole, which this model does not have")
    try:
        found = find_whole(model, saved or None, exact=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from error
    for whole in found:
        here, values = values_of(whole.module), saved[whole.name]
        if odd := sorted(here.keys() ^ values.keys()):
            raise AdapterError(f"{whole.name}, trained whole: {odd[0]} is {_where(odd[0] in here)}")
        for key, tensor in values.items():
            if tensor.shape != here[key].shape:
                raise AdapterError(
                    f"the adapter's {whole.name}.{key} is {list(tensor.shape)}, this model's is {list(here[key].shape)}"
                )
    return found


def saved_copies(model: nn.Module, wholes: list[Whole], adapter: SavedAdapter, name: str) -> list[Copy]:
    """Of each module a copy with the saved values, not in the model yet."""
    there = whole_modules(model)
    found = [whole.placed(there.get(whole.name), name) for whole in wholes]
    for whole, each in zip(wholes, found, strict=True):
        each.values.load_state_dict(adapter.whole[whole.name])
    return found


def _where(here: bool) -> str:
    return "in this model, and not in the adapter's file" if here else "in the adapter's file, and not in this model"


__all__ = ["find_saved_whole", "saved_copies"]
