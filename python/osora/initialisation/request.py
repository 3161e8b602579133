# SPDX-License-Identifier: Apache-2.0
"""What is to be made: which layers of which checkpoint, and what it will cost, before any weight is read."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osora.config import AdapterConfig
from osora.files.base_folder import BaseFolder
from osora.files.basis_layer import LayerEntry
from osora.initialisation.layers import SourceLayer, SourceModel, bytes_free
from osora.initialisation.schedule import Job, units
from osora.initialisation.tree import snapshot
from osora.model.decompose import check_fits
from osora.reference import FLOATS, accumulate_dtype
from osora.svd.plan import svd_plan

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that a basis can be decomposed in. Raises ValueError for another; None and "auto" are None."""
    if dtype is None or dtype == "auto":
        return None
    found = _NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise ValueError(f'dtype must be "auto" or one of {", ".join(_NAMES)}, got {dtype!r}')
    return found


@dataclass(frozen=True)
class InitialisationPlan:
    """What :func:`osora.initialise` will do; ``print`` it."""

    base: Path
    layers: tuple[SourceLayer, ...]
    units: tuple[tuple[int, ...], ...]
    """Indices of the layers that are decomposed in one call."""
    bytes_read: int
    bytes_written: int
    flops: float
    """Of all decompositions; an estimate, which depends on the spectra by a factor of about two."""
    memory: int
    """Bytes at the most: three of the largest units' weights, a decomposition's arrays, the factors."""
    bytes_free: int
    """On the disk of the basis."""

    def costs(self) -> list[float]:
        """Of the units, in operations."""
        return [sum(job_of(self.layers[index]).flops for index in unit) for unit in self.units]

    def __str__(self) -> str:
        """A table."""
        ranks = sorted({layer.target.rank for layer in self.layers})
        dtypes = sorted({str(layer.target.weight.dtype).removeprefix("torch.") for layer in self.layers})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"{len(self.layers)} layers of {self.base}, rank {rank}, {', '.join(dtypes)}",
            f"read      {self.bytes_read / 1e9:10.3f} GB",
            f"write     {self.bytes_written / 1e9:10.3f} GB  ({self.bytes_free / 1e9:.1f} GB free)",
            f"arithmetic{self.flops / 1e12:10.3f} TFLOP, within a factor of two",
            f"memory    {self.memory / 1e9:10.3f} GB at the most, beside Python and torch",
        ]
        return os.linesep.join(lines)


def job_of(layer: SourceLayer) -> Job:
    """A layer as the schedule sees it."""
    weight = layer.target.weight
    return Job(weight.shape, layer.target.rank, weight.dtype)


@dataclass(frozen=True)
class Request:
    """A basis that is asked for: the checkpoint's layers, and how they are decomposed."""

    source: SourceModel
    config: AdapterConfig
    units: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        base: str | os.PathLike[str],
        config: AdapterConfig,
        model: nn.Module | None,
        dtype: torch.dtype | str | None,
        on_card: bool,
    ) -> "Request":
        """Read the checkpoint's headers, make its model's tree and find the layers."""
        source = SourceModel(BaseFolder(snapshot(Path(base))), config, model, dtype_named(dtype))
        found = units([job_of(layer) for layer in source.layers], on_card)
        return cls(source, config, tuple(tuple(unit) for unit in found))

    def text(self) -> dict[str, Any]:
        """What two processes must agree about to work on one basis."""
        layers = [
            [layer.name, layer.target.rank, str(layer.target.weight.dtype), list(layer.target.weight.shape)]
            for layer in self.source.layers
        ]
        return {"base": self.source.sample(), "tol": self.config.tol, "seed": self.config.seed, "layers": layers}

    def suits(self, layer: SourceLayer, entry: LayerEntry) -> str | None:
        """What makes a layer that is there another one than is asked for, if anything."""
        target = layer.target
        asked = {
            "rank": target.rank,
            "tol": self.config.tol,
            "seed": self.config.seed,
            "dtype": str(target.weight.dtype).removeprefix("torch."),
            "shape": target.weight.shape,
        }
        there = {
            "rank": entry.rank,
            "tol": entry.tol,
            "seed": entry.seed,
            "dtype": entry.dtype,
            "shape": (entry.out_features, entry.in_features),
        }
        for key, value in asked.items():
            if there[key] != value:
                return f"{key} {there[key]} there, {value} asked for"
        return None

    def check_fits(self, device: torch.device | str, max_memory: int | None) -> None:
        """Raise ValueError for a layer whose decomposition takes more than ``max_memory`` bytes."""
        if max_memory is not None:
            for layer in self.source.layers:
                weight = layer.target.weight._replace(device=torch.device(device))
                check_fits(replace(layer.target, weight=weight), max_memory)

    def plan(self, out: Path, device: torch.device | str = "cpu") -> InitialisationPlan:
        """What it will cost."""
        layers = self.source.layers
        written, arrays, weights, factors = 0, 0, 0, 0
        for layer in layers:
            (d, k), r, dtype = layer.target.weight.shape, layer.target.rank, layer.target.weight.dtype
            written += (d + k) * r * dtype.itemsize + r * (accumulate_dtype(dtype).itemsize + 8)
            arrays = max(arrays, svd_plan((d, k), r, dtype, device).bytes)
        for unit in self.units:
            weights = max(weights, sum(_entries(layers[i]) * layers[i].target.weight.dtype.itemsize for i in unit))
            factors = max(
                factors,
                sum(
                    sum(layers[i].target.weight.shape)
                    * layers[i].target.rank
                    * accumulate_dtype(layers[i].target.weight.dtype).itemsize
                    for i in unit
                ),
            )
        return InitialisationPlan(
            self.source.base.folder,
            tuple(layers),
            self.units,
            sum(layer.bytes_read for layer in layers),
            written,
            sum(job_of(layer).flops for layer in layers),
            3 * weights + arrays + 4 * factors,
            bytes_free(out),
        )


def _entries(layer: SourceLayer) -> int:
    return layer.target.weight.numel


__all__ = ["InitialisationPlan", "Request", "dtype_named", "job_of"]
