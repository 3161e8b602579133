# SPDX-License-Identifier: Apache-2.0
"""An adapter's way into a model and out of it: wrap, freeze; and all of it back."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn

from osora.config import AdapterConfig
from osora.layers.adapted import AdaptedLinear
from osora.layers.formulas import formula_of
from osora.layers.known_base import KnownBase, know_bases
from osora.layers.late import average_late
from osora.layers.linears import make_layer
from osora.layers.quantised import allow_packing, keep_order
from osora.layers.sharded import all_or_none, is_sharded, ranks_of
from osora.layers.undo import AllOrNothing
from osora.layers.whole_module import WholeModule
from osora.model.decompose import as_asked, notes_of
from osora.model.fresh import cure_of, fresh_parts, warn_of_fresh
from osora.model.merge import merge_layers
from osora.model.state import (
    AdapterState,
    BasisNote,
    State,
    adapted_layers,
    all_layers,
    check_new_name,
    forget,
    refuse_if_adapted,
    refuse_late,
    remember,
    state_of,
)
from osora.model.targets import Target, find_targets, uncompiled, whole_modules, within
from osora.model.together import follow_calls
from osora.model.whole_modules import Copy, find_whole, whole_names
from osora.svd.certificate import Decomposition


def _replace(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(uncompiled(model).get_submodule(parent), last, module)


Layers = list[tuple[Target, AdaptedLinear]]


def install(model: nn.Module, layers: Layers, wholes: Iterable[Copy], name: str, adapter: AdapterState) -> None:
    """Put the finished layers and copies in their places and freeze everything else: the model's first adapter."""
    required_grad = {name: p.requires_grad for name, p in uncompiled(model).named_parameters()}
    with AllOrNothing(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for target, layer in layers:
            _replace(model, target.names, layer)
        for each in wholes:
            each.put(model)
        remember(model, State(required_grad, name, {name: adapter}, keep_order(model)))
        adapter.begin(model, name)


def install_beside(model: nn.Module, layers: Layers, wholes: Iterable[Copy], name: str, adapter: AdapterState) -> None:
    """A further adapter, which waits: ``layers`` are the new ones; those that were there have its o and s already."""
    for target, layer in layers:
        layer.select_adapter(None)
        layer.requires_grad_(False)
        _replace(model, target.names, layer)
    for each in wholes:
        whole = each.put(model)
        whole.select_adapter(state_of(model).active)
        whole.copy_of(name).requires_grad_(False)
    state_of(model).adapters[name] = adapter
    adapter.begin(model, name)


def unwrap(model: nn.Module, layers: Iterable[AdaptedLinear | WholeModule], merged: bool = False) -> None:
    """Put their base layers back in their places, under every name they have.

    ``merged`` leaves what the active adapter has made of them: a module that was trained whole is then its copy.
    """
    identities = {id(layer) for layer in layers}
    for name, module in list(uncompiled(model).named_modules(remove_duplicate=False)):
        if id(module) not in identities:
            continue
        if isinstance(module, WholeModule) and merged:
            _replace(model, [name], module.answering())
        elif isinstance(module, AdaptedLinear | WholeModule):
            _replace(model, [name], module.base_layer)


Source = Callable[[list[Target]], Iterable[tuple[Target, Decomposition]]]
"""Gives targets' factors, in any order."""


def attach_from(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    source: Source,
    basis: BasisNote | None,
    stacklevel: int,
    bases: Mapping[str, KnownBase] = MappingProxyType({}),
) -> None:
    """Find the targets, wrap them with the factors that ``source`` gives, freeze the rest; see :func:`osora.attach`.

    ``bases`` has what ``source`` has learnt of base weights when it has ended: of each that is sharded.
    """
    serving = torch.is_inference_mode_enabled()
    with torch.inference_mode(False):  # what is made here is to be trained, whatever the mode around it
        formula = formula_of(config)
        refuse_if_adapted(model)
        check_new_name(model, name)
        began = time.perf_counter()
        fresh = fresh_parts(model)
        wholes = find_whole(model, config.modules_to_save)
        names = whole_names(wholes)
        targets = find_targets(model, config, fresh, names)
        modules = {t.name: t.module for t in targets} | {w.name: w.module for w in wholes}
        refuse_late(model, {w.name: w.module for w in wholes}, "copied")
        refuse_late(model, modules, "decomposed", kept=basis is not None)
        for where, module in modules.items():
            for key, weight in module.named_parameters():
                if weight.is_inference() and not serving:
                    raise ValueError(
                        f"{where}.{key} was made within torch.inference_mode(), and nothing can be trained on it: load "
                        "the model outside of it (torch.no_grad() serves as well)"
                    )
        lost = [part for part in fresh if within(part, names) is None]
        warn_of_fresh(lost, cure_of(lost), stacklevel + 1)
        layers: Layers = []
        parts = [target.module.weight for target in targets if is_sharded(target.module.weight)]  # type: ignore[arg-type]
        ranks = ranks_of(parts[0]) if parts else []  # type: ignore[arg-type]
        with all_or_none(ranks, "attach", basis.fingerprint if basis is not None else ""):
            for target, factors in source(targets):
                target, factors = as_asked(target, factors, config)
                layers.append((target, make_layer(target.module, factors, formula, config.dropout, name)))
        for target, layer in layers:
            layer.known = bases.get(target.name)
        there = {target.name: layer for target, layer in layers if not layer.awaits_basis}
        notes = notes_of(target for target, _ in layers)
        know_bases({name: layer for name, layer in there.items() if layer.known is None})
        copies, trained = [whole.placed(None, name) for whole in wholes], [whole.name for whole in wholes]
        state = AdapterState(config, time.perf_counter() - began, notes, trained, basis=basis)
        install(model, layers, copies, name, state)
        average_late(layer for _, layer in layers)


def detach(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """Take every adapter off, in place: the very modules and tensors that were there, trainable or not as they were.

    Args:
        model: a model with an adapter, merged or not.
        merged: leave the active adapter's merged weights in place of the base weights, and its copies in place of the
            modules that it trained whole, as a plain model to save or serve. Quantised weights are merged first, by
            ``osora.merge(model, requantize=True)``.

    Returns:
        ``model`` itself.
    """
    state = state_of(model)
    layers = adapted_layers(model)
    with AllOrNothing(model, others=(state,)):
        if merged:
            merge_layers({name: layer for name, layer in layers.items() if not layer.merged})
        else:
            for layer in layers.values():
                if layer.merged:
                    layer.unmerge()
        unwrap(model, [*all_layers(model).values(), *whole_modules(model).values()], merged)
        allow_packing(state.in_order)
        follow_calls(model)
        forget(model)
        for name, parameter in uncompiled(model).named_parameters():
            parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the model is its base, bit for bit (a reference model for DPO, say). Raises ValueError if merged."""
    state_of(model)
    adapted = all_layers(model).values()
    if any(layer.merged for layer in adapted):
        raise ValueError("the adapter is merged: call osora.unmerge(model) first")
    layers: list[AdaptedLinear | WholeModule] = [*adapted, *whole_modules(model).values()]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
