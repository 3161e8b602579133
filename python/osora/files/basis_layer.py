# SPDX-License-Identifier: Apache-2.0
"""One layer of a basis on disk (docs/basis.md): a safetensors file with U, S0, V, their residuals and what proves them.

The file proves itself: its entry, a line of JSON among its metadata, and its numbers have one digest together.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from osora.files.format import DTYPES
from osora.files.whole import finish, sync, temporary_beside, why_unreadable
from osora.layers import fingerprint
from osora.layers.formulas import owned
from osora.reference import accumulate_dtype
from osora.svd.arguments import METHOD_NAMES
from osora.svd.certificate import Decomposition

KINDS = ("U", "S0", "V", "residuals")
_ENTRY = "osora_basis_layer"  # of the file's metadata; one key alone, for safetensors keeps no order of several
_LONGEST = 120  # of a file's name, in characters, beside its ending


class BasisError(ValueError):
    """A basis that cannot be used as it is: damaged, of another base, or less than was asked for."""


@dataclass(frozen=True)
class LayerEntry:
    """What is known of one layer's triplets without reading them; all of it is in the file and in the index."""

    name: str
    """Of the module in its model."""
    rank: int
    out_features: int
    in_features: int
    dtype: str
    """Of U and V, and of the weight as it was decomposed."""
    weight_sha256: str
    weight_sketch: tuple[float, ...]
    tol: float
    seed: int
    converged: bool
    passes: int
    columns: int
    method: str
    norm: float
    floor: float

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each kind."""
        d, k, r, dtype = self.out_features, self.in_features, self.rank, DTYPES[self.dtype]
        exact = accumulate_dtype(dtype)
        return {"U": ((d, r), dtype), "S0": ((r,), exact), "V": ((k, r), dtype), "residuals": ((r,), torch.float64)}

    def text(self) -> str:
        """One line of JSON, the same for equal entries."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    @property
    def nbytes(self) -> int:
        """Of its numbers on disk."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes().values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def entry_from(values: Any, where: str) -> LayerEntry:
    """An entry from what JSON gave. Raises BasisError, naming the field."""
    if not isinstance(values, Mapping):
        raise BasisError(f"{where}: a layer's entry is no JSON object")
    wanted = {field.name for field in fields(LayerEntry)}
    if unlike := sorted(wanted.symmetric_difference(values)):
        raise BasisError(f"{where}: a layer's entry has the fields {', '.join(sorted(wanted))}, and not {unlike[0]!r}")

    def refuse(field: str, wish: str) -> BasisError:
        return BasisError(f"{where}: {field} must be {wish}, got {values[field]!r:.80}")

    for field in ("name", "dtype", "weight_sha256", "method"):
        if not isinstance(values[field], str):
            raise refuse(field, "a string")
    for field, least in {"rank": 1, "out_features": 1, "in_features": 1, "seed": 0, "passes": 0, "columns": 0}.items():
        if type(values[field]) is not int or not least <= values[field] < 2**63:
            raise refuse(field, f"an int from {least} on")
    for field in ("tol", "norm", "floor"):
        if not _is_number(values[field]) or values[field] < 0:
            raise refuse(field, "a finite number from 0 on")
    sketch = values["weight_sketch"]
    if not isinstance(sketch, list) or len(sketch) != fingerprint.PROBES or not all(map(_is_number, sketch)):
        raise refuse("weight_sketch", f"{fingerprint.PROBES} finite numbers")
    if values["dtype"] not in DTYPES:
        raise refuse("dtype", f"one of {', '.join(DTYPES)}")
    if values["method"] not in METHOD_NAMES:
        raise refuse("method", f"one of {', '.join(METHOD_NAMES)}")
    if not isinstance(values["converged"], bool):
        raise refuse("converged", "true or false")
    if values["rank"] > min(values["out_features"], values["in_features"]):
        raise refuse("rank", f"at most {min(values['out_features'], values['in_features'])}")
    numbers = {field: float(values[field]) for field in ("tol", "norm", "floor")}
    return LayerEntry(**{**values, **numbers, "weight_sketch": tuple(float(number) for number in sketch)})


def line_of(entry: LayerEntry, digest: str) -> str:
    """An entry and the digest of its file in one line of JSON: what file and index say of a layer."""
    return json.dumps(asdict(entry) | {"sha256": digest}, separators=(",", ":"), allow_nan=False)


def entry_and_digest(values: Any, where: str) -> tuple[LayerEntry, str]:
    """The way back. Raises BasisError, naming the field."""
    rest = dict(values) if isinstance(values, dict) else {}
    digest = rest.pop("sha256", None)
    entry = entry_from(rest, where)
    if not isinstance(digest, str):
        raise BasisError(f"{where}: sha256 of {entry.name} is missing, or no string")
    return entry, digest


@contextmanager
def told(path: Path) -> Iterator[None]:
    """An error of writing that names the file."""
    try:
        yield
    except SafetensorError as error:  # its name for a disk that is full
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error


def file_name(module: str) -> str:
    """The file of a module's layer: its name, where that can be a file's on every system, else with a digest."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in module)
    same_everywhere = plain == module and plain == plain.lower()  # some systems tell no A from an a
    if not same_everywhere or len(plain) > _LONGEST:
        plain = f"{plain[-_LONGEST:]}-{hashlib.sha256(module.encode()).hexdigest()[:12]}"
    return f"{plain.lstrip('.')}.safetensors"


def _digest(entry: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(entry.encode())
    for kind in KINDS:
        digest.update(tensors[kind].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_layer(
    factors: Decomposition, dtype: torch.dtype, sha256: str, sketch: list[float], tol: float, seed: int
) -> LayerEntry:
    """The entry of a decomposition of a weight in ``dtype``, with the weight's digest and sketch."""
    return LayerEntry(
        name=factors.name,
        rank=factors.S.numel(),
        out_features=factors.U.shape[0],
        in_features=factors.V.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        weight_sha256=sha256,
        weight_sketch=tuple(sketch),
        tol=tol,
        seed=seed,
        converged=factors.converged,
        passes=factors.passes,
        columns=factors.columns,
        method=factors.method,
        norm=factors.norm,
        floor=factors.floor,
    )


def write_layer(folder: Path, entry: LayerEntry, factors: Decomposition, staging: Path | None = None) -> str:
    """Write a layer's file, which is on the disk when it has its name; return its digest.

    Until then it has another name in ``staging``, a folder of the same file system, or in ``folder`` itself.

    Raises:
        ValueError: factors that are not finite, or a folder whose name is not UTF-8.
        OSError: the folder cannot be written; what was there is left.
    """
    if (why := why_unreadable(folder)) is not None:
        raise ValueError(why)
    parts = {"U": factors.U, "S0": factors.S, "V": factors.V, "residuals": factors.residuals}
    tensors = {kind: owned(parts[kind].detach().to("cpu", dtype)) for kind, (_, dtype) in entry.shapes().items()}
    for kind in KINDS[:3]:
        if not bool(tensors[kind].isfinite().all()):
            raise ValueError(f"{entry.name}: {kind} has NaN or infinite values in {entry.dtype}: it is not saved")
    digest = _digest(entry.text(), tensors)
    path = folder / file_name(entry.name)
    with told(path), temporary_beside((staging or folder) / path.name) as new:
        safetensors.torch.save_file(tensors, new, metadata={_ENTRY: line_of(entry, digest)})
        finish(new)
        os.replace(new, path)
        sync(folder)
    return digest


def read_layer(path: Path) -> tuple[LayerEntry, str, dict[str, Tensor]]:
    """A layer's file, whole and checked: its entry, its digest, its tensors by kind.

    Raises:
        FileNotFoundError: there is none.
        BasisError: it is damaged, or no file of a basis.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it is a file of a basis, make it again with osora init") from None
    except IsADirectoryError:
        raise BasisError(f"{path} is a folder, where a layer's file should be: remove it") from None
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length].decode()) if 8 + length <= len(data) else None
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, RecursionError, MemoryError, OverflowError, KeyError) as error:
        raise BasisError(f"{path} is no whole safetensors file: {error}") from error
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get(_ENTRY), str):
        raise BasisError(f"{path} is no file of a basis: its metadata has no {_ENTRY}")
    try:
        values = json.loads(meta[_ENTRY])
    except (ValueError, RecursionError) as error:
        raise BasisError(f"{path}: its entry is not valid JSON: {error}") from error
    entry, digest = entry_and_digest(values, str(path))
    found = {kind: (tuple(tensor.shape), tensor.dtype) for kind, tensor in tensors.items()}
    if found != entry.shapes():
        raise BasisError(f"{path}: its tensors are not those that its entry tells of ({entry.name})")
    if _digest(entry.text(), tensors) != digest:
        raise BasisError(f"{path} is damaged: its digest is not that of its numbers ({entry.name})")
    return entry, digest, tensors


def decomposition_of(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> Decomposition:
    """The triplets as :func:`osora.attach` has them of a decomposition."""
    return Decomposition(
        entry.name,
        tensors["U"],
        tensors["S0"],
        tensors["V"],
        tensors["residuals"],
        entry.converged,
        entry.passes,
        entry.method,
        entry.columns,
        entry.norm,
        entry.floor,
    )


__all__ = [
    "KINDS",
    "BasisError",
    "LayerEntry",
    "decomposition_of",
    "describe_layer",
    "entry_and_digest",
    "file_name",
    "line_of",
    "read_layer",
    "told",
    "write_layer",
]
