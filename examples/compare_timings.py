# SPDX-License-Identifier: Apache-2.0
"""Times and memory of each method, apart from the results: processes one after the other, the methods taking turns.

A process loads the task's model, puts the method in, and takes a few steps of training, with all cores. The median of
the turns is what counts; their range goes into the record.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chat_data import DataError
from compare_cells import attach, optimizer_of, step_of, versions
from compare_methods import Method
from report import write_json

TURNS, WARM_UP_STEPS, STEPS = 3, 2, 8
_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _start_peak(on_card: bool) -> None:
    """Let torch count a card's peak memory from now on, or the kernel (Linux) this process's."""
    gc.collect()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    else:
        _PEAK.write_text("5", encoding="ascii")


def _peak(on_card: bool) -> int:
    """Bytes, the largest number of the card's or the largest resident set since :func:`_start_peak`."""
    if on_card:
        return torch.cuda.max_memory_allocated()
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def print_one(task: Any, method: Method) -> None:
    """One method, once, as a line of JSON on standard output."""
    on_card = task.device != "cpu"
    model = task.fresh(0, last=True)
    _start_peak(on_card)
    began = time.perf_counter()
    attached = attach(task, method, 0, model)
    if on_card:
        torch.cuda.synchronize()
    result: dict[str, Any] = {"init_seconds": time.perf_counter() - began, "init_peak_bytes": _peak(on_card)}
    if attached.groups or task.head(model):
        step, stream = step_of(task, model, attached, optimizer_of(task, model, attached, 1e-4)), task.stream(0)
        for _ in range(WARM_UP_STEPS):
            step(next(stream))
        _start_peak(on_card)
        seconds = []
        for _ in range(STEPS):
            rows = next(stream)
            began = time.perf_counter()
            step(rows)
            seconds.append(time.perf_counter() - began)
        # each step's rows have other lengths; every method has the same rows
        result |= {"step_seconds": statistics.median(seconds), "step_peak_bytes": _peak(on_card)}
    print(json.dumps({**result, "threads": torch.get_num_threads(), "versions": versions()}), flush=True)


def measure(
    chosen: dict[str, list[str]], output: Path, command: Callable[..., list[str]], say: Callable[[str], None]
) -> None:
    """Every method's turns, to OUTPUT/timings; the load of the machine before each is part of the record."""
    for task, methods in chosen.items():
        found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for turn in range(TURNS):
            for method in methods:
                load = os.getloadavg()[0]
                done = subprocess.run(
                    command("--time-one", task, method), stdout=subprocess.PIPE, text=True, check=False
                )
                if done.returncode:
                    raise DataError(f"timing {method} on {task} failed, see above")
                found[method].append({**json.loads(done.stdout.splitlines()[-1]), "load_before": load})
                say(f"{task} {method} turn {turn + 1} of {TURNS}: {found[method][-1]['init_seconds']:.2f} s to attach")
        for method, turns in found.items():
            write_json(output / "timings" / task / f"{method}.json", {"turns": turns})


def summary_of(path: Path) -> dict[str, float]:
    """Medians over the turns, and the range of the times; nothing if there is no record."""
    if not path.is_file():
        return {}
    turns = json.loads(path.read_text(encoding="utf-8"))["turns"]
    result = {}
    for name in ("init_seconds", "step_seconds", "init_peak_bytes", "step_peak_bytes"):
        if values := [turn[name] for turn in turns if name in turn]:
            result |= {name: statistics.median(values), f"{name}_least": min(values), f"{name}_most": max(values)}
    return result
