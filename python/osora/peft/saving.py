# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained``: what osora adds to what PEFT writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osora.files.evidence import describe
from osora.files.format import CONFIG_FILE, FILE_METHODS, TENSOR_FILE, Description, write_config
from osora.files.whole import finish, temporary_beside
from osora.peft.layer import AdapterLayer, layers_of

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
    for name, layer in layers.items():
        _check(name, layer, adapter)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        modules = list(pool.map(lambda item: _describe(item[0], item[1], adapter), layers.items()))
    if (folder / TENSOR_FILE).is_file():
        _mend(folder / TENSOR_FILE, config, model, adapter, layers)
    named = {module["name"]: module for module in modules}
    method = FILE_METHODS[config.method]
    description = Description(folder / CONFIG_FILE, method, options, config.save_basis, named)
    write_config(folder, description.contents())
    if (found := _listening.get()) is not None:
        found[folder] = description


def _check(name: str, layer: AdapterLayer, adapter: str) -> None:
    layer.settle()
    for key, tensor in layer.named_parameters():
        if hasattr(tensor, "full_tensor"):  # a DTensor, as FSDP2 makes it
            raise ValueError(
                f"{name}.{key} is sharded over processes; load full_tensor() of every entry of its state_dict into an "
                "unsharded copy of the model, and save that"
            )
    U, V, _ = layer.basis(adapter)
    for kind, value in (layer.values(adapter) | {"U": U, "V": V}).items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}.{kind} has NaN or infinite values; the adapter cannot be loaded again")


def _describe(name: str, layer: AdapterLayer, adapter: str) -> dict[str, Any]:
    return describe(
        name,
        layer.base(),
        layer.basis(adapter),
        layer.delta_factors(adapter),
        layer.values(adapter),
        layer.adapters[adapter].certificate,
    )


# -- what some versions of PEFT leave out, or put in too much ----------------------------------------------------------


def _biases(config: AdapterConfig, model: nn.Module, layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    """The trained biases by their names in the file; PEFT before 0.21 does not save them for a new method."""
    if config.bias == "none":
        return {}
    if config.bias == "all":
        found: dict[str, Tensor] = {
            name: tensor for name, tensor in model.named_parameters() if name.rpartition(".")[2] == "bias"
        }
    else:
        found = {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    return {f"base_model.model.{name}": tensor.detach() for name, tensor in found.items()}


def _mend(
    path: Path, config: AdapterConfig, model: nn.Module, adapter: str, layers: Mapping[str, AdapterLayer]
) -> None:
    """Make the file hold what it should, if it does not: PEFT 0.18 writes all adapters' tensors into each file."""
    method = FILE_METHODS[config.method]
    kinds = (*method.values, *(("U", "V") if config.save_basis else ()))
    own = {method.key(name, kind) for name in layers for kind in kinds}
    biases = _biases(config, model, layers)
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
    foreign = {key for key in there - own if f".{config.method}_" in key}
    if not foreign and not biases.keys() - there:
        return
    tensors = {key: tensor for key, tensor in load_file(path).items() if key not in foreign}
    tensors |= {key: tensor.to("cpu").contiguous() for key, tensor in biases.items()}
    with temporary_beside(path) as new:
        save_file(tensors, new, metadata={"format": "pt"})
        finish(new)
        new.replace(path)


__all__ = ["save"]
