# SPDX-License-Identifier: Apache-2.0
"""An adapter's way into a model and out of it: decompose, wrap, freeze; and all of it back."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from osora.config import AdapterConfig, OsoraConfig
from osora.layers.adapted import DEFAULT, AdaptedLinear
from osora.layers.formulas import formula_of
from osora.layers.linears import make_layer
from osora.layers.quantised import allow_packing, keep_order
from osora.layers.undo import AllOrNothing
from osora.model.decompose import as_asked, decompose_targets, notes_of
from osora.model.fresh import CURE, fresh_parts, warn_of_fresh
from osora.model.merge import merge_layers
from osora.model.state import (
    AdapterState,
    State,
    adapted_layers,
    all_layers,
    check_new_name,
    forget,
    refuse_if_adapted,
    refuse_sharded,
    remember,
    state_of,
)
from osora.model.targets import Target, find_targets, uncompiled
from osora.model.together import follow_calls
from osora.svd.certificate import Unconverged


def _replace(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(uncompiled(model).get_submodule(parent), last, module)


Layers = list[tuple[Target, AdaptedLinear]]


def install(model: nn.Module, layers: Layers, name: str, adapter: AdapterState) -> None:
    """Wrap the targets in their finished layers and freeze everything else: the model's first adapter."""
    required_grad = {name: p.requires_grad for name, p in uncompiled(model).named_parameters()}
    with AllOrNothing(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for target, layer in layers:
            _replace(model, target.names, layer)
        remember(model, State(required_grad, name, {name: adapter}, keep_order(model)))
        adapter.begin(model, name)


def install_beside(model: nn.Module, layers: Layers, name: str, adapter: AdapterState) -> None:
    """A further adapter, which waits: ``layers`` are the new ones; those that were there have its o and s already."""
    for target, layer in layers:
        layer.select_adapter(None)
        layer.requires_grad_(False)
        _replace(model, target.names, layer)
    state_of(model).adapters[name] = adapter
    adapter.begin(model, name)


def unwrap(model: nn.Module, layers: Iterable[AdaptedLinear]) -> None:
    """Put their base layers back in their places, under every name they have."""
    identities = {id(layer) for layer in layers}
    for name, module in list(uncompiled(model).named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLinear) and id(module) in identities:
            _replace(model, [name], module.base_layer)


def attach(
    model: nn.Module,
    config: AdapterConfig | None = None,
    *,
    name: str = DEFAULT,
    max_memory: int | None = None,
    unconverged: Unconverged = "warn",
    progress: bool | None = None,
) -> nn.Module:
    """Give ``model`` an adapter, in place, and freeze everything else.

    The output is unchanged: the adapter starts as nothing. On a CPU that holds bit for bit, on a GPU up to the kernels
    that cuBLAS chooses for the products. If anything is wrong with the model or the
    config, an error comes before the model is touched.

    Args:
        model: any ``nn.Module`` with linear layers.
        config: an :class:`osora.OsoraConfig` or :class:`osora.SorsaConfig`; by default OSoRA on every
            linear layer but the output head, at rank 64.
        name: the adapter's, to tell it from those that osora.add_adapter and osora.load_adapter put beside it.
        max_memory: bytes that a decomposition may take beyond the weights and the factors, None for no limit; see
            :func:`osora.svd_plan`. Fewer weights are in work at the same time if need be.
        unconverged: "warn" or "raise" when a decomposition misses ``config.tol``.
        progress: a progress bar; by default only on a terminal.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no target, a tied weight, NaN in a weight, one that does not fit in max_memory, one made in
            inference mode, an adapter already there, a model in DistributedDataParallel already.
        TypeError: a quantised or integer weight.
        osora.ConvergenceError: see ``unconverged``.
    """
    serving = torch.is_inference_mode_enabled()
    with torch.inference_mode(False):  # what is made here is to be trained, whatever the mode around it
        return _attach(model, config, name, max_memory, unconverged, progress, serving)


def _attach(
    model: nn.Module,
    config: AdapterConfig | None,
    name: str,
    max_memory: int | None,
    unconverged: Unconverged,
    progress: bool | None,
    serving: bool,
) -> nn.Module:
    config = OsoraConfig() if config is None else config
    formula = formula_of(config)
    refuse_if_adapted(model)
    check_new_name(model, name)
    began = time.perf_counter()
    fresh = fresh_parts(model)
    targets = find_targets(model, config, fresh)
    whole = {target.name: target.module for target in targets}
    refuse_sharded(whole, "decomposed", "attach the adapter before the model is sharded")
    for target in targets:
        weight: Any = target.module.weight
        if weight.is_inference() and not serving:
            raise ValueError(
                f"{target.name}.weight was made within torch.inference_mode(), and nothing can be trained on it: load "
                "the model outside of it (torch.no_grad() serves as well)"
            )
    warn_of_fresh(fresh, CURE, stacklevel=4)
    layers = []
    for target, factors in decompose_targets(
        targets, config, max_memory=max_memory, unconverged=unconverged, progress=progress
    ):
        target, factors = as_asked(target, factors, config)
        layers.append((target, make_layer(target.module, factors, formula, config.dropout, name)))
    notes = notes_of(target for target, _ in layers)
    install(model, layers, name, AdapterState(config, time.perf_counter() - began, notes))
    return model


def detach(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """Take every adapter off, in place: the very modules and tensors that were there, trainable or not as they were.

    Args:
        model: a model with an adapter, merged or not.
        merged: leave the active adapter's merged weights in place of the base weights, as a plain model to save or
            serve. Quantised ones are merged first, by ``osora.merge(model, requantize=True)``.

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
        unwrap(model, all_layers(model).values())
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
    layers = list(all_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged: call osora.unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
