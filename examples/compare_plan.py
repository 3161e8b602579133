# SPDX-License-Identifier: Apache-2.0
"""Which runs a comparison has, and in which order: all methods at one rate before any at the next, then seed by seed.

So a comparison that is stopped has something of every method. The search for a method's learning rate, at seed 0,
begins in the middle of its grid, and goes on while the best rate is at an edge. Where a size says "both", its runs are
evaluated on the test rows too, and the one at the best rate is seed 0; no choice looks at that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare_cells import Cell
from compare_methods import METHODS, Method

MOST_EXTENSIONS = 4  # of the grid of learning rates, in all
FINALS = 100  # rounds from here on are seeds

Found = Callable[[Cell], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Outline:
    """What is to be known of a task without its model and rows."""

    name: str
    size: Any
    head_rate: float
    about: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What a result depends on beside method, rate and seed."""
        return self.about


def outline_of(task: Any) -> Outline:
    """Of a task that is loaded."""
    return Outline(task.name, task.size, task.head_rate, task.settings())


def rate_of(half_decades: int) -> float:
    """A learning rate of the grid: -4 is 1e-2, -5 is 3.16e-3."""
    return float(f"{10 ** (half_decades / 2):.2e}")


def start_of(method: Method, count: int) -> list[int]:
    """Where the search begins: `count` places in the middle of the method's, the middle first."""
    start = (len(method.rates) - count) // 2
    chosen = method.rates[start : start + count]
    middle = (chosen[0] + chosen[-1]) / 2
    return sorted(chosen, key=lambda place: (abs(place - middle), place))


def further_of(losses: Mapping[int, float]) -> int | None:
    """The next place of a search; None if the best is at no edge."""
    best = min(sorted(losses), key=losses.__getitem__)
    further = best - 1 if best == min(losses) else best + 1
    return None if further in losses else further


def wanted(task: Any, method: Method, found: Found) -> list[tuple[int, Cell]]:
    """(round, cell) of what is not there and could be run now: once it is, there may be more."""

    def search(place: int) -> Cell:
        return Cell(task, method, rate_of(place), 0, "search")

    def missing(cells: Sequence[tuple[int, Cell]]) -> list[tuple[int, Cell]]:
        return [(number, cell) for number, cell in cells if found(cell) is None]

    if method.name == "base" and task.head_rate == 0:  # nothing to train, nothing to search
        return missing([(0, Cell(task, method, 0.0, 0, "final"))])
    places = start_of(method, task.size.rates)
    if left := missing([(number, search(place)) for number, place in enumerate(places)]):
        return left
    losses = {place: loss_of(found(search(place))) for place in places}
    for number in range(MOST_EXTENSIONS):
        further = further_of(losses)
        if further is None:
            break
        result = found(search(further))
        if result is None:
            return [(task.size.rates + number, search(further))]
        losses[further] = loss_of(result)
    rate = rate_of(min(sorted(losses), key=losses.__getitem__))
    seeds = range(1 if task.size.both else 0, task.size.seeds)
    return missing([(FINALS + seed, Cell(task, method, rate, seed, "final")) for seed in seeds])


def loss_of(result: dict[str, Any] | None) -> float:
    """On the validation rows."""
    assert result is not None
    return math.inf if result.get("diverged") else result["validation"]["loss"]


def in_order(tasks: Sequence[Any], methods: Mapping[str, Sequence[str]], found: Found) -> list[Cell]:
    """What could be run now, the first first."""
    cells = [
        (number, place, cell)
        for place, (task, name) in enumerate((task, name) for task in tasks for name in methods[task.name])
        for number, cell in wanted(task, METHODS[name], found)
    ]
    return [cell for *_, cell in sorted(cells, key=lambda each: each[:2])]


def missing_of(task: Any, names: Sequence[str], found: Found) -> list[str]:
    """In words, what a report has not: a line for each method that is not through."""
    lines = []
    for name in names:
        method = METHODS[name]
        left = wanted(task, method, found)
        if not left:
            continue
        rates = [f"{cell.rate:.1e}" for number, cell in left if number < FINALS and cell.stage == "search"]
        seeds = [str(cell.seed) for number, cell in left if cell.stage == "final"]
        what = f"rates {', '.join(rates)} of the search, then seeds" if rates else f"seeds {', '.join(seeds)}"
        lines.append(f"{method.label}: {what}")
    return lines
