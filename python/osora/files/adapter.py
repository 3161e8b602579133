# SPDX-License-Identifier: Apache-2.0
"""Adapters saved from a model, and put on one (docs/format.md).

With its basis an adapter stands alone. Without it, it is what was trained and the singular values, and loading
decomposes the base weights again; either way the base is checked to be the one the adapter was trained on.
"""

import os
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.config import AdapterConfig
from osora.files.card import keep_card
from osora.files.evidence import (
    check_bases,
    check_describable,
    check_finite,
    check_rebuilt,
    check_shared,
    check_stored,
    describe,
)
from osora.files.format import CONFIG_FILE, FILE_METHODS, AdapterError, Description, write_adapter
from osora.files.info import config_of, info_of
from osora.files.readback import read_back
from osora.files.tensors import read_adapter
from osora.layers.adapted import DEFAULT, AdaptedLinear
from osora.layers.base_weight import base_weight
from osora.layers.formulas import formula_of
from osora.layers.linears import make_layer
from osora.layers.undo import AllOrNothing
from osora.model.attach import install, install_beside
from osora.model.decompose import decompose_targets
from osora.model.fresh import CURE, fresh_parts, warn_of_fresh
from osora.model.readers import read_layers
from osora.model.state import (
    AdapterState,
    adapted_layers,
    all_layers,
    check_new_name,
    refuse_if_adapted,
    refuse_if_busy,
    refuse_incomplete,
    refuse_sharded,
    state_of,
)
from osora.model.targets import (
    Target,
    base_modules,
    check_has_values,
    check_is_linear,
    check_not_tied,
    uncompiled,
    weight_holders,
)
from osora.svd.arguments import check_max_memory
from osora.svd.certificate import Decomposition

# -- save ------------------------------------------------------------------------------------------------------------


def _values(layer: AdaptedLinear, adapter: str) -> dict[str, Tensor]:
    """What the adapter trains in the layer, by kind, and S0 of its rank."""
    deltas = {
        kind: tensor.detach().to(layer.S0.dtype)
        for kind, tensor in zip(layer.formula(adapter).kinds, layer.deltas(adapter), strict=True)
    }
    return deltas | {"S0": layer.basis(deltas["s"].numel())[2]}


def _describe(name: str, layer: AdaptedLinear, adapter: str) -> dict[str, Any]:
    values = _values(layer, adapter)
    return describe(
        name,
        layer.base(),
        layer.basis(values["S0"].numel()),
        layer.delta_factors(adapter),
        values,
        layer.certificate,
    )


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
            kilobytes to megabytes and loading computes them again from the base; decompose with ``tol <= 1e-4`` then,
            so that another machine finds the same basis.
        name: which of several adapters; None for the active one. The name itself is not in the file.

    Raises:
        ValueError: no adapter, none of that name, NaN or infinite values in it, a module that has lost it, or a model
            sharded over processes.
        OSError: the folder cannot be written.
    """
    adapter = state_of(model).active if name is None else name
    state = state_of(model).of(adapter)
    layers, method = adapted_layers(model, adapter), FILE_METHODS[state.config.method]
    refuse_incomplete(model, adapter)
    refuse_sharded(layers, "saved")
    tensors: dict[str, Tensor] = {}
    for module, layer in layers.items():
        values = _values(layer, adapter)
        if save_basis:
            U, V, _ = layer.basis(values["S0"].numel())
            values |= {"U": U, "V": V}
        check_finite(module, values)
        for kind, value in values.items():
            tensors[method.key(module, kind)] = value.detach().to("cpu").contiguous()
    if not save_basis and state.config.tol > 1e-4:
        warnings.warn(
            f"saving without the basis, which was decomposed with tol={state.config.tol:g}: another machine may find "
            f"one that differs by as much, and refuse the adapter; attach with {type(state.config).__name__}(tol=1e-4) "
            "to be safe",
            RuntimeWarning,
            stacklevel=2,
        )
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        modules = list(pool.map(lambda item: _describe(item[0], item[1], adapter), layers.items()))
    for described in modules:
        check_describable(described)
    description = Description(
        Path(folder, CONFIG_FILE),
        method,
        _options(model, state.config, save_basis),
        save_basis,
        {module["name"]: module for module in modules},
        read=tuple(read_layers(uncompiled(model), layers, state_of(model).readers.names)),
    )
    write_adapter(Path(folder), tensors, description.contents(), read_back)
    keep_card(info_of(Path(folder), description, state.config))


# -- load ------------------------------------------------------------------------------------------------------------


def _find_module(model: nn.Module, described: Mapping[str, Any], holders: dict[int, set[int]]) -> nn.Module:
    name = described["name"]
    try:
        module = uncompiled(model).get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"the adapter is for {name}, which this model does not have") from error
    if isinstance(module, AdaptedLinear):
        module = module.base_layer
    try:
        check_is_linear(name, module)
        check_has_values(name, module)
        check_not_tied(name, module, holders)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from error
    shape, wanted = base_weight(module).shape, (described["out_features"], described["in_features"])
    if shape != wanted:
        raise AdapterError(f"the adapter's {name} is {list(wanted)}, this model's is {list(shape)}")
    return module


def _find_targets(model: nn.Module, modules: Mapping[str, Mapping[str, Any]], config: AdapterConfig) -> list[Target]:
    """The saved adapter's modules in this model, in the file's order."""
    names_of: dict[int, list[str]] = {}
    for name, module in base_modules(model):
        names_of.setdefault(id(module), []).append(name)
    holders = weight_holders(model)
    targets: list[Target] = []
    for item in modules.values():
        module = _find_module(model, item, holders)
        names = sorted(names_of[id(module)], key=lambda name: name != item["name"])
        if names[0] != item["name"] or any(module is target.module for target in targets):
            raise AdapterError(f"{item['name']} is another name of {names[0]} or of a module named before it")
        targets.append(Target(tuple(names), module, base_weight(module), rank_decomposed(item, config)))
    return targets


def rank_decomposed(described: Mapping[str, Any], config: AdapterConfig) -> int:
    """The rank of the decomposition that a module's triplets are the first of: the same run gives the same bits."""
    if config.rank_for_energy is None:
        return described["rank"]
    most = min(described["out_features"], described["in_features"])
    return max(described["rank"], min(config.rank_for(described["name"]), most))


def _stored_factors(described: Mapping[str, Any], saved: Mapping[str, Tensor]) -> Decomposition:
    residuals = torch.full((described["rank"],), float(described["max_residual"]), dtype=torch.float64, device="cpu")
    return Decomposition(
        described["name"],
        saved["U"],
        saved["S0"],
        saved["V"],
        residuals,
        described["converged"],
        described["passes"],
        described["method"],
    )


def _has_basis(layer: AdaptedLinear | None, rank: int) -> bool:
    return layer is not None and layer.S0.numel() >= rank


@torch.inference_mode(False)
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Put a saved adapter on its base model, in place. If anything is wrong, the model is left as it was.

    With a name it may join adapters that are there. It shares their basis, if that is the one it was trained in, and
    waits: the active adapter stays what it was (:func:`osora.set_adapter`, :func:`osora.adapters_in_batch`).

    Args:
        model: the base model the adapter was trained on; another dtype of it is accepted with a warning.
        folder: what :func:`save_adapter` wrote, or PEFT's ``save_pretrained`` of an adapter of :mod:`osora.peft`.
        name: what to call it. None is for a model without any, where it is called "default".
        max_memory: bytes that computing a basis again may take, as for :func:`osora.attach`.
        progress: a progress bar while a basis is computed again; by default only on a terminal.

    Returns:
        ``model`` itself, with the adapter trainable (one that joined others: frozen) and everything else frozen.

    Raises:
        FileNotFoundError: no adapter in ``folder``.
        AdapterError: a damaged or foreign file; another base; a basis that cannot be computed again, or is not the
            one that the model's other adapters share.
        ValueError: no name is given and the model has an adapter already; the name is taken; the model is merged; a
            weight cannot be decomposed within max_memory.
    """
    began = time.perf_counter()
    check_max_memory(max_memory)
    if name is None:
        refuse_if_adapted(model)
        name = DEFAULT
    check_new_name(model, name)
    refuse_if_busy(model)
    there = {id(layer.base_layer): layer for layer in all_layers(model).values()}
    adapter = read_adapter(folder)
    description, modules = adapter.description, adapter.description.modules
    config = config_of(description)
    formula = formula_of(config)
    targets = _find_targets(model, modules, config)
    warn_of_fresh(fresh_parts(model), CURE, stacklevel=4)
    check_bases(list(modules.values()), [target.module for target in targets], stacklevel=4)

    wanting = [t for t in targets if not _has_basis(there.get(id(t.module)), modules[t.name]["rank"])]
    if description.save_basis:
        factors = {t.name: _stored_factors(modules[t.name], adapter.tensors[t.name]) for t in wanting}
    else:
        rebuilt = decompose_targets(wanting, config, max_memory=max_memory, unconverged="warn", progress=progress)
        factors = {
            target.name: replace(found.leading(modules[target.name]["rank"]), S=adapter.tensors[target.name]["S0"])
            for target, found in rebuilt
        }

    new: list[tuple[Target, AdaptedLinear]] = []
    joined: list[tuple[Target, AdaptedLinear]] = []
    for target in targets:
        item, found, saved = modules[target.name], factors.get(target.name), adapter.tensors[target.name]
        if (layer := there.get(id(target.module))) is not None:
            basis = layer.basis(item["rank"]) if found is None else layer.widened(found)
            change = formula.factors(basis, [t.to(basis[2]) for t in formula.named(saved)])
            check_shared(item, basis, change, saved["S0"], max(config.tol, layer.certificate.max_residual))
            joined.append((target, layer))
            continue
        assert found is not None
        layer = make_layer(target.module, found, formula, config.dropout, name)
        with torch.no_grad():
            layer.S0.copy_(saved["S0"])
            for parameter, value in zip(layer.deltas(name), formula.named(saved), strict=True):
                parameter.copy_(value)
        if description.save_basis:
            check_stored(item, layer.basis(), layer.delta_factors(name), saved["S0"])
        else:
            check_rebuilt(item, layer.basis(), layer.delta_factors(name), saved["S0"], config.tol)
        new.append((target, layer))

    # All is checked: the model changes from here on.
    with AllOrNothing(model):
        for target, layer in joined:
            if target.name in factors:
                layer.widen(factors[target.name])
            saved = adapter.tensors[target.name]
            layer.add_adapter(name, formula, {kind: saved[kind] for kind in formula.kinds})
        put = install_beside if there else install
        put(model, new, name, AdapterState(config, time.perf_counter() - began))
    return model
