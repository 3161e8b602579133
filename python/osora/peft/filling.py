# SPDX-License-Identifier: Apache-2.0
"""What a new adapter's tensors start as: a shared basis, a decomposition (all of a shape at once), or a file's."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from osora.files.basis import BasisFolder, from_basis
from osora.files.evidence import certificate_of, check_bases
from osora.files.format import AdapterError, Description
from osora.files.load import rank_decomposed
from osora.files.rebuilt import noted_basis
from osora.layers.base_weight import base_weight, dense_weight
from osora.layers.formulas import owned
from osora.model.attach import Source
from osora.model.decompose import decompose_targets, rank_note, with_enough
from osora.model.targets import Target
from osora.peft.config import AdapterConfig
from osora.peft.layer import AdapterLayer

log = logging.getLogger("osora")


def _target(layer: AdapterLayer, rank: int) -> Target:
    return Target((layer.name,), layer.base_layer, base_weight(layer.base_layer), rank)


def empty_basis(layer: AdapterLayer, name: str) -> None:
    """A basis of NaN for an adapter whose changes are there, to be filled by what follows or from a file."""
    weight, rank, nan = base_weight(layer.base_layer), layer.box("s")[name].weight.numel(), float("nan")
    shapes = (layer.out_features, rank), (layer.in_features, rank)
    U, V = (torch.full(shape, nan, dtype=weight.dtype, device=weight.device) for shape in shapes)
    layer.put_basis(name, (U, V, torch.full((rank,), nan, dtype=layer.exact, device=weight.device)))


def fill(layers: Sequence[AdapterLayer], name: str, config: AdapterConfig) -> None:
    """A fresh adapter's bases: those of other adapters where they are wide and exact enough, else new ones."""
    wanting = {}
    for layer in layers:
        rank = layer.box("S0")[name].numel()
        wide = (
            ()
            if config.basis is not None
            else [other for other in layer.widest() if other != name and _suits(layer, other, rank, config.tol)]
        )
        if wide:
            U, V, S0 = layer.basis(wide[0])
            layer.adapters[name].certificate = layer.adapters[wide[0]].certificate
            layer.put_basis(name, (U[:, :rank], V[:, :rank], S0[:rank]))
            _fit(layer, name, config)
        else:
            wanting[layer.name] = layer
    targets = [_target(layer, layer.box("S0")[name].numel()) for layer in wanting.values()]
    for target, factors in _source(config, config.basis)(targets):
        wanting[target.name].put_factors(name, factors)
        if note := rank_note(factors):
            log.info("%s: %s", target.name, note)
        _fit(wanting[target.name], name, config)
        U, V, S0 = wanting[target.name].basis(name)
        wanting[target.name].put_basis(name, (owned(U), owned(V), owned(S0)))
    if not config.init_weights:
        for layer in layers:
            _disturb(layer, name)


def _source(config: AdapterConfig, kept: str | BasisFolder | None, known: Mapping[str, str] | None = None) -> Source:
    """What gives targets their triplets: a basis that was kept, or a decomposition.

    ``known`` are the digests of weights that somebody has looked at, of a saved adapter: what its basis lacks was
    computed when it was made, and is again.
    """
    native = config.native()
    compute = partial(decompose_targets, config=native, max_memory=None, unconverged="warn", progress=None)
    if kept is None:
        return compute
    basis = kept if isinstance(kept, BasisFolder) else BasisFolder(kept)
    config.came_from(basis.note)
    missing: Any = config.missing if known is None else "compute"
    source = partial(from_basis, basis, config=native, missing=missing, unconverged="warn", rest=compute)
    return source if known is None else partial(source, known=known)


def _suits(layer: AdapterLayer, other: str, rank: int, tol: float) -> bool:
    there = layer.adapters[other]
    return there.awaited is None and layer.box("S0")[other].numel() >= rank and there.certificate.max_residual <= tol


def _fit(layer: AdapterLayer, name: str, config: AdapterConfig) -> None:
    """Down to the rank that holds the share of energy which is asked for."""
    if config.rank_for_energy is None:
        return
    U, V, S0 = layer.basis(name)
    norm = torch.linalg.vector_norm(dense_weight(layer.base()).detach(), dtype=torch.float64)
    rank = with_enough(_target(layer, S0.numel()), S0, norm, config.rank_for_energy).rank
    if rank == S0.numel():
        return
    on = [parameter.requires_grad for parameter in layer.deltas(name)]
    layer.add(name, layer.adapters[name], rank)
    layer.put_basis(name, (U[:, :rank], V[:, :rank], S0[:rank]))
    for parameter, requires_grad in zip(layer.deltas(name), on, strict=True):
        parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _disturb(layer: AdapterLayer, name: str) -> None:
    """Random changes of a tenth: of scales around 1, of singular values, of entries of unit vectors."""
    sizes = {"o": 1.0, "s": layer.basis(name)[2], "u": layer.out_features**-0.5, "v": layer.in_features**-0.5}
    for kind, parameter in zip(layer.adapters[name].formula.kinds, layer.deltas(name), strict=True):
        if not parameter.is_meta:
            parameter.normal_(std=0.1).mul_(sizes[kind])


def await_file(layers: Sequence[AdapterLayer], name: str, config: AdapterConfig, description: Description) -> None:
    """Check the base, and compute the bases that are not in the file; what is will come, and be checked then.

    Raises:
        osora.AdapterError: a module that the model does not have, or another base.
    """
    if description.method.name != config.method:
        raise AdapterError(f"the adapter is one of {description.method.name}, not of {config.method}")
    if missing := sorted(set(description.modules) - {layer.name for layer in layers}):
        raise AdapterError(f"the adapter is for {missing[0]}, which this model does not have as a linear layer")
    items = [description.modules[layer.name] for layer in layers]
    config.came_from(description.basis)
    check_bases(items, [layer.base() for layer in layers], stacklevel=8)
    if description.save_basis:
        return
    native, there = config.native(), {layer.name: layer for layer in layers}
    kept = BasisFolder(config.basis) if config.basis is not None else None
    if kept is None and description.basis is not None:
        kept = noted_basis(description.basis)
    known = {item["name"]: item["weight_sha256"] for item in items}
    ranks = [item["rank"] if kept is not None else rank_decomposed(item, native) for item in items]
    targets = [_target(layer, rank) for layer, rank in zip(layers, ranks, strict=True)]
    for target, factors in _source(config, kept, known)(targets):
        layer, item = there[target.name], description.modules[target.name]
        layer.put_factors(name, factors.leading(item["rank"]))
        layer.adapters[name].certificate = certificate_of(item)
        layer.box("S0")[name].fill_(float("nan"))  # it is in the file
        layer.adapters[name].rebuilt = True


__all__ = ["await_file", "empty_basis", "fill"]
