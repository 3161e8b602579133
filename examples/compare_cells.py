# SPDX-License-Identifier: Apache-2.0
"""One run of a method on a task: training, evaluation, and what is kept of both. Which runs there are: compare_plan."""

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

WARM_UP = 0.1  # share of the steps
CLIP = 1.0


@dataclass(frozen=True)
class Cell:
    """A method on a task at a rate and a seed; for the "search" (validation rows) or "final" (test rows)."""

    task: Any
    method: Method
    rate: float
    seed: int
    stage: str

    def which(self) -> tuple[Any, ...]:
        """What tells it from all others, as compare_store.WHICH has it."""
        return self.task.name, self.method.name, self.stage, self.rate, self.seed, self.key()

    def __str__(self) -> str:
        return f"{self.task.name} {self.method.name} {self.stage} rate {self.rate:.2e} seed {self.seed}"

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


def parts_of(cell: Cell) -> tuple[str, ...]:
    """The rows that a run is evaluated on."""
    if cell.stage == "final":
        return ("test",)
    return ("validation", "test") if cell.task.size.both else ("validation",)


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
    for part in parts_of(cell):
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


def shown(result: dict[str, Any]) -> str:
    """What came out, in a line."""
    if result.get("diverged"):
        return "diverged"
    parts = [(part, result[part]) for part in ("validation", "test") if part in result]
    return ", ".join(f"{part} {name} {value:.4f}" for part, found in parts for name, value in found.items())
