# SPDX-License-Identifier: Apache-2.0
"""Whether a basis on disk is whole, of its base, and as exact as it claims to be."""

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from osora.config import AdapterConfig, OsoraConfig
from osora.files.base_folder import BaseFolder
from osora.files.basis import BasisFolder
from osora.files.basis_layer import BasisError
from osora.files.format import DTYPES
from osora.files.verify import measured
from osora.initialisation.layers import SourceModel
from osora.initialisation.tree import snapshot
from osora.layers import fingerprint
from osora.layers.base_weight import dense_weight


@dataclass(frozen=True)
class LayerCheck:
    """What :func:`check_basis` measured of one layer."""

    name: str
    residual: float
    """``‖Wᵀuᵢ − σᵢvᵢ‖ / σᵢ`` in float64, the largest of its triplets."""
    certified: float
    """The largest residual that the basis claims."""
    allowed: float
    """The claim, and what rounding U and V to their dtype may add."""
    orthonormal: float
    """The largest entry of ``UᵀU − I`` and ``VᵀV − I``."""

    @property
    def ok(self) -> bool:
        """Whether the layer is as exact as it claims to be."""
        return self.residual <= self.allowed


@dataclass(frozen=True)
class BasisCheck:
    """What :func:`check_basis` found."""

    folder: Path
    fingerprint: str
    layers: int
    measured: tuple[LayerCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether all that was measured is as exact as it claims to be."""
        return all(layer.ok for layer in self.measured)


def check_basis(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    sample: int | None = 8,
    seed: int = 0,
    model: nn.Module | None = None,
) -> BasisCheck:
    """Check a finished basis against its checkpoint: every file is read, and some layers' certificates taken anew.

    Args:
        folder: of the basis.
        base: folder of the checkpoint.
        sample: how many layers are measured, drawn by ``seed``; None for all. Of each its weight is read, compared
            with the basis's fingerprint, and the residuals of its triplets taken in float64.
        seed: of the draw.
        model: as for :func:`osora.initialise`.

    Returns:
        What was measured. Its ``ok`` is False where a layer is less exact than its certificate.

    Raises:
        FileNotFoundError: no finished basis, or a file of it is gone; no checkpoint.
        BasisError: a file is damaged, or the basis is another base's.
        ValueError: no checkpoint in safetensors files, or another model's.
    """
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 0):
        raise ValueError(f"sample must be a number of layers or None, got {sample!r}")
    basis = BasisFolder(folder)
    names = list(basis.layers)
    chosen = (
        names if sample is None else sorted(random.Random(seed).sample(names, min(sample, len(names))), key=names.index)
    )
    for name in names:
        basis.read(name)
    found = []
    if chosen:
        source = SourceModel(BaseFolder(snapshot(Path(base))), _exactly(names), model)
        layers = {layer.name: layer for layer in source.layers}
        for name in chosen:
            entry, triplets = basis.layers[name].entry, basis.read(name)
            weight = dense_weight(source.read(layers[name])).detach().to(DTYPES[entry.dtype])
            if fingerprint.weight_digest(weight) != entry.weight_sha256:
                raise BasisError(f"{basis.folder} is of another base: {name}.weight is not the weight it was made of")
            certified = triplets.certificate.max_residual
            result = measured(weight, triplets.U, triplets.V, triplets.S, certified, DTYPES[entry.dtype])
            found.append(LayerCheck(name, result.residual, certified, result.allowed, result.orthonormal))
    return BasisCheck(basis.folder, basis.fingerprint, len(names), tuple(found))


def _exactly(names: list[str]) -> AdapterConfig:
    """A config whose targets are the modules of these names and no others."""
    return OsoraConfig(r=1, target_modules="|".join(map(re.escape, names)))


__all__ = ["BasisCheck", "LayerCheck", "check_basis"]
