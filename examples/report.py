# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a table, the loss curve as a picture, the figures as JSON. Files are never half-written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chat_data import Row
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

console = Console(highlight=False)


class Phases:
    """Seconds per phase, announced on the console."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, announce: str) -> Iterator[None]:
        """Measure the block as `name`."""
        console.print("[bold cyan]>[/]", Text(announce))
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `target` when all went well and vanishes when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".unfinished-{os.getpid()}-{target.name}")
    try:
        yield unfinished
        if target.is_dir():  # a rename replaces a file, but not a folder that holds something
            shutil.rmtree(target)
        os.replace(unfinished, target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`content` as readable JSON."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def smoothed(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start: the first value is the first loss, not a part of it."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def plot_losses(path: Path, train: Sequence[float], held_out: Sequence[tuple[int, float]], title: str) -> None:
    """Training loss per step (thin), its moving average, and the held-out loss (points) as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    blue, red = "#1f6f8b", "#c8553d"
    with pyplot.rc_context({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(9, 5.2), dpi=150, layout="constrained")
        steps = range(1, len(train) + 1)
        axes.plot(steps, train, ".-", color=blue, alpha=0.3, linewidth=1, label="training, each batch")
        axes.plot(steps, smoothed(train), color=blue, linewidth=2.5, label="training, moving average")
        axes.plot(*zip(*held_out, strict=True), "o-", color=red, linewidth=2.5, markersize=8, label="held-out rows")
        for (step, loss), place in ((held_out[0], "left"), (held_out[-1], "right")):
            axes.annotate(
                f"{loss:.3f}", (step, loss), (0, 11), textcoords="offset points", ha=place, color=red, weight="bold"
            )
        axes.set(xlabel="optimiser step", ylabel="loss per answer token (nats)")
        axes.set_title(title, fontsize=15, loc="left", pad=14)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        with whole(path) as unfinished:
            figure.savefig(unfinished, format="png")
        pyplot.close(figure)


def show_sample(row: Row, before: str, after: str) -> None:
    """The question, the model's two answers and the one in the data."""
    parts = [("answer before the training", before, "red"), ("answer after it", after, "green")]
    if row.context:
        parts.insert(0, ("a held-out question", row.context[-1]["content"], "cyan"))
    for title, text, colour in [*parts, ("the answer in the data", row.answer, "dim")]:
        console.print(Panel(Text(text.strip()), title=title, title_align="left", border_style=colour))


def _verdict(good: bool) -> str:
    return "[green]yes[/]" if good else "[bold red]NO[/]"


def show_report(report: dict[str, Any]) -> None:
    """The figures as a table."""
    start, training, checks = report["initialisation"], report["training"], report["checks"]
    before, after = report["held_out_loss"]["before"], report["held_out_loss"]["after"]
    changed = checks["changed_weights"]
    memory = ", ".join(f"{gigabytes:.2f} GB ({of})" for of, gigabytes in report["peak_memory_gb"].items())
    size = f"{report['basis_bytes'] / 1e6:.1f} MB"
    basis = f"{size} of it basis" if report["arguments"]["save_basis"] else f"loading computes its basis of {size}"
    table = Table(title="Report", title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in (
        ("initialisation", f"{start['seconds']:.1f} s for {start['layers']} layers"),
        ("  certified error", f"{start['max_residual']:.1e}, the largest residual of a singular triplet"),
        ("  base = with adapter?", f"{_verdict(start['logits_bit_equal'])}, logits before training, bit for bit"),
        ("trainable numbers", f"{start['trainable']:,} of {start['total']:,} = {100 * start['share']:.3f} %"),
        (
            "held-out loss",
            f"{before:.4f} -> [{'green' if after < before else 'bold red'}]{after:.4f}[/] "
            f"({100 * (after / before - 1):+.1f} %) after {len(training['losses'])} steps",
        ),
        (
            "time per step",
            f"{training['median_step_seconds']:.2f} s, {training['tokens_per_second']:.0f} tokens/s",
        ),
        ("adapter on disk", f"{report['adapter_bytes'] / 1e3:,.0f} kB; {basis}"),
        (
            "merged = adapter?",
            f"{_verdict(checks['merge_ok'])}, logits differ by at most {checks['merge_max_logit_difference']:.1e} "
            f"(largest: {checks['largest_logit']:.0f})",
        ),
        (
            "unmerged = base?",
            f"{_verdict(not changed)}, {checks['tensors_compared']} tensors by sha256"
            + (f"; changed: {', '.join(changed[:3])} ..." if changed else ", bit for bit"),
        ),
        (
            "saved = trained?",
            f"{_verdict(checks['reload_ok'])}, loaded again, logits differ by at most "
            f"{checks['reload_max_logit_difference']:.1e}",
        ),
        ("peak memory", memory),
        ("total time", f"{report['seconds']['total']:.0f} s"),
    ):
        table.add_row(name, value)
    console.print(table)
