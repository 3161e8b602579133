# SPDX-License-Identifier: Apache-2.0
"""What bench/svd.py prints, writes and draws of its cases."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure
from measure import (
    Timing,
    console,
    show_bytes,
    show_seconds,
)
from svd_peers import DRIVERS, LOWRANK, PEERS, Row


def show(title: str, rows: list[Row], reference: Row | None, rate: float) -> None:
    """The table of one case; reasons and complaints stand below it."""
    lines, notes = [], []
    for row in rows:
        if row.absent:
            lines.append([row.about, "absent", *["–"] * 8])
            notes.append(f"{row.about}: {row.absent}")
            continue
        once = len(row.seconds.seconds) == 1
        seconds = show_seconds(row.seconds).partition(" (")[0] + ", once" if once else show_seconds(row.seconds)
        over = "1" if row is reference else "–"
        if reference and row is not reference:
            middle, low, high = ratio(row, reference)
            over = f"{middle:.3g}" if once else f"{middle:.3g} ({low:.3g}-{high:.3g})"
        errors = [f"{getattr(row.errors, name):.1e}" for name in ("sigma", "angle_sine", "residual")]
        passes = "–"
        if row.facts:
            passes = f"{row.facts['passes']} {'/'.join(row.facts['method'])}"
            if row.facts["unconverged"]:
                notes.append(f"{row.about}: {row.facts['unconverged']} not converged, and says so")
            notes += row.facts["wrong"]
        work = ["–", "–"]
        if row.gflop is not None:
            work = [f"{row.gflop:.3g}", f"{100 * row.gflop / row.seconds.median / rate:.0f} %"]
        memory = "–" if row.memory is None else show_bytes(row.memory)
        lines.append([row.about, seconds, over, *errors, passes, *work, memory])
    over = f"/ {reference.peer}" if reference else "ratio"
    columns = ("peer", "time (min-max)", over, "σ error", "sin angle", "residual", "passes", "GFLOP", "of GEMM")
    measure.table(title, (*columns, "memory"), lines)
    for note in notes:
        console.print(f"  {note}")


def as_dict(row: Row, reference: Row | None, rate: float) -> dict[str, Any]:
    """For the JSON, which knows no infinity."""
    if row.absent:
        return {"absent": row.absent}
    errors = {name: value if math.isfinite(value) else None for name, value in asdict(row.errors).items()}
    result = {"seconds": row.seconds.as_dict(), "first_seconds": row.first, "largest_error": errors, **row.facts}
    result |= {"gflop": row.gflop, "extra_memory_bytes": row.memory, "of_gemm_rate": None, "over_reference": None}
    if row.gflop is not None:
        result["of_gemm_rate"] = row.gflop / row.seconds.median / rate
    if reference:
        result["over_reference"] = dict(zip(("median", "min", "max"), ratio(row, reference), strict=True))
    return result


def look(row: Row) -> tuple[str, str]:
    """Marker and colour of a peer in the plot."""
    if row.ours:
        return "*", "#c1121f"
    markers = dict(zip(PEERS, "sv^<>DPXdphH8", strict=False))
    family = "#0353a4" if row.peer in ("svd", *DRIVERS) else "#555555" if row.peer in LOWRANK else "#2b9348"
    return markers[row.peer], family


def place_labels(figure: Any, axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """A label near each point, where it covers no other label and no marker (or the fewest)."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    pixels = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in pixels]
    frame, renderer = axes.get_window_extent(), figure.canvas.get_renderer()
    turns = [0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11]  # sixteenths, the sides first
    spots = [(distance, math.pi * turn / 8) for distance in (8, 16, 26, 38, 52, 68, 86) for turn in turns]
    for number, (x, y, text, colour) in enumerate(points):
        best: tuple[Any, Any] | None = None
        least = math.inf
        for distance, angle in spots:
            right, up = math.cos(angle), math.sin(angle)
            label = axes.annotate(
                text,
                (x, y),
                (distance * right, distance * up),
                textcoords="offset points",
                ha="center" if abs(right) < 0.1 else "left" if right > 0 else "right",
                va="center" if abs(up) < 0.1 else "bottom" if up > 0 else "top",
                fontsize=7.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "shrinkB": 3} if distance > 10 else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line to its point
            covered = sum(box.overlaps(other) for i, other in enumerate(taken) if i != number)
            covered += 10 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if covered < least:
                if best:
                    best[0].remove()
                best, least = (label, box), covered
            else:
                label.remove()
            if least == 0:
                break
        if best:
            taken.append(best[1])


def plot(path: Path, cases: list[tuple[str, list[Row]]], subtitle: str) -> None:
    """The error of the singular values against time, a panel for each case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure(figsize=(5.2 * across, 4.2 * down + 0.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Truncated SVDs: error of σ against time, lower left is better\n{subtitle}", fontsize=11)
    panels, texts = list(figure.subplots(down, across, squeeze=False).flat), []
    for axes in panels[len(cases) :]:
        axes.remove()
    for axes, (title, rows) in zip(panels, cases, strict=False):
        points = []
        for row in rows:
            if row.absent or not math.isfinite(row.errors.sigma):
                continue
            marker, colour = look(row)
            x, y = row.seconds.median, max(row.errors.sigma, 1e-9)
            size = 110 if row.ours else 45
            axes.scatter([x], [y], marker=marker, color=colour, s=size, zorder=3, edgecolor="white", linewidth=0.6)
            points.append((x, y, row.about, colour))
        axes.set(xscale="log", yscale="log", title=title, xlabel="seconds, median", ylabel="σ error")
        axes.margins(0.22)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, which="major", alpha=0.3)
        texts.append((axes, points))
    figure.draw_without_rendering()  # settles the layout, so that labels can be measured
    figure.set_layout_engine("none")
    for axes, points in texts:
        place_labels(figure, axes, points)
    measure.write_figure(figure, path)


def ratio(row: Row, reference: Row) -> tuple[float, float, float]:
    """Of the repetitions that both ran."""
    both = min(len(row.seconds.seconds), len(reference.seconds.seconds))
    return Timing(row.seconds.seconds[:both]).ratio(Timing(reference.seconds.seconds[:both]))
