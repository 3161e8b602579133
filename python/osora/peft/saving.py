# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained``: what osora adds to what PEFT writes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from osora.files.evidence import check_describable, check_finite, describe, describe_whole
from osora.files.format import CONFIG_FILE, FILE_METHODS, Description, write_config
from osora.model.readers import read_layers
from osora.peft.layer import AdapterLayer, layers_of
from osora.peft.selecting import Selection, selected

if TYPE_CHECKING:
    from osora.peft.config import AdapterConfig


_listening: ContextVar[dict[Path, Description] | None] = ContextVar("listening", default=None)


@contextmanager
def descriptions_written() -> Iterator[dict[Path, Description]]:
    """Within it, what :func:`save` has written, by its folder."""
    found: dict[Path, Description] = {}
    before = _listening.set(found)
    try:
        yield found
    finally:
        _listening.reset(before)


def save(config: AdapterConfig, options: dict[str, Any], folder: Path) -> None:
    """The configuration's file: of an adapter that is in a model, with what the tensors' file is checked by.

    PEFT has written that file by now; transformers' own ``save_pretrained`` will next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.home is None:
        write_config(folder, options)
        return
    model, adapter = config.home
    layers = layers_of(model, adapter)
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} any more: it cannot be saved")
    for layer in layers.values():
        layer.settle()
    selection = selected(config)
    for name, tensors in selection.own.items():
        check_finite(name, tensors)
    check_finite("", selection.beside)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        modules = list(pool.map(lambda item: _describe(item[0], item[1], adapter, selection), layers.items()))
    for module in modules:
        check_describable(module)
    method = FILE_METHODS[config.method]
    named = {module["name"]: module for module in modules}
    others = tuple(sorted(method.other_key(name) for name in selection.beside))
    seen = {name for layer in layers.values() if layer.place.readers for name in layer.place.readers.names}
    read = tuple(read_layers(model, layers, seen))
    description = Description(
        folder / CONFIG_FILE, method, options, config.save_basis, named, others, basis=config.note, read=read
    )
    beside = {method.other_key(name): tensor for name, tensor in selection.beside.items()}
    keys, _ = description.whole_keys(others)
    whole = [describe_whole(name, {k: beside[key] for k, key in inside.items()}) for name, inside in keys.items()]
    description = replace(description, whole=tuple(whole) or None)
    write_config(folder, description.contents())
    if (found := _listening.get()) is not None:
        found[folder] = description


def _describe(name: str, layer: AdapterLayer, adapter: str, selection: Selection) -> dict[str, Any]:
    tensors, formula = selection.own[name], layer.adapters[adapter].formula
    basis = tensors["U"], tensors["V"], tensors["S0"]
    return describe(
        name,
        selection.bases[name],
        basis,
        formula.factors(basis, formula.named(tensors)),
        {kind: tensors[kind] for kind in (*formula.kinds, "S0")},
        layer.adapters[adapter].certificate,
    )


__all__ = ["descriptions_written", "save"]
