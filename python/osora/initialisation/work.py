# SPDX-License-Identifier: Apache-2.0
"""One process's work on a basis: which units it takes, how it reads, decomposes and writes them."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from osora.files.basis import INDEX_FILE, BasisLayer, fingerprint_of, write_index
from osora.files.basis_layer import BasisError, describe_layer, file_name, read_layer, write_layer
from osora.initialisation.claims import Claims
from osora.initialisation.layers import SourceLayer
from osora.initialisation.parts import Part
from osora.initialisation.request import InitialisationPlan, Request
from osora.initialisation.schedule import order_for, schedule
from osora.layers import fingerprint
from osora.layers.base_weight import dense_weight
from osora.svd.certificate import Decomposition, Unconverged, report_failure
from osora.svd.truncated import decompose

UNFINISHED = ".unfinished"  # in the basis's folder until the index is there
_POLL = 0.5  # seconds between looks at what other processes have in work


@dataclass(frozen=True)
class Evidence:
    """What a layer's weight is known by when it is forgotten."""

    layer: SourceLayer
    sha256: str
    sketch: list[float]


@dataclass(frozen=True)
class ReadWeight:
    """A weight that was read, on the device it is decomposed on, and what it is known by."""

    values: Tensor
    evidence: Evidence


@dataclass(frozen=True)
class Task:
    """A unit that this process has claimed, and those of its layers that are to be made."""

    unit: int
    layers: tuple[SourceLayer, ...]


@dataclass
class Work:
    """One process's work on a basis."""

    request: Request
    out: Path
    part: Part
    device: torch.device
    max_memory: int | None
    unconverged: Unconverged
    on_layer: Callable[[SourceLayer, int], None]
    claims: Claims
    plan: InitialisationPlan
    computed: list[str] = field(default_factory=list)
    failed: list[Decomposition] = field(default_factory=list)
    kept: int = 0
    done: int = 0

    def path(self, layer: SourceLayer) -> Path:
        """Of a layer's file."""
        return self.out / file_name(layer.name)

    def unit(self, index: int) -> list[SourceLayer]:
        """Its layers."""
        return [self.plan.layers[i] for i in self.plan.units[index]]

    def missing(self, index: int) -> tuple[SourceLayer, ...]:
        """Those of a unit that nobody has finished."""
        return tuple(layer for layer in self.unit(index) if not self.path(layer).exists())

    def progressed(self, layer: SourceLayer) -> None:
        """Count a layer that this process has checked or made."""
        self.done += 1
        self.on_layer(layer, self.done)

    # -- in the reader's thread --

    def check(self, layer: SourceLayer) -> None:
        """A layer of an earlier run: is it whole, and of this base, as it is asked for now? One that is damaged goes.

        Raises:
            BasisError: it is another base's, or was made with other options.
        """
        path = self.path(layer)
        try:
            entry, _, _ = read_layer(path)
            if entry.name != layer.name:
                raise BasisError(f"{path} is a file of {entry.name}")
        except BasisError as error:
            warnings.warn(f"{error}: it is made again", RuntimeWarning, stacklevel=2)
            path.unlink(missing_ok=True)
            return
        if (why := self.request.suits(layer, entry)) is not None:
            raise BasisError(f"{path} was made with other options ({why}): choose another folder, or the same options")
        weight = dense_weight(self.request.source.read(layer))
        if fingerprint.weight_digest(weight) != entry.weight_sha256:
            raise BasisError(
                f"{path} is of another base: {layer.name}.weight in {self.request.source.base.folder} is not the "
                "weight it was made of; choose another folder"
            )
        self.kept += 1
        self.progressed(layer)

    def tasks(self) -> Iterator[Task]:
        """Units that this process has claimed, until all layers are there, or in work in a process that lives."""
        costs = self.plan.costs()
        given = schedule(costs, self.part.of)
        own = set(given[self.part.index])
        there = {layer.name for layer in self.plan.layers if self.path(layer).exists()}
        waiting = []
        for index in order_for(self.part.index, given, costs):
            if index in own:
                for layer in self.unit(index):
                    if layer.name in there:
                        self.check(layer)
            if self.missing(index):
                if self.claims.take(index):
                    yield from self.claimed(index)
                else:
                    waiting.append(index)
        while waiting := [index for index in waiting if self.missing(index)]:
            for index in waiting:
                if self.missing(index) and self.claims.take(index):
                    yield from self.claimed(index)
                    break
            else:
                self.claims.wait(_POLL)

    def claimed(self, index: int) -> Iterator[Task]:
        """A unit that is this process's now, unless it was done in the meantime."""
        if layers := self.missing(index):
            yield Task(index, layers)
        else:  # done between the look and the claim
            self.claims.release(index)

    def read(self, task: Task) -> list[ReadWeight]:
        """The unit's weights; what they are known by is taken here, beside the arithmetic."""
        found = []
        for layer in task.layers:
            weight = dense_weight(self.request.source.read(layer)).detach()
            sha256, sketch = fingerprint.weight_evidence(weight, layer.name)
            found.append(ReadWeight(self.placed(weight), Evidence(layer, sha256, sketch)))
        return found

    @cached_property
    def copies(self) -> torch.cuda.Stream:
        """The stream of the copies to the card."""
        return torch.cuda.Stream(self.device)

    def placed(self, weight: Tensor) -> Tensor:
        """On the device; on a card by a stream of its own, beside the decomposition that is under way."""
        if self.device.type != "cuda":
            return weight
        with torch.cuda.stream(self.copies):
            moved = weight.pin_memory().to(self.device, non_blocking=True)
        self.copies.synchronize()
        return moved

    # -- in the caller's --

    def compute(self, task: Task, weights: list[ReadWeight]) -> list[tuple[Evidence, Decomposition]]:
        """Decompose a unit's weights in one call; nothing of what waits to be written holds them."""
        if self.device.type == "cuda":
            for weight in weights:  # its memory is the copies' stream's
                weight.values.record_stream(torch.cuda.current_stream(self.device))
        found = decompose(
            [weight.values for weight in weights],
            task.layers[0].target.rank,
            names=[layer.name for layer in task.layers],
            labels=[f"{layer.name}.weight" for layer in task.layers],
            tol=self.request.config.tol,
            seed=self.request.config.seed,
            max_memory=self.max_memory,
            unconverged=None,
        )
        failed = [factors for factors in found if not factors.converged]
        if self.unconverged == "raise":
            report_failure(failed, self.request.config.tol, "raise", 1, "a smaller r")
        self.failed += failed
        return [(weight.evidence, factors) for weight, factors in zip(weights, found, strict=True)]

    # -- in the writer's --

    def write(self, task: Task, found: list[tuple[Evidence, Decomposition]]) -> None:
        """Write the unit's layers, each whole, and give the claim back."""
        config = self.request.config
        for known, factors in found:
            layer = known.layer
            entry = describe_layer(
                factors, layer.target.weight.dtype, known.sha256, known.sketch, config.tol, config.seed
            )
            (self.out / UNFINISHED).mkdir(exist_ok=True)  # another process may have ended with what was all to it
            write_layer(self.out, entry, factors, self.out / UNFINISHED)
            self.computed.append(layer.name)
            self.progressed(layer)
        self.claims.release(task.unit)

    # -- at the end --

    def index(self) -> str:
        """Write the index of what is there; the fingerprint."""
        found = []
        for layer in self.plan.layers:
            entry, digest, _ = read_layer(self.path(layer))
            if (why := self.request.suits(layer, entry)) is not None or entry.name != layer.name:
                raise BasisError(f"{self.path(layer)} was made with other options ({why or entry.name})")
            found.append(BasisLayer(entry, digest))
        base = self.request.source.base
        (self.out / UNFINISHED).mkdir(exist_ok=True)
        try:
            name = base.config.get("_name_or_path") or base.folder.name
            write_index(self.out, found, name, self.out / UNFINISHED)
        except FileNotFoundError:  # another process has written it, and removed the folder beneath this one
            if not (self.out / INDEX_FILE).is_file():
                raise
        shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)
        return fingerprint_of(found)


__all__ = ["UNFINISHED", "Evidence", "ReadWeight", "Task", "Work"]
