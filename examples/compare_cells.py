# SPDX-License-Identifier: Apache-2.0
"""One run of a method on a task, as a file; and the search for a method's learning rate, which is a row of such files.

A file is written when its run is over, under a temporary name that is then changed. What is there is never run again,
unless its settings are not those of now.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_methods import Attached, Method
from evaluate import bytes_in
from report import write_json

WARM_UP = 0.1  # share of the steps
CLIP = 1.0
MOST_EXTENSIONS = 4  # of the grid of learning rates, in all


class OutOfTime(RuntimeError):
    """The time that was given is over; what is done is on the disk."""


@dataclass(frozen=True)
class Cell:
    """A method on a task at a rate and a seed; for the "search" (validation rows) or "final" (test rows)."""

    task: Any
    method: Method
    rate: float
    seed: int
    stage: str

    def path(self, results: Path) -> Path:
        """Where its result is."""
        rate = f"{self.rate:.2e}"
        return results / "cells" / self.task.name / self.method.name / f"{self.stage}-{rate}-seed{self.seed}.json"

    def key(self) -> str:
        """A digest of everything that the result depends on and that can be written down."""
        what = [self.task.settings(), self.method.settings, WARM_UP, CLIP]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero, as a share of the peak."""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def attach(task: Any, method: Method, seed: int, model: Any) -> Attached:
    """Put the method in; nothing else but the task's head stays trainable."""
    part, names = task.adapted(model)
    attached = method.attach(part, names, seed)
    trained = {id(p) for group in attached.groups for p in group["params"]}
    head = {id(p) for p in task.head(model)}
    for parameter in model.parameters():
        assert parameter.requires_grad or id(parameter) not in trained
        assert not parameter.requires_grad or id(parameter) in trained | head
    return attached


def optimizer_of(task: Any, model: Any, attached: Attached, rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay; the head has its own rate, or the searched one where nothing else is trained."""
    groups = [{**group, "lr": group["lr"] * rate} for group in attached.groups]
    if head := task.head(model):
        groups.append({"params": head, "lr": task.head_rate if groups else rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)


def step_of(task: Any, model: Any, attached: Attached, optimizer: torch.optim.Optimizer) -> Callable[[Any], float]:
    """One optimiser step on a batch, which gives the task's loss before it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(rows: Any) -> float:
        optimizer.zero_grad()
        loss = task.loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def adapter_bytes(attached: Attached) -> dict[str, int]:
    """Of the files: what cannot be computed again, and what the library writes by default."""
    sizes = {}
    for name, save in (("adapter_bytes", attached.save), ("adapter_bytes_by_default", attached.save_all)):
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / "adapter")
            sizes[name] = bytes_in(Path(folder) / "adapter")
    return sizes


def run(cell: Cell) -> dict[str, Any]:
    """Train and evaluate."""
    task = cell.task
    model = task.fresh(cell.seed)
    attached = attach(task, cell.method, cell.seed, model)
    untrained = not attached.groups and not task.head(model)
    losses: list[float] = []
    if not untrained:
        optimizer = optimizer_of(task, model, attached, cell.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, task.size.steps))
        step, stream = step_of(task, model, attached, optimizer), task.stream(cell.seed)
        for _ in range(task.size.steps):
            losses.append(step(next(stream)))
            if not math.isfinite(losses[-1]):
                break
            schedule.step()
    result: dict[str, Any] = {
        "task": task.name,
        "method": cell.method.name,
        "rate": cell.rate,
        "seed": cell.seed,
        "stage": cell.stage,
        "settings": task.settings(),
        "method_settings": cell.method.settings,
        "versions": versions(),
        "key": cell.key(),
        "trainable": attached.trainable,
        "losses": [round(loss, 6) if math.isfinite(loss) else None for loss in losses],
    }
    if losses and not math.isfinite(losses[-1]):
        return {**result, "diverged": True}
    part = "validation" if cell.stage == "search" else "test"
    result[part] = task.evaluate(model, part)
    if not math.isfinite(result[part]["loss"]):
        return {**result, part: None, "diverged": True}
    if cell.stage == "final" and cell.seed == 0:
        result["benchmarks"] = task.benchmarks(model)
        if attached.groups:
            result |= adapter_bytes(attached)
    return result


def versions() -> dict[str, str]:
    """Of what a result was made with."""
    import peft
    import transformers

    import osora

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "osora": osora.__version__,
    }


def stored(cell: Cell, results: Path) -> dict[str, Any] | None:
    """The result, if there is one of the same settings."""
    path = cell.path(results)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["key"] == cell.key() else None


def result_of(cell: Cell, results: Path, say: Callable[[str], None], may_start: Callable[[], bool]) -> dict[str, Any]:
    """From the disk, or made now and put there. OutOfTime if it is not there and may not be started."""
    if (found := stored(cell, results)) is not None:
        return found
    if not may_start():
        raise OutOfTime
    result = run(cell)
    write_json(cell.path(results), result)
    shown = result.get("validation") or result.get("test") or {}
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in shown.items()) or "diverged"
    say(f"{cell.task.name} {cell.method.name} {cell.stage} rate {cell.rate:.2e} seed {cell.seed}: {numbers}")
    return result


def rate_of(half_decades: int) -> float:
    """A learning rate of the grid: -4 is 1e-2, -5 is 3.16e-3."""
    return float(f"{10 ** (half_decades / 2):.2e}")


def search(task: Any, method: Method, run_one: Callable[[Cell], dict[str, Any]]) -> tuple[float, dict[float, float]]:
    """The best rate on the validation rows, with the losses of all: the grid grows while its best is at an edge."""

    def loss(place: int) -> float:
        result = run_one(Cell(task, method, rate_of(place), seed=0, stage="search"))
        return math.inf if result.get("diverged") else result["validation"]["loss"]

    start = (len(method.rates) - task.size.rates) // 2
    losses = {place: loss(place) for place in method.rates[start : start + task.size.rates]}
    for _ in range(MOST_EXTENSIONS):
        best = min(losses, key=losses.__getitem__)
        further = best - 1 if best == min(losses) else best + 1
        if further in losses:
            break
        losses[further] = loss(further)
    best = min(losses, key=losses.__getitem__)
    return rate_of(best), {rate_of(place): losses[place] for place in sorted(losses)}


def compare(task: Any, method: Method, run_one: Callable[[Cell], dict[str, Any]]) -> None:
    """All cells of one method on one task."""
    if method.name == "base" and task.head_rate == 0:  # nothing to train, nothing to search
        run_one(Cell(task, method, 0.0, 0, "final"))
        return
    rate, _ = search(task, method, run_one)
    for seed in range(task.size.seeds):
        run_one(Cell(task, method, rate, seed, "final"))
