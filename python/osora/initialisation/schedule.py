# SPDX-License-Identifier: Apache-2.0
"""Who decomposes what, by arithmetic alone: every process finds the same schedule without asking another."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CPU_ENTRIES = 2**24  # weight entries of one unit on a CPU: what a decomposition of many small weights takes at once
_CARD_ENTRIES = 2**27


@dataclass(frozen=True)
class Job:
    """A layer as the schedule sees it."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Of its decomposition, roughly: products of some ``COLUMNS`` r columns, and the basis's orthogonalisation."""
        d, k = self.shape
        columns = COLUMNS * self.rank
        return 2.0 * d * k * columns + 4.0 * (d + k) * columns * self.rank


COLUMNS = 26.0
"""Columns of all products with W, over the rank; the median over SmolLM2's weights and known spectra (docs/svd.md)."""


def units(jobs: Sequence[Job], on_card: bool = False) -> list[list[int]]:
    """Indices of jobs that are decomposed in one call: of one kind, in their order, of bounded size.

    A function of the jobs alone, so that all processes, and a run that goes on, have the same units.
    """
    kinds: dict[Job, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        kinds[job].append(index)
    entries, found = _CARD_ENTRIES if on_card else CPU_ENTRIES, []
    for job, members in kinds.items():
        size = max(1, entries // (job.shape[0] * job.shape[1]))
        found += [members[begin : begin + size] for begin in range(0, len(members), size)]
    return sorted(found)


def schedule(costs: Sequence[float], parts: int) -> list[list[int]]:
    """For each part its units' indices, the most costly first: each goes to the part that has least so far.

    Longest processing time first: the slowest part ends at most a third later than the best schedule's.
    Source: R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17 (1969), theorem 3.

    Args:
        costs: of the units.
        parts: how many processes share them.
    """
    given: list[list[int]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(parts), key=lambda part: (loads[part], part))
        given[least].append(index)
        loads[least] += costs[index]
    return given


def order_for(part: int, given: Sequence[Sequence[int]], costs: Sequence[float]) -> list[int]:
    """All units in the order in which a part looks for work: its own, then the others', which may be nobody's yet.

    The others' least costly come first: their owners reach those last.
    """
    own = list(given[part])
    others = [index for other, members in enumerate(given) if other != part for index in members]
    return own + sorted(others, key=lambda i: (costs[i], i))


__all__ = ["COLUMNS", "CPU_ENTRIES", "Job", "order_for", "schedule", "units"]
