# SPDX-License-Identifier: Apache-2.0
"""Whether a model is the one that an adapter was saved from, judged by the fingerprints in the adapter's file.

A base weight is known by its digest, and in another dtype by its sketch; a basis by what it does to W and ΔW.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osora.files.format import DTYPES, AdapterError
from osora.layers import fingerprint
from osora.layers.base_weight import dense_weight
from osora.layers.formulas import Basis
from osora.layers.known_base import KnownBase
from osora.layers.quantised import kind_of
from osora.svd.certificate import Certificate

Base = Tensor | Any  # a weight [d, k], or a base layer (osora.layers.base_weight)

_RESCALED = 0.02
"""Share of a 4-bit weight's norm that its sketch may move while its codes stay: bitsandbytes may round and nest the
scales anew when it packs and unpacks. Eight bits in place of float32 are good for 1 %."""


@dataclass(frozen=True)
class _Weight:
    """A base weight as fingerprints see it."""

    values: Tensor
    dtype: torch.dtype
    quantization: str | None  # how it is stored, if it is quantised
    digest: str

    @classmethod
    def of(cls, base: Base) -> "_Weight":
        if isinstance(base, Tensor):
            return cls(base, base.dtype, None, fingerprint.weight_digest(base))
        values = dense_weight(base)
        if (kind := kind_of(base)) is None:
            return cls.of(values)
        return cls(values, kind.dtype(base), kind.name(base), kind.digest(base))

    @property
    def stored(self) -> str:
        return self.quantization or str(self.dtype).removeprefix("torch.")


def describe(
    name: str,
    base: Base | KnownBase,
    basis: Basis,
    delta: tuple[Tensor, Tensor],
    saved: Mapping[str, Tensor],
    certificate: Certificate,
) -> dict[str, Any]:
    """A module's entry in the file.

    Args:
        name: the module's.
        base: its base weight [d, k], or its base layer, which may be quantised; or the fingerprint of either.
        basis: U [d, r], V [k, r], S0 [r] of the adapter.
        delta: ΔW as ``left rightᵀ``.
        saved: the adapter's tensors by kind: those it trains, then S0.
        certificate: of the decomposition.
    """
    (U, V, S0), weight = basis, base if isinstance(base, KnownBase) else KnownBase.of(name, base)
    return {
        "name": name,
        "rank": S0.numel(),
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "dtype": str(weight.dtype).removeprefix("torch."),
        **({"quantization": weight.quantization} if weight.quantization else {}),
        "weight_sha256": weight.digest,
        "weight_sketch": list(weight.sketch),
        "delta_sketch": fingerprint.factored_sketch(*delta, name),
        "basis_sketch": fingerprint.factored_sketch(U * S0, V, name),
        "values_sha256": fingerprint.tensors_digest(saved, name),
        "basis_sha256": fingerprint.tensors_digest({"U": U, "V": V}, name),
        **certificate._asdict(),
    }


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for NaN or infinite values in tensors of a module (of the model, if it has no name), by kind."""
    for kind, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            where = f"{name}.{kind}" if name else kind
            raise ValueError(f"{where} has NaN or infinite values: the adapter is not saved")


def describe_whole(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The entry in the file of a module that was trained whole: ``tensors`` by their names in it."""
    in_order = {key: tensors[key] for key in sorted(tensors)}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    return {"name": name, "numbers": numbers, "values_sha256": fingerprint.tensors_digest(in_order, name)}


def check_describable(described: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry that no file can hold: finite tensors whose products are not."""
    for key, cause in (
        ("weight_sketch", "its base weight has NaN or infinite values"),
        ("basis_sketch", "its basis overflows"),
        ("delta_sketch", "its change of the weight overflows"),
        ("max_residual", "its decomposition is not finite"),
    ):
        numbers = described[key] if isinstance(described[key], list) else [described[key]]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"{described['name']}: {cause}: the adapter is not saved")


def certificate_of(described: Mapping[str, Any]) -> Certificate:
    """The certificate in a module's entry."""
    return Certificate(**{field: described[field] for field in Certificate._fields})


def _within(now: Sequence[float], then: Sequence[float], allowed: float) -> bool:
    """Whether no number is further off than allowed; False where NaN or infinity is among them."""
    return math.isfinite(allowed) and all(abs(a - b) <= allowed for a, b in zip(now, then, strict=True))


Refusal = Callable[[str, str, str], ValueError]
"""What to raise for the weight of a module: of its name, how it was stored then, and how it is now."""


def _not_the_adapters(name: str, then: str, now: str) -> ValueError:
    return AdapterError(
        f"the base weight {name} is not the one this adapter was trained on: load it on its own base model ({then}; "
        f"this one is {now})"
    )


def check_base(described: Mapping[str, Any], base: Base, refusal: Refusal = _not_the_adapters) -> str | None:
    """None if the weight is the saved one; else what is different, or raise if it is another weight."""
    name, weight = described["name"], _Weight.of(base)
    same = described.get("quantization") == weight.quantization
    if same and weight.digest == described["weight_sha256"] and weight.quantization not in ("bnb-nf4", "bnb-fp4"):
        return None
    then, saved = described.get("quantization") or described["dtype"], DTYPES[described["dtype"]]
    other = refusal(name, then, weight.stored)
    if same and weight.quantization:
        if weight.digest != described["weight_sha256"]:
            raise other
        share = _RESCALED
    elif same and saved == weight.dtype:
        raise other
    else:
        # Another dtype: the same weight, rounded? Each of the sketch's numbers then moves by the rounding alone.
        share = 6 * max(fingerprint.rounding_unit(saved), fingerprint.rounding_unit(weight.dtype))
    allowed = share * float(torch.linalg.vector_norm(weight.values.detach(), dtype=torch.float64))
    if not _within(fingerprint.weight_sketch(weight.values, name), described["weight_sketch"], allowed):
        raise other
    return None if same and weight.quantization else f"{then} then, {weight.stored} now"


def check_sharded_base(name: str, described: Mapping[str, Any], base: Any, refusal: Refusal) -> KnownBase:
    """:func:`check_base` of a base layer of which each process holds a part, by its sketch alone. Collective.

    Args:
        name: the module's in this model.
        described: its entry in a file, where it may be called otherwise.
        base: the layer.
        refusal: what to raise for another weight, or one in another dtype.

    Returns:
        What is known of the base weight from now on.
    """
    known = KnownBase.of_sharded(name, described, base)
    if known is None:
        raise refusal(name, described["dtype"], str(base.weight.dtype).removeprefix("torch."))
    return known


def check_bases(
    described: Sequence[Mapping[str, Any]],
    bases: Sequence[Base],
    stacklevel: int,
) -> None:
    """Raise AdapterError unless each base is that of its module's description; warn of those in another dtype.

    Args:
        described: the modules' entries in the file.
        bases: for each its weight [d, k], or its base layer, which may be quantised.
        stacklevel: of the warning.
    """
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        differences = [d for d in pool.map(check_base, described, bases) if d is not None]
    warn_of_rounding(differences, "the adapter was saved", stacklevel + 1)


def warn_of_rounding(differences: Sequence[str], since: str, stacklevel: int) -> None:
    """One warning for all that :func:`check_base` found of base weights in another dtype, if anything."""
    if differences:
        warnings.warn(
            f"{len(differences)} base weights were rounded to another dtype since {since} "
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
        if not _within(now, wish, allowed * scale + 1e-12):
            off = max(abs(a - b) for a, b in zip(now, wish, strict=True))
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


def _allowed(described: Mapping[str, Any], dtype: torch.dtype, tol: float) -> float:
    """What a basis in ``dtype``, exact to ``tol``, may change in an adapter that was saved with another, relative."""
    allowed, saved_dtype = _rebuilt_allows(tol), DTYPES[described["dtype"]]
    if saved_dtype != dtype:
        # U and V are rounded, an error of sqrt(2) units; a sketch may see some six times its root mean square
        units = [fingerprint.rounding_unit(dtype) for dtype in (saved_dtype, dtype)]
        allowed = max(allowed, 6 * math.sqrt(2) * max(units))
    return allowed


def check_stored(described: Mapping[str, Any], basis: Basis, delta: tuple[Tensor, Tensor], S0: Tensor) -> None:
    """Raise AdapterError unless tensors and options of the file together give the change that was saved."""
    _check_basis(
        described,
        basis,
        delta,
        S0,
        _allowed(described, basis[0].dtype, 0.0),
        "the file's tensors do not give the adapter that was saved ({}): its options were changed, or its fingerprints",
    )


def check_shared(
    described: Mapping[str, Any], basis: Basis, delta: tuple[Tensor, Tensor], S0: Tensor, tol: float
) -> None:
    """Raise AdapterError unless a model's basis, exact to ``tol``, can stand for the one that the adapter came with."""
    allowed = _allowed(described, basis[0].dtype, tol)
    _check_basis(
        described,
        basis,
        delta,
        S0,
        allowed,
        "the adapters of a model share one basis, and this one was trained in another ({}): load it into a copy of the "
        "base model of its own, or train both from decompositions with a smaller tol and the same seed",
    )


__all__ = [
    "certificate_of",
    "check_base",
    "check_bases",
    "check_describable",
    "check_finite",
    "check_rebuilt",
    "check_shared",
    "check_stored",
    "describe",
    "describe_whole",
    "warn_of_rounding",
]
