# SPDX-License-Identifier: Apache-2.0
"""What an adapted layer knows of its base weight: a fingerprint that is taken once, and kept as long as it holds.

To hash a weight costs seconds a gigabyte, and where no process has all of it there is nothing to hash. So the
fingerprint is taken while the weight is whole, and before each use it is asked whether the weight is still that one:
by a checksum of its bits or, of a sharded weight, by the sketch that each process adds its own part to. Never by a
count of changes, which writing through ``.data`` does not move.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from osora.layers import fingerprint, sharded
from osora.layers.base_weight import dense_weight, is_conv1d
from osora.layers.quantised import kind_of


@dataclass(frozen=True)
class KnownBase:
    """The fingerprint of a base weight [d, k], under the name of its module."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    quantization: str | None
    """How it is stored, if it is quantised."""
    digest: str
    sketch: tuple[float, ...]
    checksum: str | None
    """Of its bits; None where they are not looked at again, and the fingerprint is taken anew for each use; empty where
    no process has seen them all, so that the sketch alone tells."""

    @classmethod
    def of(cls, name: str, base: Any) -> "KnownBase":
        """Take it of a whole weight [d, k], or of a base layer, which may be quantised."""
        kind = None if isinstance(base, Tensor) else kind_of(base)
        values = base if isinstance(base, Tensor) else dense_weight(base)
        d, k = values.shape
        if kind is not None:
            seen = tuple(fingerprint.weight_sketch(values, name))
            return cls(name, (d, k), kind.dtype(base), kind.name(base), kind.digest(base), seen, None)
        digest, sketch = fingerprint.weight_evidence(values, name)
        return cls(name, (d, k), values.dtype, None, digest, tuple(sketch), fingerprint.checksum(values))

    @classmethod
    def read(cls, described: Mapping[str, Any], base: Any) -> "KnownBase | None":
        """That of a file, of a base layer that was found to be the file's; None where it is in another form."""
        if (
            kind_of(base) is not None
            or sharded.is_sharded(getattr(base, "weight", None))
            or described.get("quantization")
        ):
            return None
        values = dense_weight(base)
        if str(values.dtype) != f"torch.{described['dtype']}":
            return None
        d, k = values.shape
        digest, sketch = described["weight_sha256"], tuple(described["weight_sketch"])
        return cls(described["name"], (d, k), values.dtype, None, digest, sketch, fingerprint.checksum(values))

    @classmethod
    def of_sharded(cls, name: str, described: Mapping[str, Any], base: Any) -> "KnownBase | None":
        """That of a file, of a base layer of which each process holds a part; None where it is another weight.

        Collective. ``name`` is the module's in this model, whatever it is called in the file.
        """
        if str(base.weight.dtype) != f"torch.{described['dtype']}":
            return None
        sketch = tuple(described["weight_sketch"])
        if not _same_sketch(sharded.sketch(base.weight, base, described["name"]), sketch):
            return None
        if name != described["name"]:
            sketch = tuple(fingerprint.short(value) for value in sharded.sketch(base.weight, base, name))
        shape = described["out_features"], described["in_features"]
        return cls(name, shape, base.weight.dtype, None, described["weight_sha256"], sketch, "")

    def holds_for(self, name: str, base: Any) -> bool:
        """Whether it is what would be taken of a base layer now. Collective where the weight is sharded."""
        if name != self.name or self.checksum is None or kind_of(base) is not None:
            return False
        if not sharded.is_sharded(getattr(base, "weight", None)):
            return fingerprint.checksum(dense_weight(base)) == self.checksum
        if base.weight.dtype != self.dtype:
            return False
        return _same_sketch(sharded.sketch(base.weight, base, name), self.sketch)


def _same_sketch(now: Sequence[float], then: Sequence[float]) -> bool:
    allowed = 1e-8 * max(abs(value) for value in then)  # nine digits are kept
    return all(abs(a - b) <= allowed for a, b in zip(now, then, strict=True))


def known_base(layer: Any, name: str) -> KnownBase:
    """The fingerprint of an adapted layer's base weight as it is now, kept on the layer.

    Where the weight is sharded this is collective: every process must ask for the same layers in the same order. If no
    fingerprint was taken while the weight was whole, or the weight has changed since, the weight is gathered for it.
    """
    base, known = layer.base(), layer.known
    if known is None or not known.holds_for(name, base):
        if sharded.is_sharded(getattr(base, "weight", None)):
            values = sharded.whole(base.weight)
            known = KnownBase.of(name, values.t() if is_conv1d(base) else values)
        else:
            known = KnownBase.of(name, base)
        layer.known = known
    return known


def may_be_sharded() -> bool:
    """Whether this process is one of several, so that the weights may not stay whole."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1") != "1"  # set by torchrun and DeepSpeed's launcher


def know_bases(layers: Mapping[str, nn.Module]) -> None:
    """Take the fingerprints now if the weights may be sharded later; otherwise the first save takes them."""
    if may_be_sharded():
        for name, layer in layers.items():
            known_base(layer, name)


__all__ = ["KnownBase", "know_bases", "known_base", "may_be_sharded"]
