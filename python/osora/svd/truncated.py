# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD, of one matrix or many. The method and its certificate: docs/svd.md."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osora import _load  # noqa: F401  (its import registers the operators)
from osora.reference import accumulate_dtype
from osora.svd.arguments import METHOD_NAMES, check_arguments, check_matrix, check_max_memory, check_unconverged
from osora.svd.certificate import Decomposition, Unconverged, report_failure

operators = torch.ops.osora


class TruncatedSVD(NamedTuple):
    """``W ≈ U diag(S) Vᵀ`` with the proof of how well.

    ``residuals[i] = ‖Wᵀuᵢ − σᵢvᵢ‖ / max(σᵢ, floor)`` of the factors as returned; a singular value of W lies within
    ``residuals[i] · σᵢ`` of each ``S[i]`` above the floor, plus the rounding of ``W V = U diag(S)``.
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
    """[...] bool, on the CPU: every residual is at most tol (below the floor at most 1); no larger triplet was seen."""
    passes: Tensor
    """[...] int64, on the CPU: products with W or its transpose."""
    columns: Tensor
    """[...] int64, on the CPU: width of all products with W or Wᵀ, ``2 d k columns`` floating-point operations."""
    norm: Tensor
    """[...] float64, on the CPU: Frobenius norm of W."""
    floor: Tensor
    """[...] float64, on the CPU: what rounding cannot tell from 0 (docs/svd.md, "The rounding floor")."""
    below_floor: Tensor
    """[..., r] bool, on the CPU: ``S[i] <= floor``. To rounding, W has that many less than r as its rank."""


class _Found(NamedTuple):
    """What the operator gives of a batch of B matrices; all but the first three are on the CPU."""

    U: Tensor  # [B, d, r]
    S: Tensor  # [B, r]
    V: Tensor  # [B, k, r]
    residuals: Tensor  # [B, r] float64
    converged: Tensor  # [B] bool
    passes: Tensor  # [B] int64
    method: Tensor  # [B] int64, an index of METHOD_NAMES
    columns: Tensor  # [B] int64
    norm: Tensor  # [B] float64
    floor: Tensor  # [B] float64

    @classmethod
    def empty(cls, like: Tensor, count: int, d: int, k: int, rank: int) -> "_Found":
        """Not filled, for matrices of ``like``'s dtype and device."""
        factors = like.new_empty(0, dtype=accumulate_dtype(like.dtype))
        numbers = (torch.bool, torch.int64, torch.int64, torch.int64, torch.float64, torch.float64)
        return cls(
            factors.new_empty(count, d, rank),
            factors.new_empty(count, rank),
            factors.new_empty(count, k, rank),
            torch.empty(count, rank, dtype=torch.float64, device="cpu"),
            *(torch.empty(count, dtype=dtype, device="cpu") for dtype in numbers),
        )

    def matrices(self, names: Sequence[str]) -> list[Decomposition]:
        """One by one."""
        numbers = (self.converged, self.passes, self.method, self.columns, self.norm, self.floor)
        return [
            Decomposition(name, U, S, V, residuals, converged, passes, METHOD_NAMES[used], columns, norm, floor)
            for name, U, S, V, residuals, converged, passes, used, columns, norm, floor in zip(
                names, *self[:4], *(number.tolist() for number in numbers), strict=True
            )
        ]

    def failed(self, names: Sequence[str]) -> list[Decomposition]:
        """Those without a certificate."""
        if all(self.converged.tolist()):
            return []
        return [item for item in self.matrices(names) if not item.converged]


@torch.library.register_fake("osora::truncated_svd")
def _(
    weights: Sequence[Tensor],
    rank: int,
    tol: float,
    seed: int,
    keys: Sequence[int],
    method: str,
    max_memory: int = 0,
) -> tuple[Tensor, ...]:
    d, k = weights[0].shape
    return tuple(_Found.empty(weights[0], len(weights), d, k, rank))


def random_key(name: str) -> int:
    """The part a name plays in the random stream: the same on every machine, and 0 for no name."""
    if not name:
        return 0
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _refuse_infinite(weights: Sequence[Tensor], labels: Sequence[str], error: ValueError) -> None:
    """Raise anew, with the weight's name, what the operator says of one that has NaN or infinite entries."""
    if "NaN or infinite" not in str(error):
        return
    for weight, label in zip(weights, labels, strict=True):
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{label} has NaN or infinite entries: check the checkpoint it came from") from error


def _run(
    weights: Sequence[Tensor],
    rank: int,
    names: Sequence[str],
    labels: Sequence[str],
    tol: float,
    seed: int,
    method: str,
    max_memory: int | None,
) -> _Found:
    """The operator on checked matrices, one at least."""
    matrices, keys = [weight.detach() for weight in weights], [random_key(name) for name in names]
    try:
        with torch.no_grad():
            return _Found(*operators.truncated_svd(matrices, rank, float(tol), seed, keys, method, max_memory or 0))
    except ValueError as error:
        _refuse_infinite(matrices, labels, error)
        raise


def decompose(
    weights: Sequence[Tensor],
    rank: int,
    *,
    names: Sequence[str],
    labels: Sequence[str] | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    method: str = "auto",
    max_memory: int | None = None,
    unconverged: Unconverged | None = "warn",
) -> list[Decomposition]:
    """Truncated SVDs of matrices [d, k] of one shape, dtype and device; see :func:`truncated_svd`.

    ``names`` key the random streams: on a CPU a matrix gives the same factors alone, in any batch and on any rank of a
    distributed job, on a GPU factors that are equal to rounding: its libraries choose their kernels by the batch, and
    only the same batch can be expected to give the same bits. The certificate holds either way. Messages about a
    weight call it by its label, which is its name if ``labels`` are not given. With ``unconverged=None`` the caller
    says where no certificate was reached.
    """
    check_max_memory(max_memory)
    if unconverged is not None:
        check_unconverged(unconverged)
    labels = [name or "weight" for name in names] if labels is None else labels
    for weight, label in zip(weights, labels, strict=True):
        check_matrix(weight, label)
        if weight.dim() != 2:
            raise ValueError(f"{label} must be a matrix, got shape {tuple(weight.shape)}")
        check_arguments(weight.shape, rank, tol, seed, method, label)
    if not weights:
        return []
    found = _run(weights, rank, names, labels, tol, seed, method, max_memory).matrices(names)
    if unconverged is not None:
        report_failure([item for item in found if not item.converged], tol, unconverged, 3)
    return found


def truncated_svd(
    weight: Tensor,
    rank: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    method: str = "auto",
    max_memory: int | None = None,
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
        method: "auto" takes the cheapest of "lanczos", "gram" and "full" that reaches a certificate. For comparison,
            with a certificate and no second attempt: "lowrank" (subspace iteration with q = rank and 16 iterations,
            as PEFT's pissa_niter_16) and, for CUDA tensors, cuSOLVER's "gesvd", "gesvdj", "gesvdp", "gesvda", "gesvdr".
        max_memory: bytes that may be taken beyond the weight and the answer, None for no limit; see
            :func:`osora.svd_plan`. Fewer matrices of a batch are in work at the same time if need be. It bounds the
            arrays of the first attempt: a repeat in float64, or in full, takes more.
        name: the matrix's name, for messages and for its random stream.
        unconverged: "warn" or "raise" when a certificate is not reached.

    Returns:
        U, S, V in float32 (float64 for float64 weights), and the certificate: residuals, converged, passes, columns,
        norm, floor, below_floor.

    Raises:
        TypeError: complex, integer or quantised weight.
        ValueError: NaN or infinite entries, fewer than two dimensions, empty, rank out of range, unknown method, one
            that cannot run on this matrix or device, or one that takes more than max_memory for a single matrix.
        ConvergenceError: not converged and ``unconverged="raise"``.
    """
    label = name or "weight"
    check_max_memory(max_memory)
    check_unconverged(unconverged)
    check_matrix(weight, label)
    *batch, d, k = weight.shape
    check_arguments((d, k), rank, tol, seed, method, label)
    matrices = list(weight.reshape(-1, d, k))
    names = [name] * len(matrices)
    if matrices:
        found = _run(matrices, rank, names, [label] * len(matrices), tol, seed, method, max_memory)
        report_failure(found.failed(names), tol, unconverged, 3)
    else:  # a batch of none
        found = _Found.empty(weight, 0, d, k, rank)
    return TruncatedSVD(
        U=found.U.reshape(*batch, d, rank),
        S=found.S.reshape(*batch, rank),
        V=found.V.reshape(*batch, k, rank),
        residuals=found.residuals.reshape(*batch, rank),
        converged=found.converged.reshape(batch),
        passes=found.passes.reshape(batch),
        columns=found.columns.reshape(batch),
        norm=found.norm.reshape(batch),
        floor=found.floor.reshape(batch),
        below_floor=(found.S.to("cpu", torch.float64) <= found.floor.unsqueeze(-1)).reshape(*batch, rank),
    )


__all__ = ["TruncatedSVD", "decompose", "truncated_svd"]
