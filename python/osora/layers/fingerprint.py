# SPDX-License-Identifier: Apache-2.0
"""Short proofs that a weight, a basis or a trained change is the one an adapter was saved with.

A digest tells whether a weight is the same to the last bit; a sketch, a few random projections, tells how far another
one is. Signs come from SHAKE-256 of a label, so they are the same on every machine and with every library version.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROBES = 4  # numbers per sketch


def short(value: float) -> float:
    """Nine digits: more than the comparison of a float32 and a float64 weight looks at, and half the text."""
    return float(f"{value:.9g}")


def _signs(label: str, size: int) -> Tensor:
    """``size`` values ±1 that depend on the label alone, in float64."""
    packed = np.frombuffer(hashlib.shake_256(label.encode()).digest((size + 7) // 8), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed)[:size].astype(np.float64) * 2 - 1)


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight's values, row by row, in float32; in float64 where float32 does not hold them.

    A bfloat16 weight and the float32 or float64 weight loaded from it have equal values, and so one digest.
    """
    digest = hashlib.sha256()
    _update(digest, weight)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], name: str) -> str:
    """SHA-256 of tensors of a module, their kinds and the module's name: none can be changed, left out or exchanged.

    For each in turn the UTF-8 text ``NAME|KIND|SHAPE|`` (sizes with commas between them) and its values as in
    :func:`weight_digest`.
    """
    digest = hashlib.sha256()
    for kind, tensor in tensors.items():
        digest.update(f"{name}|{kind}|{','.join(map(str, tensor.shape))}|".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    tensor = tensor.detach()
    tensor = tensor if tensor.dim() == 2 else tensor.reshape(1, -1)
    dtype = torch.float32
    if tensor.dtype == torch.float64 and not torch.equal(tensor.float().double(), tensor):
        dtype = torch.float64
    rows = max(1, 2**22 // max(1, tensor.shape[1]))  # some 16 MB at a time
    for begin in range(0, tensor.shape[0], rows):
        part = tensor[begin : begin + rows].to(device="cpu", dtype=dtype).contiguous()
        digest.update(part.numpy().data)


def probes(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The sign vectors g [rows, PROBES] and h [columns, PROBES] of a weight's sketch, in float64."""
    g = torch.stack([_signs(f"{name}|g{i}", rows) for i in range(PROBES)], 1)
    return g, torch.stack([_signs(f"{name}|h{i}", columns) for i in range(PROBES)], 1)


def sketch_of_image(image: Tensor, name: str) -> list[float]:
    """The sketch of a weight whose products with all h are known: ``W h`` [rows, PROBES] in float64; not rounded."""
    return [float(_signs(f"{name}|g{i}", image.shape[0]) @ image[:, i]) for i in range(PROBES)]


_IN_CACHE = 2**16  # entries: a piece of a weight, in float32 and float64, that stays in a core's second cache


def _short_sketch(image: Tensor, name: str) -> list[float]:
    return [short(value) for value in sketch_of_image(image, name)]


def _parts(weight: Tensor) -> Iterator[slice]:
    """Rows that are looked at together."""
    rows = max(1, _IN_CACHE // max(1, weight.shape[1]))
    for begin in range(0, len(weight), rows):
        yield slice(begin, begin + rows)


# Images go into memory that is there: small pieces that are allocated between large ones keep the heap from using these
# again. In a thread, whose heap is another, 460 MB were held for a weight of 117 MB; with this 4 MB.


def weight_sketch(weight: Tensor, name: str) -> list[float]:
    """``gᵢᵀ W hᵢ`` for fixed sign vectors g, h: about N(0, ‖W‖_F²) each. In float64: the sums must add no error."""
    weight, h = weight.detach(), torch.stack([_signs(f"{name}|h{i}", weight.shape[1]) for i in range(PROBES)], 1)
    image = torch.empty(len(weight), PROBES, dtype=torch.float64)
    for rows in _parts(weight):
        image[rows] = weight[rows].to("cpu", torch.float64) @ h
    return _short_sketch(image, name)


def weight_evidence(weight: Tensor, name: str) -> tuple[str, list[float]]:
    """:func:`weight_digest` and :func:`weight_sketch` of a matrix, which is read once for both."""
    if weight.dtype == torch.float64:
        return weight_digest(weight), weight_sketch(weight, name)
    weight, digest, (_, h) = weight.detach(), hashlib.sha256(), probes(name, *weight.shape)
    image = torch.empty(len(weight), PROBES, dtype=torch.float64)
    for rows in _parts(weight):
        exact = weight[rows].to("cpu", torch.float32).contiguous()
        digest.update(exact.numpy().data)
        image[rows] = exact.double() @ h
    return digest.hexdigest(), _short_sketch(image, name)


def checksum(weight: Tensor) -> str:
    """A number for a weight's bits at the speed of reading them: digest of the integer sums of its rows and columns.

    It tells a weight that was changed by accident; the digest of :func:`weight_digest` also one that was forged.
    """
    bits = weight.detach().contiguous()
    width = next(size for size in (8, 4, 2, 1) if bits.shape[-1] * bits.element_size() % size == 0)
    width = max(width, bits.element_size())
    words = bits.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width])
    digest = hashlib.sha256(f"{weight.dtype}|{tuple(weight.shape)}".encode())
    for dim in (0, 1):  # sums of 64 bits that wrap
        digest.update(words.sum(dim, dtype=torch.int64).cpu().numpy().data)
    return digest.hexdigest()


def factored_sketch(left: Tensor, right: Tensor, name: str) -> list[float]:
    """The sketch ``gᵢᵀ (left rightᵀ) hᵢ`` of a product of factors [d, r] and [k, r], not scaled."""
    left, right = left.detach().to("cpu", torch.float64), right.detach().to("cpu", torch.float64)
    return [
        short(float((_signs(f"{name}|g{i}", left.shape[0]) @ left) @ (_signs(f"{name}|h{i}", right.shape[0]) @ right)))
        for i in range(PROBES)
    ]


def factored_norm(left: Tensor, right: Tensor) -> float:
    """``‖left rightᵀ‖_F`` without forming the product."""
    left, right = left.detach().to("cpu", torch.float64), right.detach().to("cpu", torch.float64)
    return math.sqrt(max(0.0, float(((left.t() @ left) * (right.t() @ right)).sum())))


def rounding_unit(dtype: torch.dtype) -> float:
    """Root mean square relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2 / math.sqrt(3)
