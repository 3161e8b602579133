# SPDX-License-Identifier: Apache-2.0
"""How much of a weight its leading singular triplets hold, and how many of them hold enough."""

from typing import NamedTuple

import torch
from torch import Tensor

from osora.svd.certificate import Unconverged
from osora.svd.truncated import truncated_svd


class Spectrum(NamedTuple):
    """The leading singular values of a weight, and what they make up; see :func:`spectrum`."""

    S: Tensor
    """[..., r], descending, in float32 (float64 for float64 weights)."""
    energy: Tensor
    """[..., r] float64, on the CPU: ``energy[j] = Σ S[:j + 1]² / ‖W‖²``, from 0 to 1; see :func:`captured_energy`."""
    norm: Tensor
    """[...] float64, on the CPU: the Frobenius norm ``‖W‖``."""
    residuals: Tensor
    """[..., r] float64, on the CPU, as in :class:`osora.TruncatedSVD`."""
    converged: Tensor
    """[...] bool, on the CPU, as in :class:`osora.TruncatedSVD`."""


def captured_energy(S: Tensor, norm: Tensor | float) -> Tensor:
    """The share of ``‖W‖²`` that the first 1, 2, … r triplets hold.

    Singular values of a truncated SVD are never above W's own, so neither is the share, up to rounding. A share that
    is 1 within the rounding of S is 1. A zero matrix has nothing to hold: its share is 1 at every rank.

    Args:
        S: [..., r] leading singular values, descending.
        norm: [...] Frobenius norm of W.

    Returns:
        [..., r] float64, on the CPU, not descending; NaN where the norm is no finite number.
    """
    norm = torch.as_tensor(norm, dtype=torch.float64, device="cpu").unsqueeze(-1)
    held = (S.detach().to("cpu", torch.float64) / norm).square().cumsum(-1)
    held = torch.where(norm == 0, 1.0, torch.where(norm.isfinite(), held, torch.nan))
    return torch.where(held > 1 - 16 * torch.finfo(S.dtype).eps, 1.0, held)


def rank_for_energy(energy: Tensor, fraction: float) -> int | None:
    """The smallest rank whose triplets hold ``fraction`` of the squared Frobenius norm.

    Args:
        energy: [r], of one matrix, as :attr:`Spectrum.energy` gives it.
        fraction: 0 < fraction <= 1.

    Returns:
        1 .. r, or None if all r triplets hold less: compute more of them.

    Raises:
        ValueError: a fraction out of range, or energies of no matrix or of several.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in 0 < fraction <= 1, got {fraction!r}")
    if energy.dim() != 1 or energy.numel() == 0:
        raise ValueError(f"energy must be [r], of one matrix, got shape {tuple(energy.shape)}")
    enough = (energy >= fraction).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def spectrum(
    weight: Tensor,
    rank: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    method: str = "auto",
    max_memory: int | None = None,
    name: str = "",
    unconverged: Unconverged = "warn",
) -> Spectrum:
    """The ``rank`` largest singular values of each matrix in ``weight``, and the share of its norm that they make up.

    One run of :func:`osora.truncated_svd`, whose arguments these are and whose errors it raises. The vectors are
    computed and let go: a certificate needs them.

    Args:
        weight: [..., d, k] in float64, float32, bfloat16 or float16.
        rank: number of singular values, 1 .. min(d, k).
        tol: largest residual allowed; a singular value is then exact to about tol².
        seed: of the random start.
        method: as for :func:`osora.truncated_svd`.
        max_memory: bytes that may be taken beyond the weight and the answer, None for no limit.
        name: the matrix's name, for messages and for its random stream.
        unconverged: "warn" or "raise" when a certificate is not reached.

    Returns:
        S, energy, norm, residuals, converged.
    """
    found = truncated_svd(
        weight,
        rank,
        tol=tol,
        seed=seed,
        method=method,
        max_memory=max_memory,
        name=name,
        unconverged=unconverged,
    )
    return Spectrum(found.S, captured_energy(found.S, found.norm), found.norm, found.residuals, found.converged)


__all__ = ["Spectrum", "captured_energy", "rank_for_energy", "spectrum"]
