# SPDX-License-Identifier: Apache-2.0
"""The second half of attaching on the meta device: a basis's numbers, when the base weights have come."""

import os
from collections.abc import Iterator

import torch
from torch import nn

from osora.files.basis import BasisFolder, from_basis
from osora.files.basis_layer import BasisError
from osora.layers.base_weight import base_weight
from osora.layers.known_base import KnownBase, know_bases
from osora.layers.sharded import all_or_none, is_sharded, ranks_of
from osora.model.decompose import as_asked
from osora.model.state import all_layers, state_of
from osora.model.targets import Target, check_has_values, uncompiled
from osora.svd.certificate import Decomposition


@torch.no_grad()
def restore_basis(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Give an adapter that was attached on the meta device its numbers: those of U, V and S0, and zeros for its change.

    To be called once, when the base weights are loaded (docs/distributed.md), and before a trained adapter's tensors
    are. Where the model is sharded, by all processes. Until then the adapted layers refuse to compute.

    Args:
        model: what :func:`osora.attach` was given, with ``basis``, when its weights were on the meta device.
        folder: that of the same basis.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter; none that waits for its basis; a weight that is on the meta device still.
        osora.BasisError: another basis than that of :func:`osora.attach`, one of another base than the weights that
            were loaded, or a damaged one; no layer is changed then.
        FileNotFoundError: no basis there.
        RuntimeError: the model is sharded, and another process has failed, or not called this.
    """
    state, basis = state_of(model).current, BasisFolder(folder)
    layers = {name: layer for name, layer in all_layers(model).items() if layer.awaits_basis}
    if not layers:
        raise ValueError("this model's adapter has its basis: restore_basis is for one attached on the meta device")
    if state.basis is None or state.basis.fingerprint != basis.fingerprint:
        wanted = state.basis.folder if state.basis is not None else "none"
        raise BasisError(f"{basis.folder} is not the basis that the adapter was attached with (that was {wanted})")
    every: dict[int, list[str]] = {id(layer): [] for layer in layers.values()}
    for name, module in uncompiled(model).named_modules(remove_duplicate=False):
        if id(module) in every:
            every[id(module)].append(name)
    targets = []
    for name, layer in layers.items():
        check_has_values(name, layer.base_layer)
        weight = base_weight(layer.base_layer)
        if weight.dtype != layer.U.dtype:
            raise BasisError(
                f"{name}.weight is in {weight.dtype} now, and was in {layer.U.dtype} when the adapter was attached: "
                "make the model on the meta device in the dtype of its weights"
            )
        targets.append(Target(tuple(every[id(layer)]), layer.base_layer, weight, layer.S0.numel()))
    parts = [layer.base_layer.weight for layer in layers.values() if is_sharded(layer.base_layer.weight)]  # type: ignore[arg-type]
    bases: dict[str, KnownBase] = {}
    with all_or_none(ranks_of(parts[0]) if parts else [], "restore_basis", basis.fingerprint):  # type: ignore[arg-type]
        source = from_basis(
            basis, targets, config=state.config, missing="raise", unconverged="warn", rest=_nothing, bases=bases
        )
        found = {target.name: as_asked(target, factors, state.config)[1] for target, factors in source}
    for name, layer in layers.items():
        factors = found[name].leading(layer.S0.numel())
        if layer.U.is_meta:  # nothing has made it real: the weights were put in the place of the ones on meta
            layer.to_empty(device=base_weight(layer.base_layer).device, recurse=False)
        for own, kept in ((layer.U, factors.U), (layer.V, factors.V), (layer.S0, factors.S)):
            own.copy_(kept)
        for adapter in layer.adapters():
            for parameter in layer.deltas(adapter):
                parameter.zero_()
        layer.known, layer.awaits_basis = bases.get(name), False
    know_bases({name: layer for name, layer in layers.items() if layer.known is None})
    return model


def _nothing(targets: list[Target]) -> Iterator[tuple[Target, Decomposition]]:
    raise AssertionError('missing="raise" leaves none')


__all__ = ["restore_basis"]
