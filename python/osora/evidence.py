# SPDX-License-Identifier: Apache-2.0
"""Whether a model is the one that an adapter was saved from, judged by the fingerprints in the adapter's file.

A base weight is known by its digest, and in another dtype by its sketch; a basis by what it does to W and ΔW.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from osora import fingerprint
from osora.adapter_file import AdapterError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Basis = tuple[Tensor, Tensor, Tensor]


def describe(
    name: str,
    weight: Tensor,
    basis: Basis,
    delta: tuple[Tensor, Tensor],
    saved: Mapping[str, Tensor],
    certificate: Mapping[str, Any],
) -> dict[str, Any]:
    """A module's entry in the file.

    Args:
        name: the module's.
        weight: its base weight [d, k].
        basis: U [d, r], V [k, r], S0 [r] of the adapter.
        delta: ΔW as ``left rightᵀ``.
        saved: the adapter's tensors by kind: those it trains, then S0.
        certificate: ``max_residual``, ``passes``, ``converged`` and ``method`` of the decomposition.
    """
    U, V, S0 = basis
    return {
        "name": name,
        "rank": S0.numel(),
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "weight_sha256": fingerprint.weight_digest(weight),
        "weight_sketch": fingerprint.weight_sketch(weight, name),
        "delta_sketch": fingerprint.factored_sketch(*delta, name),
        "basis_sketch": fingerprint.factored_sketch(U * S0, V, name),
        "values_sha256": fingerprint.tensors_digest(saved, name),
        "basis_sha256": fingerprint.tensors_digest({"U": U, "V": V}, name),
        **certificate,
    }


def _check_base(described: Mapping[str, Any], weight: Tensor) -> str | None:
    """None if the weight is the saved one; else what is different, or raise if it is another weight."""
    name = described["name"]
    if fingerprint.weight_digest(weight) == described["weight_sha256"]:
        return None
    saved = getattr(torch, described["dtype"], None)
    refusal = AdapterError(
        f"the base weight {name} is not the one this adapter was trained on: load it on its own base model "
        f"(dtype {described['dtype']})"
    )
    if saved not in _FLOATS or saved == weight.dtype:
        raise refusal
    # Another dtype: the same weight, rounded? Each of the sketch's numbers then moves by the rounding alone.
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    allowed = 6 * max(fingerprint.rounding_unit(saved), fingerprint.rounding_unit(weight.dtype)) * norm
    now = fingerprint.weight_sketch(weight, name)
    if max(abs(a - b) for a, b in zip(now, described["weight_sketch"], strict=True)) > allowed:
        raise refusal
    return f"{described['dtype']} then, {str(weight.dtype).removeprefix('torch.')} now"


def check_bases(described: Sequence[Mapping[str, Any]], weights: Sequence[Tensor], stacklevel: int = 3) -> None:
    """Raise AdapterError unless each weight is that of its module's description; warn of those in another dtype."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        differences = [d for d in pool.map(_check_base, described, weights) if d is not None]
    if differences:
        warnings.warn(
            f"{len(differences)} base weights were rounded to another dtype since the adapter was saved "
            f"({differences[0]}); its function is the same up to that rounding",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def _check_basis(
    described: Mapping[str, Any], basis: Basis, delta: tuple[Tensor, Tensor], S0: Tensor, allowed: float, cure: str
) -> None:
    """Raise if U, V, S0 are not the basis that an adapter was trained in, judged by what it does to W and ΔW.

    ``delta`` are the factors of the adapter's ΔW in this basis, ``S0`` the singular values that were saved.
    """
    name, (U, V, here) = described["name"], basis
    start = U * here
    for key, now, scale in (
        ("basis_sketch", fingerprint.factored_sketch(start, V, name), fingerprint.factored_norm(start, V)),
        ("delta_sketch", fingerprint.factored_sketch(*delta, name), fingerprint.factored_norm(*delta)),
        ("S0", here.tolist(), float(S0.max())),
    ):
        wish = S0.tolist() if key == "S0" else described[key]
        off = max(abs(a - b) for a, b in zip(now, wish, strict=True))
        if off > allowed * scale + 1e-12:
            raise AdapterError(
                f"{name}: {cure.format(f'{key} off by {off / (scale or 1):.1e}, allowed {allowed:.1e}')}"
            )


def _rebuilt_allows(tol: float) -> float:
    """What a basis computed again may change, relative: up to 10 tol where singular values are close (docs/svd.md)."""
    return max(1e-4, 10 * tol)


def check_rebuilt(
    described: Mapping[str, Any], basis: Basis, delta: tuple[Tensor, Tensor], S0: Tensor, tol: float
) -> None:
    """Raise AdapterError unless a basis that was computed again is the adapter's own, up to its tolerance."""
    _check_basis(
        described,
        basis,
        delta,
        S0,
        _rebuilt_allows(tol),
        "the basis computed again is not the adapter's ({}): save the adapter with save_basis=True, or load it on a "
        f"base in the dtype it was trained on ({described['dtype']}), decomposed with a smaller tol",
    )


def check_shared(
    described: Mapping[str, Any], basis: Basis, delta: tuple[Tensor, Tensor], S0: Tensor, tol: float
) -> None:
    """Raise AdapterError unless a model's basis, exact to ``tol``, can stand for the one that the adapter came with."""
    U, allowed, saved_dtype = basis[0], _rebuilt_allows(tol), getattr(torch, described["dtype"], None)
    if saved_dtype not in _FLOATS:
        raise AdapterError(f"{described['name']}: dtype must be a floating-point type, got {described['dtype']!r}")
    if saved_dtype != U.dtype:
        # U and V are rounded, an error of sqrt(2) units; a sketch may see some six times its root mean square
        units = [fingerprint.rounding_unit(dtype) for dtype in (saved_dtype, U.dtype)]
        allowed = max(allowed, 6 * math.sqrt(2) * max(units))
    _check_basis(
        described,
        basis,
        delta,
        S0,
        allowed,
        "the adapters of a model share one basis, and this one was trained in another ({}): load it into a copy of the "
        "base model of its own, or train both from decompositions with a smaller tol and the same seed",
    )


__all__ = ["check_bases", "check_rebuilt", "check_shared", "describe"]
