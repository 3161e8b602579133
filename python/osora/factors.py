# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD and what is kept of it. The method and its certificate: docs/svd.md."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from osora import ops as _registered  # noqa: F401  (its import registers the operator)
from osora import reference

# SvdMethod of csrc/core/svd_plan.h, in order. The last five are cuSOLVER's drivers and, as "lowrank", for comparison.
_USED = ("lanczos", "gram", "full", "lowrank", "gesvd", "gesvdj", "gesvdp", "gesvda", "gesvdr")
METHODS = ("auto", *_USED)
_ops = torch.ops.osora
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Unconverged = Literal["warn", "raise"]


class ConvergenceError(RuntimeError):
    """A truncated SVD did not reach its tolerance."""


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


class SvdPlan(NamedTuple):
    """What a truncated SVD of one matrix will do; see :func:`svd_plan`."""

    method: str
    """The method that runs first: a name of ``METHODS``, never "auto"."""
    block: int
    """Lanczos: new columns per step. This and the next two are 0 for the other methods."""
    keep: int
    """Lanczos: columns of the basis that survive a restart."""
    basis: int
    """Lanczos: columns of the basis at which a restart is due."""
    bytes: int
    """Of the arrays beyond the weight and the answer."""


@dataclass(frozen=True)
class Decomposition:
    """:class:`TruncatedSVD` of one named matrix, with the method that gave it.

    One that comes from an adapter's file has 0 columns and no (NaN) norm and floor: they are not stored.
    """

    name: str
    U: Tensor
    S: Tensor
    V: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str
    columns: int = 0
    norm: float = math.nan
    floor: float = math.nan

    @property
    def below_floor(self) -> Tensor:
        """[r] bool: which singular values are zero to rounding; none where the floor is not known."""
        return self.S.detach().to("cpu", torch.float64) <= self.floor

    @property
    def max_residual(self) -> float:
        """The largest residual of the triplets above the floor; 0 if there is none."""
        above = self.residuals[~self.below_floor]
        return float(above.max()) if above.numel() else 0.0

    def leading(self, rank: int) -> "Decomposition":
        """The first ``rank`` triplets. Exact: a triplet's vectors, value and residual do not depend on later ones."""
        return replace(
            self,
            U=self.U[:, :rank],
            S=self.S[:rank].clone(),  # a view would keep the values that are dropped in every copy on disk
            V=self.V[:, :rank],
            residuals=self.residuals[:rank],
        )


def random_key(name: str) -> int:
    """The part a name plays in the random stream: the same on every machine, and 0 for no name."""
    if not name:
        return 0
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in _FLOATS:
        cure = "dequantise it, or convert it with .float()"
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}: {cure}")


def check_matrix(weight: Tensor, name: str) -> None:
    """Raise a TypeError or ValueError that names ``weight`` and the cure if it cannot be decomposed.

    Its values are not looked at: the operator does that while it reads them.
    """
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values: load the weights before decomposing them, or ask "
            "osora.count_parameters for what would be trained"
        )
    _check_dtype(weight.dtype, name)
    if weight.dim() < 2:
        raise ValueError(f"{name} must be a matrix [out_features, in_features], got shape {tuple(weight.shape)}")
    if 0 in weight.shape[-2:]:
        raise ValueError(f"{name} is empty: shape {tuple(weight.shape)}")


def check_max_memory(max_memory: int | None) -> None:
    """Raise a TypeError or ValueError if ``max_memory`` is no positive number of bytes, nor None for no limit."""
    if max_memory is None:
        return
    if isinstance(max_memory, bool) or not isinstance(max_memory, int):
        raise TypeError(f"max_memory must be a number of bytes as an int, or None, got {max_memory!r}")
    if not 0 < max_memory < 2**63:
        raise ValueError(f"max_memory must be in 1 .. 2**63 - 1 bytes, got {max_memory}")


def _check_rank_and_method(shape: Sequence[int], rank: int, method: str, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank must be in 1 .. min(out_features, in_features) = {min(shape)} for {name}, got {rank}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _check_arguments(shape: Sequence[int], rank: int, tol: float, seed: int, method: str, name: str) -> None:
    _check_rank_and_method(shape, rank, method, name)
    if not (isinstance(tol, int | float) and 0 < tol < math.inf):
        raise ValueError(f"tol must be a positive number, got {tol!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int in 0 .. 2**63 - 1, got {seed!r}")


def _reason(item: Decomposition, tol: float) -> tuple[str, str]:
    """What keeps a decomposition from its certificate, and the cure."""
    limits = torch.where(item.below_floor, 1.0, tol)
    missed = (~(item.residuals <= limits)).nonzero().squeeze(1)
    if not len(missed):
        return "a larger singular value than its last was seen, or a solver failed", "use method='full' or another seed"
    first, worst = int(missed[0]), int(missed[item.residuals[missed].argmax()])
    residual, sigma = float(item.residuals[worst]), float(item.S[worst])
    where = f"residual {residual:.1e} at triplet {worst + 1} of {len(item.S)}"
    if not residual * max(sigma, item.floor) <= item.floor:
        return f"{where} after {item.passes} passes", "use method='full' or a larger tol"
    cures = [f"a rank of at most {first}"] * (first > 0) + ["a larger tol"]
    cures += ["float64 weights"] * (item.S.dtype != torch.float64)
    rounding = f"rounding to {str(item.S.dtype).removeprefix('torch.')} may leave {item.floor / sigma:.1e} there"
    return f"{where}, {rounding}", f"use {' or '.join(cures)}"


def _report_failure(failed: list[Decomposition], tol: float, unconverged: Unconverged) -> None:
    if unconverged not in ("warn", "raise"):
        raise ValueError(f"unconverged must be 'warn' or 'raise', got {unconverged!r}")
    if not failed:
        return
    reasons = [(item.name or "weight", *_reason(item, tol)) for item in failed[:5]]
    worst = "; ".join(f"{name} ({why}: {cure})" for name, why, cure in reasons)
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    message = f"the truncated SVD reached no certificate of tol={tol:g} for {worst}{more}"
    if unconverged == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _refuse_infinite(weights: Sequence[Tensor], labels: Sequence[str], error: ValueError) -> None:
    """Raise anew, with the weight's name, what the operator says of one that has NaN or infinite entries."""
    if "NaN or infinite" not in str(error):
        return
    for weight, label in zip(weights, labels, strict=True):
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{label} has NaN or infinite entries: check the checkpoint it came from") from error


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
    unconverged: Unconverged = "warn",
) -> list[Decomposition]:
    """Truncated SVDs of matrices [d, k] of one shape, dtype and device; see :func:`truncated_svd`.

    ``names`` key the random streams: a matrix gives the same factors alone, in any batch and on any rank of a
    distributed job. Messages about a weight call it by its label, which is its name if ``labels`` are not given.
    """
    check_max_memory(max_memory)
    labels = [name or "weight" for name in names] if labels is None else labels
    for weight, label in zip(weights, labels, strict=True):
        check_matrix(weight, label)
        if weight.dim() != 2:
            raise ValueError(f"{label} must be a matrix, got shape {tuple(weight.shape)}")
        _check_arguments(weight.shape, rank, tol, seed, method, label)
    if not weights:
        return []
    matrices, keys = [weight.detach() for weight in weights], [random_key(name) for name in names]
    try:
        with torch.no_grad():
            results = _ops.truncated_svd(matrices, rank, float(tol), seed, keys, method, max_memory or 0)
    except ValueError as error:
        _refuse_infinite(matrices, labels, error)
        raise
    U, S, V, residuals, *numbers = results
    found = [
        Decomposition(name, U[i], S[i], V[i], residuals[i], converged, passes, _USED[used], columns, norm, floor)
        for i, (name, converged, passes, used, columns, norm, floor) in enumerate(
            zip(names, *(number.tolist() for number in numbers), strict=True)
        )
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
            :func:`svd_plan`. Fewer matrices of a batch are in work at the same time if need be. It bounds the arrays of
            the first attempt: a repeat in float64, or in full, takes more.
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
    check_matrix(weight, name or "weight")
    *batch, d, k = weight.shape
    _check_arguments((d, k), rank, tol, seed, method, name or "weight")
    if unconverged not in ("warn", "raise"):
        raise ValueError(f"unconverged must be 'warn' or 'raise', got {unconverged!r}")
    matrices = list(weight.detach().reshape(-1, d, k))
    found = decompose(
        matrices,
        rank,
        names=[name] * len(matrices),
        tol=tol,
        seed=seed,
        method=method,
        max_memory=max_memory,
        unconverged=unconverged,
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
            torch.empty(*batch, dtype=torch.int64, device="cpu"),
            torch.empty(*batch, dtype=torch.float64, device="cpu"),
            torch.empty(*batch, dtype=torch.float64, device="cpu"),
            torch.empty(*batch, rank, dtype=torch.bool, device="cpu"),
        )
    return TruncatedSVD(
        torch.stack([item.U for item in found]).reshape(*batch, d, rank),
        torch.stack([item.S for item in found]).reshape(*batch, rank),
        torch.stack([item.V for item in found]).reshape(*batch, k, rank),
        torch.stack([item.residuals for item in found]).reshape(*batch, rank),
        torch.tensor([item.converged for item in found], device="cpu").reshape(batch),
        torch.tensor([item.passes for item in found], device="cpu").reshape(batch),
        torch.tensor([item.columns for item in found], device="cpu").reshape(batch),
        torch.tensor([item.norm for item in found], dtype=torch.float64, device="cpu").reshape(batch),
        torch.tensor([item.floor for item in found], dtype=torch.float64, device="cpu").reshape(batch),
        torch.stack([item.below_floor for item in found]).reshape(*batch, rank),
    )


def svd_plan(
    shape: Sequence[int],
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    method: str = "auto",
) -> SvdPlan:
    """What :func:`truncated_svd` will do with a matrix, before there is one.

    A function of its arguments and of ``torch.get_num_threads()``; nothing is allocated, and the device need not exist.

    Args:
        shape: [d, k] of the weight.
        rank: number of triplets, 1 .. min(d, k).
        dtype: of the weight.
        device: of the weight.
        method: as for :func:`truncated_svd`.

    Returns:
        method, block, keep, basis, bytes: of the first attempt. One that cannot be certified is repeated in float64.
        bytes counts arrays; what an allocator keeps of freed ones comes on top.

    Raises:
        TypeError: a dtype that cannot be decomposed.
        ValueError: an empty shape or one that is no pair, rank out of range, a method that is unknown or cannot run.
    """
    d, k = _checked_pair(shape)
    _check_dtype(dtype, "a weight")
    _check_rank_and_method((d, k), rank, method, f"a weight [{d}, {k}]")
    cuda = torch.device(device).type == "cuda"
    used, block, keep, basis, size = _ops.svd_plan(d, k, rank, dtype.itemsize, method, cuda, torch.get_num_threads())
    if _USED[used] != "lanczos":
        block = keep = basis = 0
    return SvdPlan(_USED[used], block, keep, basis, size)


def rounding_floor(shape: Sequence[int], dtype: torch.dtype) -> float:
    """The rounding floor of a weight [d, k] of that dtype, over σ₁; docs/svd.md, "The rounding floor"."""
    d, k = shape
    return _ops.svd_floor(d, k, reference.accumulate_dtype(dtype).itemsize)


def _checked_pair(shape: Sequence[int]) -> tuple[int, int]:
    pair = tuple(shape)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"shape must be [out_features, in_features], two positive ints, got {shape!r}")
    return pair


__all__ = [
    "METHODS",
    "ConvergenceError",
    "Decomposition",
    "SvdPlan",
    "TruncatedSVD",
    "decompose",
    "rounding_floor",
    "svd_plan",
    "truncated_svd",
]
