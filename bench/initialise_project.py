# SPDX-License-Identifier: Apache-2.0
"""How long a basis of a large model would take, from rates that were measured on a small one; nothing here is measured.

The arithmetic of a layer is what the schedule of osora.initialise says that it is, and a process takes what that
schedule gives it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from osora.initialisation.schedule import Job, schedule, units


@dataclass(frozen=True)
class Shape:
    """A Llama 3: its blocks, and their widths."""

    name: str
    blocks: int
    hidden: int
    wide: int
    keys: int = 1024

    def jobs(self, rank: int) -> list[Job]:
        """Every linear layer but the head, in bfloat16."""
        hidden, wide, keys = self.hidden, self.wide, self.keys
        sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
        sizes += [(wide, hidden), (wide, hidden), (hidden, wide)]
        return self.blocks * [Job(size, min(rank, *size), torch.bfloat16) for size in sizes]


SHAPES = (
    Shape("8 B", 32, 4096, 14336),
    Shape("70 B", 80, 8192, 28672),
    Shape("405 B", 126, 16384, 53248),
)
PROCESSES = (1, 8, 64)


@dataclass(frozen=True)
class Rates:
    """Of one process, as they were measured."""

    threads: int
    seconds_per_operation: float
    """Of the schedule's count, while the process read and wrote beside it."""
    seconds_per_byte: float
    """Of the thread that reads, converts and hashes a weight beside the arithmetic."""
    disk: float
    """Bytes per second of the files alone, read one after the other by one process, from the disk."""


def assumptions(rates: Rates) -> list[str]:
    """What a projection takes for granted."""
    return [
        f"a process has {rates.threads} such cores to itself, and its own memory bandwidth",
        f"an operation of the schedule's count takes {1e12 * rates.seconds_per_operation:.3g} ps at every size, as at "
        "Llama-3-8B's widths, and spectra are such that the count is as good there",
        f"reading, conversion and hashing go at {1e-9 / rates.seconds_per_byte:.3g} GB/s in each process, beside the "
        "arithmetic; the files come as fast as that to all processes at once (the column 'disk' is what that asks for)",
        "a process ends when its slower thread does; reading of its first weight and writing of its last one are left "
        "out, and so is the start of Python",
    ]


def project(shape: Shape, processes: int, rank: int, rates: Rates) -> dict[str, Any]:
    """Seconds, and which of the threads takes them."""
    jobs = shape.jobs(rank)
    parts = units(jobs)
    costs = [sum(jobs[index].flops for index in unit) for unit in parts]
    sizes = [sum(2 * jobs[index].shape[0] * jobs[index].shape[1] for index in unit) for unit in parts]
    arithmetic = reading = 0.0
    for members in schedule(costs, processes):
        arithmetic = max(arithmetic, sum(costs[index] for index in members) * rates.seconds_per_operation)
        reading = max(reading, sum(sizes[index] for index in members) * rates.seconds_per_byte)
    seconds = max(arithmetic, reading)
    return {
        "model": shape.name,
        "processes": processes,
        "projected": True,
        "bytes": sum(sizes),
        "operations": sum(costs),
        "seconds": seconds,
        "arithmetic_seconds": arithmetic,
        "reading_seconds": reading,
        "efficiency": sum(costs) * rates.seconds_per_operation / processes / arithmetic,
        "disk_bytes_per_second": sum(sizes) / seconds,
        "basis_bytes": sum(2 * sum(job.shape) * job.rank + 12 * job.rank for job in jobs),
    }


def projections(rank: int, rates: Rates) -> list[dict[str, Any]]:
    """Every model for every number of processes."""
    return [project(shape, processes, rank, rates) for shape in SHAPES for processes in PROCESSES]


def duration(seconds: float) -> str:
    """In seconds, minutes or hours, two digits."""
    size, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= s or u == "s")
    return f"{seconds / size:.2g} {unit}"


def rows(found: Iterable[dict[str, Any]]) -> list[list[str]]:
    """For the table."""
    return [
        [
            f"{facts['model']}, {facts['processes']} process" + ("es" if facts["processes"] > 1 else ""),
            duration(facts["seconds"]),
            f"{facts['bytes'] / 1e9:.0f} GB",
            f"{facts['basis_bytes'] / 1e9:.2f} GB",
            f"{facts['operations'] / 1e12:.0f} TFLOP",
            f"{100 * facts['efficiency']:.0f} %",
            f"{facts['disk_bytes_per_second'] / 1e9:.2g} GB/s",
        ]
        for facts in found
    ]


COLUMNS = ("projected", "time", "read", "basis", "arithmetic", "evenly shared", "disk")
