# SPDX-License-Identifier: Apache-2.0
"""The table (markdown and JSON) and the figure of whatever results there are."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

from chat_data import DataError
from compare_methods import METHODS
from compare_plan import Outline, missing_of
from compare_store import Store
from compare_tasks import RANDOM, TASKS, Size
from compare_timings import summary_of
from report import whole, write_json

COLOURS = {
    "osora": "#c8553d", "osora-s": "#e39a86", "osora-o": "#b58a7c", "osora-in": "#8c4a3a", "sorsa": "#8a5a9e",
    "lora": "#1f6f8b", "lora1": "#7fb2c4", "pissa": "#2f5d3a", "dora": "#7a9e3b", "vera": "#b8860b", "base": "#888888",
}  # fmt: skip
MARKERS = dict.fromkeys(COLOURS, "o") | {"osora-s": "v", "osora-o": "^", "osora-in": "<", "sorsa": "D", "lora1": "s"}


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "values": values}


def row_of(results: Path, store: Store, task: str, method: str) -> dict[str, Any] | None:
    """What is known of a method on a task; None if nothing is."""
    cells = store.of(task, method)
    if not cells:
        return None
    searched = {cell["rate"]: cell for cell in cells if cell["stage"] == "search"}
    losses = {rate: None if cell.get("diverged") else cell["validation"]["loss"] for rate, cell in searched.items()}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    rate = min(known, key=known.__getitem__) if known else 0.0
    both = cells[0]["settings"]["both"]  # the search's run at the best rate is seed 0
    final = [cell for cell in cells if cell["rate"] == rate and (both or cell["stage"] == "final")]
    good = sorted((cell for cell in final if not cell.get("diverged")), key=lambda cell: cell["seed"])
    row: dict[str, Any] = {
        "method": method,
        "label": METHODS[method].label,
        "settings": cells[0]["method_settings"],
        "task_settings": cells[0]["settings"],
        "versions": cells[0]["versions"],
        "trainable": cells[0]["trainable"],
        "search": {f"{rate:.2e}": losses[rate] for rate in sorted(losses)},
        "rate": rate,
        "seeds": [cell["seed"] for cell in good],
        "diverged": len(final) - len(good),
    }
    for name in ("loss", "accuracy"):
        if values := [cell["test"][name] for cell in good if name in cell["test"]]:
            row[name] = _spread(values)
    for cell in good:
        names = ("benchmarks", "adapter_bytes", "adapter_bytes_by_default")
        row |= {name: cell[name] for name in names if cell.get(name)}
    return row | summary_of(results / "timings" / task / f"{method}.json")


def rows_of(results: Path, store: Store, task: str) -> list[dict[str, Any]]:
    """All methods of a task. DataError if results of different settings lie in one file."""
    rows = [row for method in METHODS if (row := row_of(results, store, task, method)) is not None]
    if len({json.dumps(row["task_settings"], sort_keys=True) for row in rows}) > 1:
        raise DataError(f"{store.path} holds results of different settings for {task}: take another --output")
    return rows


def missing(store: Store, task: str, rows: list[dict[str, Any]]) -> list[str]:
    """In words, what was asked for and is not there."""
    if not rows:
        return []
    settings = rows[0]["task_settings"]
    size = Size(**{field.name: settings[field.name] for field in fields(Size)})
    outline = Outline(task, size, settings.get("head_rate", 0.0), settings)
    return missing_of(outline, store.asked.get(task, []), lambda cell: store.found(*cell.which()))


# -- the table ---------------------------------------------------------------------------------------------------------


def _number(spread: dict[str, Any] | None, digits: int, times: float = 1) -> str:
    if spread is None:
        return "–"
    text = f"{times * spread['mean']:.{digits}f}"
    return text if spread["deviation"] is None else f"{text} ± {times * spread['deviation']:.{digits}f}"


def _bytes(row: dict[str, Any]) -> str:
    if "adapter_bytes" not in row:
        return "–"
    least, default = (f"{row[name] / 1e3:,.0f}" for name in ("adapter_bytes", "adapter_bytes_by_default"))
    return least if least == default else f"{least} ({default})"


def _time(row: dict[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else "–"


def table_of(task: str, rows: list[dict[str, Any]], lacking: list[str]) -> str:
    """Markdown, and below it what is not there yet."""
    benchmarks = sorted({name for row in rows for name in row.get("benchmarks", {})})
    accuracy = any("accuracy" in row for row in rows)
    columns = ["method", "trained", "rate (tried)", "seeds", "held-out loss"]
    columns += [*(["accuracy, %"] if accuracy else []), *benchmarks]
    columns += ["attach, s", "step, s", "peak, GB", "adapter, kB"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    for row in rows:
        rate = f"{row['rate']:.2g} ({len(row['search'])})" if row["search"] else "–"
        cells = [row["label"], f"{row['trainable']:,}", rate, str(len(row["seeds"])), _number(row.get("loss"), 4)]
        cells += [_number(row.get("accuracy"), 1, 100)] if accuracy else []
        for name in benchmarks:
            value = row.get("benchmarks", {}).get(name)
            cells.append("–" if value is None else f"{value:.3f}")
        peak = {"peak": row["step_peak_bytes"] / 1e9} if "step_peak_bytes" in row else {}
        cells += [_time(row, "init_seconds", 2), _time(row, "step_seconds", 3), _time(peak, "peak", 2), _bytes(row)]
        lines.append("| " + " | ".join(cells) + " |")
    if lacking:
        lines += ["", "Not there yet, so that rates may change and fewer seeds count than were asked for:"]
        lines += ["", *(f"- {line}" for line in lacking)]
    where = rows[0]["task_settings"]
    title = "A rehearsal, no figure" if where["model"] == RANDOM else TASKS[task].title
    return f"**{title}** ({where['device']}, {where['dtype']})\n\n" + "\n".join(lines) + "\n"


NOTES = """\
Held-out loss: nats, on rows that no choice was made on; mean ± standard deviation over the seeds. Rate (tried): the
learning rate with the least validation loss, of how many. Adapter: what a loader cannot compute again, in brackets what
the library writes by default where that is more. A dash: not measured.
"""


# -- the figure --------------------------------------------------------------------------------------------------------


def _scatter(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """Held-out loss over trained numbers; the untrained model as a line."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_title(title, loc="left")
    axes.set(xscale="log", xlabel="trained numbers in the adapter", ylabel="held-out loss (nats)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    places: set[float] = set()
    for row in rows:
        if "loss" not in row:
            continue
        mean, deviation = row["loss"]["mean"], row["loss"]["deviation"] or 0.0
        colour, name = COLOURS[row["method"]], row["method"]
        if not row["trainable"]:
            axes.axhline(mean, color=colour, linestyle="--", linewidth=1.5, label=row["label"])
            continue
        style = {"color": colour, "markersize": 9, "capsize": 4, "linewidth": 1.5}
        place = float(row["trainable"])
        while any(abs(place / other - 1) < 0.05 for other in places):  # marks side by side, not on each other
            place *= 1.06
        places.add(place)
        axes.errorbar(place, mean, deviation, fmt=MARKERS[name], label=row["label"], **style)


def _rates(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """Validation loss over the learning rate, what the rates were chosen by."""
    axes.set_title(title, loc="left")
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats)")
    best = [min(known) for row in rows if (known := [x for x in row["search"].values() if x is not None])]
    for row in rows:
        points = [(float(rate), loss) for rate, loss in row["search"].items() if loss is not None]
        if points:
            style = {"color": COLOURS[row["method"]], "marker": MARKERS[row["method"]], "label": row["label"]}
            axes.plot(*zip(*points, strict=True), linewidth=1.8, markersize=5, **style)
    if best:  # rates that are far too large would hide all others
        axes.set_ylim(
            min(best) - 0.1 * (max(best) - min(best)) - 0.01, max(best) + 1.2 * (max(best) - min(best)) + 0.05
        )


def plot(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """A scatter for each task with results, and the search of the first; nothing if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {task: rows for task, rows in found.items() if any("loss" in row and row["trainable"] for row in rows)}
    if not found:
        return
    with pyplot.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = pyplot.subplots(
            1, len(found) + 1, figsize=(5.4 * (len(found) + 1), 5.6), dpi=130, layout="constrained"
        )
        for axes, (task, rows) in zip(panels, found.items(), strict=False):
            _scatter(axes, TASKS[task].title, rows)
        first = next(iter(found))
        _rates(panels[-1], f"Choice of rates, {TASKS[first].title.split()[0]}", found[first])
        labels: dict[str, Any] = {}
        for axes in panels:
            axes.grid(alpha=0.25)
            handles, names = axes.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
        order = [METHODS[name].label for name in METHODS if METHODS[name].label in labels]
        handles = [labels[name] for name in order]
        columns = math.ceil(len(order) / 2)
        figure.legend(handles, order, loc="outside lower center", ncols=columns, frameon=False)
        with whole(path) as unfinished:
            figure.savefig(unfinished, format="png")
        pyplot.close(figure)


def write(results: Path, store: Store) -> None:
    """comparison.md, comparison.json, comparison.png. DataError if what is there does not go together."""
    found = {task: rows_of(results, store, task) for task in TASKS}
    lacking = {task: missing(store, task, rows) for task, rows in found.items()}
    write_json(results / "comparison.json", {"tasks": found, "missing": lacking})
    tables = "\n".join(table_of(task, rows, lacking[task]) for task, rows in found.items() if rows)
    with whole(results / "comparison.md") as unfinished:
        unfinished.write_text(f"{tables}\n{NOTES}", encoding="utf-8")
    plot(results / "comparison.png", found)
