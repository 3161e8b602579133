# SPDX-License-Identifier: Apache-2.0
"""Saved adapters put on a model (docs/format.md): the base is checked to be the one the adapter was trained on."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from osora.config import AdapterConfig
from osora.files.evidence import (
    check_bases,
    check_rebuilt,
    check_shared,
    check_stored,
)
from osora.files.format import AdapterError
from osora.files.info import config_of
from osora.files.rebuilt import rebuilt_factors
from osora.files.saved_whole import find_saved_whole, saved_copies
from osora.files.tensors import SavedAdapter, read_adapter
from osora.layers.adapted import DEFAULT, AdaptedLinear
from osora.layers.base_weight import base_weight
from osora.layers.formulas import formula_of
from osora.layers.known_base import KnownBase, know_bases
from osora.layers.linears import make_layer
from osora.layers.undo import AllOrNothing
from osora.model.attach import install, install_beside
from osora.model.decompose import decompose_targets
from osora.model.fresh import cure_of, fresh_parts, warn_of_fresh
from osora.model.state import (
    AdapterState,
    all_layers,
    check_new_name,
    refuse_if_adapted,
    refuse_if_busy,
    refuse_late,
)
from osora.model.targets import (
    Target,
    base_modules,
    check_has_values,
    check_is_linear,
    check_not_tied,
    check_not_whole,
    refuse_wrapped,
    uncompiled,
    weight_holders,
    whole_modules,
    within,
)
from osora.model.whole_modules import whole_names
from osora.svd.arguments import check_max_memory
from osora.svd.certificate import Decomposition


def _find_module(model: nn.Module, described: Mapping[str, Any], holders: dict[int, set[int]]) -> nn.Module:
    name = described["name"]
    try:
        check_not_whole([name], whole_modules(model))
    except ValueError as error:
        raise AdapterError(str(error)) from error
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
    basis: str | os.PathLike[str] | None = None,
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
        basis: folder of the basis it came from (osora.attach's ``basis``), for a file without U and V; None looks where
            the file says, and computes it again where that is gone.
        max_memory: bytes that computing a basis again may take, as for :func:`osora.attach`.
        progress: a progress bar while a basis is computed again; by default only on a terminal.

    Returns:
        ``model`` itself, with the adapter trainable (one that joined others: frozen) and everything else frozen.

    Raises:
        FileNotFoundError: no adapter in ``folder``.
        AdapterError: a damaged or foreign file; another base; a basis that cannot be computed again, or is not the
            one that the model's other adapters share.
        BasisError: ``basis`` is damaged, or not one of this adapter.
        ValueError: no name is given and the model has an adapter already; the name is taken; the model is merged; a
            weight cannot be decomposed within max_memory.
    """
    check_max_memory(max_memory)
    if name is None:
        refuse_if_adapted(model)
        name = DEFAULT
    check_new_name(model, name)
    refuse_if_busy(model)
    refuse_wrapped(model)
    return _put_on(model, read_adapter(folder), name, basis, max_memory, progress)


@torch.inference_mode(False)
def load_layers(
    model: nn.Module, adapter: SavedAdapter, *, max_memory: int | None = None, progress: bool | None = None
) -> nn.Module:
    """:func:`load_adapter` for a model that has the adapted layers alone, and not the modules trained whole."""
    check_max_memory(max_memory)
    return _put_on(model, replace(adapter, whole={}), DEFAULT, None, max_memory, progress)


def _put_on(
    model: nn.Module,
    adapter: SavedAdapter,
    name: str,
    basis: str | os.PathLike[str] | None,
    max_memory: int | None,
    progress: bool | None,
) -> nn.Module:
    began = time.perf_counter()
    there = {id(layer.base_layer): layer for layer in all_layers(model).values()}
    description, modules = adapter.description, adapter.description.modules
    if basis is not None and description.save_basis:
        raise ValueError(f"{description.path.parent} has its basis in its file: basis= is for one that has none")
    config = config_of(description)
    formula = formula_of(config)
    targets = _find_targets(model, modules, config)
    wholes = find_saved_whole(model, adapter)
    refuse_late(model, {target.name: target.module for target in targets}, "checked")
    lost = [part for part in fresh_parts(model) if within(part, whole_names(wholes)) is None]
    warn_of_fresh(lost, cure_of(lost), stacklevel=5)
    check_bases(list(modules.values()), [target.module for target in targets], stacklevel=5)

    wanting = [t for t in targets if not _has_basis(there.get(id(t.module)), modules[t.name]["rank"])]
    if description.save_basis:
        factors = {t.name: _stored_factors(modules[t.name], adapter.tensors[t.name]) for t in wanting}
    else:
        compute = partial(
            decompose_targets, config=config, max_memory=max_memory, unconverged="warn", progress=progress
        )
        rebuilt = rebuilt_factors(wanting, adapter.description, config, basis, compute)
        factors = {
            target.name: replace(found.leading(modules[target.name]["rank"]), S=adapter.tensors[target.name]["S0"])
            for target, found in rebuilt
        }

    new: list[tuple[Target, AdaptedLinear]] = []
    joined: list[tuple[Target, AdaptedLinear]] = []
    for target in targets:
        item, found, saved = modules[target.name], factors.get(target.name), adapter.tensors[target.name]
        if (layer := there.get(id(target.module))) is not None:
            shared = layer.basis(item["rank"]) if found is None else layer.widened(found)
            change = formula.factors(shared, [t.to(shared[2]) for t in formula.named(saved)])
            check_shared(item, shared, change, saved["S0"], max(config.tol, layer.certificate.max_residual))
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
        layer.known = KnownBase.read(item, target.module)
        new.append((target, layer))
    know_bases({target.name: layer for target, layer in new if layer.known is None})

    copies = saved_copies(model, wholes, adapter, name)
    # All is checked: the model changes from here on.
    with AllOrNothing(model):
        for target, layer in joined:
            if target.name in factors:
                layer.widen(factors[target.name])
            saved = adapter.tensors[target.name]
            layer.add_adapter(name, formula, {kind: saved[kind] for kind in formula.kinds})
        put = install_beside if there else install
        whole = [each.name for each in wholes]
        state = AdapterState(config, time.perf_counter() - began, whole=whole, basis=description.basis)
        put(model, new, copies, name, state)
    return model
