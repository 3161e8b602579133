# SPDX-License-Identifier: Apache-2.0
"""Adapters saved from a model (docs/format.md).

With its basis an adapter stands alone. Without it, it is what was trained and the singular values, and loading
decomposes the base weights again; either way the base is checked to be the one the adapter was trained on.
"""

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.config import AdapterConfig
from osora.files.card import keep_card
from osora.files.evidence import (
    check_describable,
    check_finite,
    describe,
    describe_whole,
)
from osora.files.format import CONFIG_FILE, FILE_METHODS, Description, write_adapter
from osora.files.info import info_of
from osora.files.readback import read_back
from osora.layers.adapted import AdaptedLinear
from osora.layers.known_base import KnownBase, known_base
from osora.layers.sharded import is_sharded, one_writes, ranks_of, whole
from osora.layers.whole_module import WholeModule
from osora.model.readers import read_layers
from osora.model.state import (
    adapted_layers,
    refuse_incomplete,
    refuse_sharded,
    refuse_valueless,
    state_of,
    trained_whole,
)
from osora.model.targets import (
    uncompiled,
)


def _whole_values(layer: AdaptedLinear, adapter: str) -> dict[str, Tensor]:
    """What the adapter trains in the layer, by kind, and S0 of its rank. Collective where that is sharded."""
    deltas = {
        kind: whole(tensor).to(layer.S0.dtype)
        for kind, tensor in zip(layer.formula(adapter).kinds, layer.deltas(adapter), strict=True)
    }
    return deltas | {"S0": layer.basis(deltas["s"].numel())[2]}


def _describe(
    name: str, layer: AdaptedLinear, adapter: str, values: dict[str, Tensor], known: KnownBase
) -> dict[str, Any]:
    formula, basis = layer.formula(adapter), layer.basis(values["S0"].numel())
    return describe(name, known, basis, formula.factors(basis, formula.named(values)), values, layer.certificate)


def _options(model: nn.Module, config: AdapterConfig, save_basis: bool) -> dict[str, Any]:
    """What stands beside the block: what PEFT asks of any adapter, and the method's options."""
    base = type(uncompiled(model))
    return {
        "peft_type": FILE_METHODS[config.method].peft_type,
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        **config.to_dict(),
        "save_basis": save_basis,
    }


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, save_basis: bool = True, name: str | None = None
) -> None:
    """Write the model's active adapter, or the one of that name, to ``folder``, which is made if need be.

    PEFT loads it too, with :mod:`osora.peft` imported.

    Args:
        model: a model with an adapter, merged or not.
        folder: gets ``adapter_model.safetensors`` and ``adapter_config.json``, each written whole or not at all; and
            a model card as of :func:`osora.write_card`, where huggingface_hub is installed. A card with metadata that
            cannot be read is left as it is, with a warning.
        save_basis: store U and V, in the base weight's dtype. Without them the file of an OSoRA adapter is a few
            kilobytes to megabytes and loading computes them again from the base, or reads them where the adapter came
            from a basis that is kept (osora.attach's ``basis``); where it did not, decompose with ``tol <= 1e-4``, so
            that another machine finds the same basis.
        name: which of several adapters; None for the active one. The name itself is not in the file.

    Raises:
        ValueError: no adapter, none of that name, NaN or infinite values in it, a module that has lost it, or one that
            it trains whole and that is in the model no more, or sharded.
        RuntimeError: the model is sharded over processes (FSDP2, ZeRO 3), and not all of them have called this; or the
            first of them, which alone writes, could not (docs/distributed.md).
        OSError: the folder cannot be written.
    """
    adapter = state_of(model).active if name is None else name
    state = state_of(model).of(adapter)
    config, layers = state.config, adapted_layers(model, adapter)
    wholes = trained_whole(model, adapter)
    refuse_incomplete(model, adapter)
    refuse_valueless(layers, "saved")
    refuse_sharded(wholes, "saved")
    parts = [p for layer in layers.values() for p in layer.parameters() if is_sharded(p)]
    with one_writes(ranks_of(parts[0]) if parts else [], "save_adapter") as writes:
        found = {module: _whole_values(layer, adapter) for module, layer in layers.items()}
        known = _known(layers, bool(parts))
        if writes:
            if not save_basis and config.tol > 1e-4 and state.basis is None:
                warnings.warn(
                    f"saving without the basis, which was decomposed with tol={config.tol:g}: another machine may "
                    f"find one that differs by as much, and refuse the adapter; attach with "
                    f"{type(config).__name__}(tol=1e-4) to be safe",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _write(model, layers, wholes, Path(folder), adapter, save_basis, found, known)


def _known(layers: Mapping[str, AdaptedLinear], sharded: bool) -> dict[str, KnownBase]:
    if sharded:  # one after the other, in the same order on every process
        return {name: known_base(layer, name) for name, layer in layers.items()}
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        return dict(zip(layers, pool.map(lambda item: known_base(item[1], item[0]), layers.items()), strict=True))


def _write(
    model: nn.Module,
    layers: Mapping[str, AdaptedLinear],
    wholes: Mapping[str, WholeModule],
    folder: Path,
    adapter: str,
    save_basis: bool,
    found: Mapping[str, dict[str, Tensor]],
    known: Mapping[str, KnownBase],
) -> None:
    state = state_of(model).of(adapter)
    config = state.config
    method, tensors = FILE_METHODS[config.method], {}
    for module, layer in layers.items():
        U, V, _ = layer.basis(found[module]["S0"].numel())
        values = found[module] | ({"U": U, "V": V} if save_basis else {})
        check_finite(module, values)
        for kind, value in values.items():
            tensors[method.key(module, kind)] = value.detach().to("cpu").contiguous()
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        described = [
            pool.submit(_describe, name, layer, adapter, found[name], known[name]) for name, layer in layers.items()
        ]
        modules = [each.result() for each in described]
    for entry in modules:
        check_describable(entry)
    saved = {where: each.values(adapter) for where, each in wholes.items()}
    for where, values in saved.items():
        check_finite(where, values)
    others = {method.other_key(f"{where}.{key}"): t for where, values in saved.items() for key, t in values.items()}
    tensors |= {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in others.items()}
    description = Description(
        folder / CONFIG_FILE,
        method,
        _options(model, config, save_basis),
        save_basis,
        {entry["name"]: entry for entry in modules},
        others=tuple(sorted(others)),
        basis=state.basis,
        whole=tuple(describe_whole(where, values) for where, values in saved.items()) or None,
        read=tuple(read_layers(uncompiled(model), layers, state_of(model).readers.names)),
    )
    write_adapter(folder, tensors, description.contents(), read_back)
    keep_card(info_of(folder, description, config))
