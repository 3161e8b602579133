# SPDX-License-Identifier: Apache-2.0
"""Whether a saved adapter belongs to a base on disk, and whether its basis is what it claims to be."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from osora.files.base_folder import BaseFolder
from osora.files.format import DTYPES
from osora.files.info import SavedModule, info_of_saved
from osora.files.load import load_layers
from osora.files.tensors import read_adapter
from osora.layers.adapted import AdaptedLinear
from osora.layers.base_weight import oriented_weight
from osora.layers.fingerprint import rounding_unit, weight_digest
from osora.model.state import all_layers
from osora.svd.plan import rounding_floor


@dataclass(frozen=True)
class ModuleCheck:
    """What one layer's basis is, measured in float64 against the base weight."""

    name: str
    key: str
    """The weight's name in the checkpoint."""
    same_bits: bool
    """Whether the weight has the values it had at training, to the last bit; else it was rounded to another dtype."""
    residual: float
    """The largest ``‖Wᵀuᵢ − σᵢvᵢ‖ / σᵢ``."""
    certified: float
    """What the file says that it is."""
    allowed: float
    """The certified residual, and what rounding the vectors to the weight's dtype adds."""
    orthonormal: float
    """The largest entry of ``UᵀU − 1`` and ``VᵀV − 1``."""

    @property
    def ok(self) -> bool:
        """Whether the basis is as exact as it claims to be."""
        return self.residual <= self.allowed


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_adapter` found."""

    folder: Path
    base: Path
    modules: tuple[ModuleCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer's basis is as exact as it claims to be."""
        return all(module.ok for module in self.modules)

    @property
    def residual(self) -> float:
        """The largest of all layers."""
        return max(module.residual for module in self.modules)


def _largest_entry(basis: Tensor) -> float:
    gram = basis.t() @ basis
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def measured(weight: Tensor, U: Tensor, V: Tensor, S0: Tensor, certified: float, dtype: torch.dtype) -> "Measured":
    """The residual of triplets [d, r], [k, r], [r] of a weight [d, k], in float64, and what rounding allows.

    ``dtype`` is the one that U and V are stored in, ``certified`` the largest residual that is claimed.
    """
    U, V, S0 = U.double(), V.double(), S0.double()
    # Rounding u and v by a unit moves the residual by a unit of σ₁ and of σᵢ, over σᵢ; four of each is never reached.
    # Below the rounding floor a residual may be as large as the floor. A weight of zeros has residuals of 0.
    largest = float(S0.max())
    floor = rounding_floor(weight.shape, weight.dtype) * largest
    above = S0[S0 > floor]
    least = max(float(above.min()) if above.numel() else 0.0, 1e-30 * largest, 1e-300)
    allowed = certified * (1 + 1e-3) + 4 * rounding_unit(dtype) * (largest / least + 1)
    off = torch.linalg.vector_norm(weight.double().t() @ U - V * S0, dim=0)
    off = torch.where(S0 > floor, off, (off - floor).clamp_min(0))
    return Measured(float((off / S0.clamp_min(least)).max()), allowed, max(_largest_entry(U), _largest_entry(V)))


@dataclass(frozen=True)
class Measured:
    """Of one layer's triplets."""

    residual: float
    allowed: float
    orthonormal: float
    """The largest entry of ``UᵀU − I`` and ``VᵀV − I``."""


def _check(saved: SavedModule, key: str, layer: AdaptedLinear) -> ModuleCheck:
    weight = oriented_weight(layer.base_layer).detach()
    dtype = max((layer.U.dtype, DTYPES[saved.dtype]), key=rounding_unit)
    found = measured(weight, *layer.basis(), saved.max_residual, dtype)
    same_bits = weight_digest(weight) == saved.weight_sha256
    return ModuleCheck(saved.name, key, same_bits, found.residual, saved.max_residual, found.allowed, found.orthonormal)


def verify_adapter(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> Verification:
    """Check an adapter against its base on disk: all that loading checks, and the certificate of the SVD anew.

    The model is not loaded; one weight is in memory at a time, in float64.

    Args:
        folder: what :func:`osora.save_adapter` wrote.
        base: folder of the checkpoint in safetensors files.
        max_memory: bytes that computing a basis again may take, as for :func:`osora.attach`.
        progress: a progress bar while a basis is computed again; by default only on a terminal.

    Returns:
        What was measured. Its ``ok`` is False where a stored basis is less exact than its certificate.

    Raises:
        FileNotFoundError: no adapter, or no base folder.
        AdapterError: a damaged adapter; another base; what :func:`osora.load_adapter` refuses.
        ValueError: ``base`` is no checkpoint in safetensors files.
    """
    saved = read_adapter(folder)
    info = info_of_saved(folder, saved)
    checkpoint = BaseFolder(base)
    places = checkpoint.places(info)
    model = load_layers(checkpoint.stand_in(places), saved, max_memory=max_memory, progress=progress)
    layers = all_layers(model)
    return Verification(
        Path(folder),
        Path(base),
        tuple(_check(module, places[module.name].key, layers[module.name]) for module in info.modules),
    )


__all__ = ["Measured", "ModuleCheck", "Verification", "measured", "verify_adapter"]
