# SPDX-License-Identifier: Apache-2.0
"""What bench/linear.py prints, writes and draws of its cases."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure
from layers import ABOUT, PEERS
from linear_cases import Case, Row
from measure import Timing, show_bytes, show_seconds


def ratios(row: Row, other: Row, part: str = "step") -> tuple[float, float, float]:
    return getattr(row, part).ratio(getattr(other, part))


def frozen_of(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.peer == "frozen"), None)


def of_gemm(case: Case, row: Row, rate: float) -> float:
    """Arithmetic over time and over the rate of a large product."""
    return 4 * case.n * case.shape.d * case.shape.k * row.floors[1] / row.step.median / rate / 1e9


def median_text(timing: Timing) -> str:
    return show_seconds(timing).partition(" (")[0]


def show(case: Case, rows: list[Row], rate: float) -> None:
    """The table of one case."""
    lines: list[list[str | None]] = []
    frozen, rank = frozen_of(rows), 0
    for row in rows:
        if row.rank != rank and lines:
            lines.append([None])
        rank = row.rank
        over, over_floor, forward = "", "", ""
        if frozen and row is not frozen:
            middle, low, high = ratios(row, frozen)
            over, over_floor = f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{middle / row.floors[1]:.3f}"
            forward = f"{ratios(row, frozen, 'forward')[0]:.3f}"
        floor = f"{row.floors[1]:.3f}" if row.rank else ""
        if row.graph and frozen and frozen.graph:
            over += f"\ngraph {row.graph.ratio(frozen.graph)[0]:.3f}" if row is not frozen else ""
        errors = f"{max(row.errors.values()):.0e}" if row.errors else ""
        memory = "–" if row.peak is None else show_bytes(row.peak)
        times = [median_text(timing) for timing in (row.forward, row.backward, row.step)]
        lines.append([ABOUT[row.peer], str(row.rank or ""), *times, forward, over, floor, over_floor])
        lines[-1] += [f"{100 * of_gemm(case, row, rate):.0f} %", show_bytes(row.saved), memory, errors]
    names = ("peer", "r", "forward", "backward", "both", "fwd / frozen", "both / frozen", "floor", "over floor")
    measure.table(str(case), (*names, "of GEMM", "saved", "peak", "error"), lines)


def as_dict(case: Case, rows: list[Row], rate: float) -> dict[str, Any]:
    """For the JSON."""
    frozen, found = frozen_of(rows), []
    ours = {row.rank: row for row in rows if row.peer == "osora"}
    for row in rows:
        facts: dict[str, Any] = {"peer": row.peer, "rank": row.rank or None, "step": row.step.as_dict()}
        for part in ("forward", "backward"):
            facts[part] = {name: value for name, value in getattr(row, part).as_dict().items() if name != "all"}
        facts |= {"forward_floor": row.floors[0], "floor": row.floors[1], "of_gemm_rate": of_gemm(case, row, rate)}
        facts |= {"saved_bytes": row.saved, "extra_memory_bytes": row.peak, "errors": row.errors or None}
        names = ("median", "min", "max")
        if frozen and row is not frozen:
            for part, name in (("step", "over_frozen"), ("forward", "forward_over_frozen")):
                facts[name] = dict(zip(names, ratios(row, frozen, part), strict=True))
            facts["over_floor"] = facts["over_frozen"]["median"] / row.floors[1]
            facts["quickest_over_frozen"] = row.step.quickest_ratio(frozen.step)
        facts |= graph_facts(row, frozen, ours.get(row.rank))
        if row.rank in ours and row.peer != "osora":
            facts["osora_over_this"] = dict(zip(names, ratios(ours[row.rank], row), strict=True))
        found.append(facts)
    return {**asdict(case), "repetitions": len(rows[0].step.seconds), "peers": found}


def graph_facts(row: Row, frozen: Row | None, ours: Row | None) -> dict[str, Any]:
    """Of the replays of captured graphs; nothing on a CPU."""
    if row.graph is None:
        return {"no_graph": row.no_graph} if row.no_graph else {}
    facts: dict[str, Any] = {"graph": row.graph.as_dict()}
    if row.graph_forward:
        facts["graph_forward"] = row.graph_forward.as_dict()
    for name, above, below in (("graph_over_frozen", row, frozen), ("graph_osora_over_this", ours, row)):
        if above and below and above is not below and above.graph and below.graph:
            facts[name] = dict(zip(("median", "min", "max"), above.graph.ratio(below.graph), strict=True))
    return facts


def summary(drawn: list[tuple[Case, list[Row]]]) -> None:
    """A line for each case and rank: osora over the others, forward and backward together, by medians and (over the
    floor) by the shortest times, which a busy machine moves least.
    """
    columns = ["layer", "n", "r", "osora / frozen", "floor", "over floor", "quickest"]
    columns += [f"/ {name}" for name in PEERS if name not in ("frozen", "osora")]
    for dtype in dict.fromkeys(case.dtype for case, _ in drawn):
        lines: list[list[str | None]] = []
        for case, rows in drawn:
            for ours in (row for row in rows if row.peer == "osora" and case.dtype == dtype):
                others = {row.peer: row for row in rows if row.rank in (0, ours.rank)}
                cells = [str(case.shape), str(case.n), str(ours.rank)]
                middle = ratios(ours, others["frozen"])[0] if "frozen" in others else math.nan
                cells += [f"{middle:.3f}", f"{ours.floors[1]:.3f}", f"{middle / ours.floors[1]:.3f}"]
                quickest = ours.step.quickest_ratio(others["frozen"].step) if "frozen" in others else math.nan
                cells.append(f"{quickest / ours.floors[1]:.3f}")
                for name in PEERS:
                    if name not in ("frozen", "osora"):
                        cells.append(f"{ratios(ours, others[name])[0]:.3f}" if name in others else "–")
                lines.append(cells)
        if lines:
            measure.table(f"Forward and backward in {dtype}: osora over the others", columns, lines)


LOOK = {"osora": ("*", "#c1121f"), "op-by-op": ("s", "#0353a4"), "hand": ("^", "#f77f00")}
LOOK |= {"vera": ("D", "#2b9348"), "lora": ("o", "#7b2cbf")}


def plot(path: Path, drawn: list[tuple[Case, list[Row]]], subtitle: str) -> None:
    """Time over the frozen layer's, a panel for each dtype, n and rank; a bar marks osora's floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int, int], list[tuple[Case, list[Row]]]] = {}
    for case, rows in drawn:
        for rank in case.ranks:
            here = [row for row in rows if row.rank in (0, rank)]
            panels.setdefault((case.dtype, case.n, rank), []).append((case, here))
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(7.5 * across, 3.6 * down + 0.8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Forward and backward over the frozen layer, lower is better\n{subtitle}", fontsize=11)
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, ((dtype, n, rank), cases) in zip(places, panels.items(), strict=False):
        for number, (_, rows) in enumerate(cases):
            frozen = frozen_of(rows)
            for row in rows:
                if row.peer in LOOK and frozen:
                    marker, colour = LOOK[row.peer]
                    label, size = (ABOUT[row.peer] if number == 0 else None), 110 if row.peer == "osora" else 32
                    value = ratios(row, frozen)[0]
                    axes.scatter([number], [value], s=size, c=colour, marker=marker, label=label, zorder=3, lw=0)
                if row.peer == "osora":
                    label = "osora by arithmetic alone" if number == 0 else None
                    axes.hlines(row.floors[1], number - 0.35, number + 0.35, color="black", lw=1.2, label=label)
        axes.axhline(1, color="#888888", lw=0.8)
        axes.set_xticks(range(len(cases)), [f"{case.shape.d}×{case.shape.k}" for case, _ in cases], rotation=40)
        axes.set(title=f"{dtype}, n = {n}, r = {rank}", ylabel="/ frozen")
        axes.grid(True, axis="y", alpha=0.3)
    places[0].legend(fontsize=8)
    measure.write_figure(figure, path)


def pairs(drawn: list[tuple[Case, list[Row]]]) -> Iterator[tuple[Row, Row]]:
    """Each row of osora's, and the frozen one beside it."""
    for _, rows in drawn:
        frozen = frozen_of(rows)
        yield from ((row, frozen) for row in rows if row.peer == "osora" and frozen)
