# SPDX-License-Identifier: Apache-2.0
"""Giving a model its first adapter: its triplets are decomposed here and now, or read from a basis that was kept."""

import os
from collections.abc import Iterator
from functools import partial

from torch import nn

from osora.config import AdapterConfig, OsoraConfig
from osora.files.basis import BasisFolder, Missing, from_basis
from osora.layers.adapted import DEFAULT
from osora.layers.known_base import KnownBase
from osora.model.attach import attach_from
from osora.model.decompose import decompose_targets
from osora.model.state import refuse_late
from osora.model.targets import Target
from osora.svd.arguments import check_max_memory, check_unconverged
from osora.svd.certificate import Decomposition, Unconverged


def attach(
    model: nn.Module,
    config: AdapterConfig | None = None,
    *,
    name: str = DEFAULT,
    basis: str | os.PathLike[str] | None = None,
    missing: Missing = "raise",
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
        basis: folder of a basis of this very base, as :func:`osora.initialise` writes it: each layer's leading triplets
            are read from there instead of being computed, and ``config.seed`` plays no part. With it the base may be
            sharded already, by FSDP2 or by ZeRO 3 in ``from_pretrained``, if all processes call this
            (docs/distributed.md).
        missing: what to do with layers that the basis does not have: "raise", or "compute" them.
        max_memory: bytes that a decomposition may take beyond the weights and the factors, None for no limit; see
            :func:`osora.svd_plan`. Fewer weights are in work at the same time if need be.
        unconverged: "warn" or "raise" when a decomposition misses ``config.tol``.
        progress: a progress bar; by default only on a terminal.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no target, a tied weight, NaN in a weight, one that does not fit in max_memory, one made in
            inference mode, an adapter already there, a model in DistributedDataParallel already, or one that is sharded
            and has no basis.
        TypeError: a quantised or integer weight.
        osora.BasisError: the basis is of another base, lacks a layer, has too small a rank, is less exact than
            ``config.tol``, or is damaged.
        FileNotFoundError: no finished basis in that folder.
        RuntimeError: the base is sharded, and another process has failed, another basis, or not called this.
        osora.ConvergenceError: see ``unconverged``.
    """
    config = OsoraConfig() if config is None else config
    check_max_memory(max_memory)
    check_unconverged(unconverged)
    if basis is None and missing != "raise":
        raise ValueError(f"missing={missing!r} is for layers that a basis lacks, and basis is None")
    compute = partial(
        decompose_targets, config=config, max_memory=max_memory, unconverged=unconverged, progress=progress
    )
    if basis is None:
        attach_from(model, config, name, compute, None, stacklevel=3)
        return model
    folder = BasisFolder(basis)

    def rest(targets: list[Target]) -> Iterator[tuple[Target, Decomposition]]:
        refuse_late(model, {target.name: target.module for target in targets}, "decomposed")
        return compute(targets)

    bases: dict[str, KnownBase] = {}
    kept = partial(from_basis, folder, config=config, missing=missing, unconverged=unconverged, rest=rest, bases=bases)
    attach_from(model, config, name, kept, folder.note, stacklevel=3, bases=bases)
    return model


__all__ = ["attach"]
