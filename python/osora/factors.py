# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD and what is kept of it. The method and its certificate: docs/svd.md."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from osora import ops as _registered  # noqa: F401  (its import registers the operator)
from osora import reference

METHODS = ("auto", "lanczos", "gram", "full")
_USED = ("lanczos", "gram", "full")  # SvdMethod of csrc/core/svd_plan.h, in order
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Unconverged = Literal["warn", "raise"]


class ConvergenceError(RuntimeError):
    """A truncated SVD did not reach its tolerance."""


class TruncatedSVD(NamedTuple):
    """``W ≈ U diag(S) Vᵀ`` with the proof of how well.

    ``residuals[i] = ‖Wᵀuᵢ − σᵢvᵢ‖ / σᵢ`` of the factors as returned (against σ₁ where σᵢ is zero to rounding); a
    singular value of W lies within ``residuals[i] · σᵢ`` of each ``S[i]``, plus the rounding of ``W V = U diag(S)``.
    """

    U: Tensor
    """[..., d, r], orthonormal columns; the entry of largest magnitude in each is positive."""
    S: Tensor
    """[..., r], descending."""
    V: Tensor
    """[..., k, r], orthonormal columns; ``W V = U diag(S)``."""
    residuals: Tensor
    """[..., r] float64, on the CPU."""
    converged: Tensor
    """[...] bool, on the CPU: every residual is at most tol and no larger triplet was found."""
    passes: Tensor
    """[...] int64, on the CPU: products with W or its transpose."""


@dataclass(frozen=True)
class Decomposition:
    """:class:`TruncatedSVD` of one named matrix, with the method that gave it."""

    name: str
    U: Tensor
    S: Tensor
    V: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str

    @property
    def max_residual(self) -> float:
        """The largest residual of the triplets."""
        return float(self.residuals.max())


def random_key(name: str) -> int:
    """The part a name plays in the random stream: the same on every machine, and 0 for no name."""
    if not name:
        return 0
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def check_matrix(weight: Tensor, name: str) -> None:
    """Raise a TypeError or ValueError that names ``weight`` and the cure if it cannot be decomposed."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the weights before decomposing them")
    if weight.dtype not in _FLOATS:
        cure = "dequantise it, or convert it with .float()"
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {weight.dtype}: {cure}")
    if weight.dim() < 2:
        raise ValueError(f"{name} must be a matrix [out_features, in_features], got shape {tuple(weight.shape)}")
    if 0 in weight.shape[-2:]:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")
    if weight.numel() and not all(math.isfinite(float(bound)) for bound in torch.aminmax(weight.detach())):
        raise ValueError(f"{name} has NaN or infinite entries: check the checkpoint it came from")


def _check_arguments(shape: Sequence[int], rank: int, tol: float, seed: int, method: str, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank must be in 1 .. min(out_features, in_features) = {min(shape)} for {name}, got {rank}")
    if not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a positive number, got {tol!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in 0 .. 2**63 - 1, got {seed!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _report_failure(failed: list[Decomposition], tol: float, unconverged: Unconverged) -> None:
    if unconverged not in ("warn", "raise"):
        raise ValueError(f"unconverged must be 'warn' or 'raise', got {unconverged!r}")
    if not failed:
        return
    worst = ", ".join(f"{item.name or 'weight'} ({item.max_residual:.1e})" for item in failed[:5])
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    message = (
        f"the truncated SVD reached no certificate of tol={tol:g} for {worst}{more}; largest residuals in brackets: "
        "use a larger tol, a smaller rank or float64 weights"
    )
    if unconverged == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def decompose(
    weights: Sequence[Tensor],
    rank: int,
    *,
    names: Sequence[str],
    tol: float = 1e-3,
    seed: int = 0,
    method: str = "auto",
    unconverged: Unconverged = "warn",
) -> list[Decomposition]:
    """Truncated SVDs of matrices [d, k] of one shape, dtype and device; see :func:`truncated_svd`.

    ``names`` are used in messages and key the random streams: a matrix gives the same factors alone, in any batch and
    on any rank of a distributed job.
    """
    for weight, name in zip(weights, names, strict=True):
        check_matrix(weight, name or "weight")
        if weight.dim() != 2:
            raise ValueError(f"{name or 'weight'} must be a matrix, got shape {tuple(weight.shape)}")
        _check_arguments(weight.shape, rank, tol, seed, method, name or "weight")
    if not weights:
        return []
    with torch.no_grad():
        keys = [random_key(name) for name in names]
        results = torch.ops.osora.truncated_svd([w.detach() for w in weights], rank, float(tol), seed, keys, method)
    found = [
        Decomposition(name, U, S, V, residuals, bool(converged), int(passes), _USED[int(used)])
        for name, U, S, V, residuals, converged, passes, used in zip(names, *results, strict=True)
    ]
    _report_failure([item for item in found if not item.converged], tol, unconverged)
    return found


def truncated_svd(
    weight: Tensor,
    rank: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    method: str = "auto",
    name: str = "",
    unconverged: Unconverged = "warn",
) -> TruncatedSVD:
    """The top ``rank`` singular triplets of each matrix in ``weight``, with a certificate.

    Thick-restart randomised block Lanczos, or, where that costs less, eigenvectors of the Gram matrix (docs/svd.md). A
    float32 run that cannot be certified is repeated in float64, a Gram matrix that is not enough gives way to a full
    decomposition. Deterministic for given (weight, rank, tol, seed, name) on one machine.

    Args:
        weight: [..., d, k] in float64, float32, bfloat16 or float16.
        rank: number of triplets, 1 .. min(d, k).
        tol: largest residual ``‖Wᵀuᵢ − σᵢvᵢ‖ / σᵢ`` allowed; σ is then exact to about tol². 1e-3 initialises an
            adapter, 1e-4 suits factors that must be rebuilt from W.
        seed: of the random start.
        method: "auto", "lanczos", "gram" or "full".
        name: the matrix's name, for messages and for its random stream.
        unconverged: "warn" or "raise" when a certificate is not reached.

    Returns:
        U, S, V in float32 (float64 for float64 weights), residuals, converged, passes.

    Raises:
        TypeError: complex, integer or quantised weight.
        ValueError: NaN or infinite entries, fewer than two dimensions, empty, rank out of range, unknown method.
        ConvergenceError: not converged and ``unconverged="raise"``.
    """
    check_matrix(weight, name or "weight")
    *batch, d, k = weight.shape
    _check_arguments((d, k), rank, tol, seed, method, name or "weight")
    if unconverged not in ("warn", "raise"):
        raise ValueError(f"unconverged must be 'warn' or 'raise', got {unconverged!r}")
    matrices = list(weight.detach().reshape(-1, d, k))
    found = decompose(
        matrices, rank, names=[name] * len(matrices), tol=tol, seed=seed, method=method, unconverged=unconverged
    )
    if not found:  # a batch of none
        like = weight.new_empty(0, dtype=reference.accumulate_dtype(weight.dtype))
        return TruncatedSVD(
            like.new_empty(*batch, d, rank),
            like.new_empty(*batch, rank),
            like.new_empty(*batch, k, rank),
            torch.empty(*batch, rank, dtype=torch.float64, device="cpu"),
            torch.empty(*batch, dtype=torch.bool, device="cpu"),
            torch.empty(*batch, dtype=torch.int64, device="cpu"),
        )
    return TruncatedSVD(
        torch.stack([item.U for item in found]).reshape(*batch, d, rank),
        torch.stack([item.S for item in found]).reshape(*batch, rank),
        torch.stack([item.V for item in found]).reshape(*batch, k, rank),
        torch.stack([item.residuals for item in found]).reshape(*batch, rank),
        torch.tensor([item.converged for item in found], device="cpu").reshape(batch),
        torch.tensor([item.passes for item in found], device="cpu").reshape(batch),
    )


__all__ = ["METHODS", "ConvergenceError", "Decomposition", "TruncatedSVD", "decompose", "truncated_svd"]
