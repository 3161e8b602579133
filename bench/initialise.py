# SPDX-License-Identifier: Apache-2.0
"""A basis from a checkpoint on disk (osora.initialise), in the shapes of Llama-3-8B.

First the basis is made and checked: every layer against its weight in float64, its singular values
against those that the checkpoint was made of, every number against what osora.attach has on the loaded model, bit for
bit. If something is wrong no time is shown and the exit code is 1.

Then, each in a process of its own, which is told to begin when it has imported everything, in turn:
  initialise       osora.initialise, --threads of them; the checkpoint is dropped from the system's memory before
  attach           osora.attach on the loaded model, as many threads
  one, two         osora.initialise in one process of one thread; in two of them on one folder
  pissa_niter_16   PEFT's get_peft_model on the loaded model, with its finding and wrapping of layers
  reuse            osora.attach(basis=) on the loaded model
  read             the checkpoint's bytes from the disk, and nothing else
From these rates the time of larger models is projected, each assumption beside it (initialise_project.py).

The checkpoint (2.2 GB at the default 5 blocks) stays in --folder, for the next time. --quick: a tiny one, no figures.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import initialise_project
import initialise_work
import torch
from initialise_checkpoint import HIDDEN, Recipe, checkpoint
from initialise_work import Task
from measure import (
    BENCH,
    Refused,
    Run,
    Timing,
    console,
    quick_collections,
    show_bytes,
    show_ratio,
    show_seconds,
    table,
)

FOLDER = BENCH.parent / "build" / "bench"
RATIOS = {
    "initialise / attach": ("initialise", "attach"),
    "initialise / pissa_niter_16": ("initialise", "pissa_niter_16"),
    "two / one": ("two", "one"),
    "reuse / attach": ("reuse", "attach"),
}
Found = dict[str, list[list[dict[str, Any]]]]  # peer -> repetition -> process


@dataclass(frozen=True)
class Goal:
    """A number that should be no larger than `bound`, or no smaller where `least`."""

    about: str
    bound: float
    unit: str
    of: Callable[[dict[str, Any]], float]
    least: bool = False


def _ratio(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["ratios"][name]["median"]


GOALS = (
    Goal("initialise over attach on the loaded model", 1.05, "x", _ratio("initialise / attach")),
    Goal("two single-threaded processes over one", 0.55, "x", _ratio("two / one")),
    Goal("attach(basis=) over attach", 0.15, "x", _ratio("reuse / attach")),
    Goal("share of reading and writing that is hidden", 0.9, "", lambda r: r["pipeline"]["hidden"], least=True),
    Goal("anonymous memory at its peak", 1.2, "GB", lambda r: r["memory"]["peak_bytes"] / 1e9),
)


def judged(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured."""
    found = []
    for goal in GOALS:
        value = goal.of(results)
        met = value >= goal.bound if goal.least else value <= goal.bound
        sort = "at_least" if goal.least else "at_most"
        found.append({"goal": goal.about, sort: goal.bound, "unit": goal.unit, "measured": value, "met": met})
    return found


def verdict(facts: dict[str, Any]) -> str:
    """One line for reading."""
    sort = "at_least" if "at_least" in facts else "at_most"
    wanted = f"{sort.replace('_', ' ')} {facts[sort]:g} {facts['unit']}".rstrip()
    value = f"{facts['measured']:.3g} {facts['unit']}".rstrip()
    return f"{facts['goal']}: {wanted}: {value}: {'met' if facts['met'] else 'NOT MET'}"


# -- measuring ---------------------------------------------------------------------------------------------------------


def peers(task: Task) -> dict[str, list[Task]]:
    """What runs in turn: the processes of each."""
    one = replace(task, threads=1)
    loaded = {name: [replace(task, kind=name, basis="", cold=False)] for name in ("attach", "pissa_niter_16")}
    return {
        "initialise": [task],
        "attach": loaded["attach"],
        "one": [one],
        "two": [replace(one, part="1/2"), replace(one, part="2/2")],
        "pissa_niter_16": loaded["pissa_niter_16"],
        "reuse": [replace(task, kind="reuse", cold=False)],
        "read": [replace(task, kind="read", basis="")],
    }


def measure(task: Task, repetitions: int, folder: Path, tell: Callable[[str], None]) -> Found:
    """The peers in turn; the order rotates. ``task.basis`` is the basis that was checked; others go into ``folder``."""
    found: Found = {name: [] for name in peers(task)}
    names = list(found)
    with quick_collections():
        for repetition in range(repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                tell(f"repetition {repetition + 1} of {repetitions}: {name}")
                tasks, out = peers(task)[name], folder / "out"
                if tasks[0].kind == "initialise":
                    tasks = [replace(each, basis=str(out)) for each in tasks]
                found[name].append(initialise_work.together(tasks))
                shutil.rmtree(out, ignore_errors=True)
    return found


def timing_of(runs: list[list[dict[str, Any]]]) -> Timing:
    """From the first process's beginning to the last one's end."""
    spans = ((min(each["began"] for each in run), max(each["ended"] for each in run)) for run in runs)
    return Timing(tuple(ended - began for began, ended in spans))


def check_same(found: Found, checked: str) -> None:
    """Refused where a run made another basis than the one that was checked, or than another run of its threads."""
    for names, wanted in ((("initialise",), {checked}), (("one", "two"), set())):
        made = wanted | {each["fingerprint"] for name in names for run in found[name] for each in run}
        if len(made) > 1:
            raise Refused(f"{' and '.join(names)}: not every run made the same basis")


def evaluate(found: Found, facts: dict[str, Any], plan: Any, rank: int, threads: int) -> dict[str, Any]:
    """Times, ratios, the pipeline, memory, projections."""
    times = {name: timing_of(runs) for name, runs in found.items()}
    alone = [run[0] for run in found["initialise"]]
    kinds = ("reading", "computing", "writing", "whole", "hidden")
    pipeline = {kind: median(each["times"][kind] for each in alone) for kind in kinds}
    rates = initialise_project.Rates(
        threads,
        pipeline["computing"] / plan.flops,
        pipeline["reading"] / plan.bytes_read,
        median(run[0]["bytes"] for run in found["read"]) / times["read"].median,
    )
    return {
        "checked": facts,
        "seconds": {name: timing.as_dict() for name, timing in times.items()},
        "cpu_seconds": {
            name: median(sum(each["cpu_seconds"] for each in r) for r in runs) for name, runs in found.items()
        },
        "ratios": {
            name: dict(zip(("median", "min", "max"), times[a].ratio(times[b]), strict=True))
            for name, (a, b) in RATIOS.items()
        },
        "pipeline": pipeline,
        "memory": {
            "peak_bytes": max(each["anonymous_peak"] for each in alone),
            "after_imports_bytes": max(each["anonymous_before"] for each in alone),
            "of_each_of_two_bytes": max(each["anonymous_peak"] for run in found["two"] for each in run),
            "planned_bytes": plan.memory,
        },
        "plan": {"operations": plan.flops, "bytes_read": plan.bytes_read, "bytes_written": plan.bytes_written},
        "rates": asdict(rates),
        "assumptions": initialise_project.assumptions(rates),
        "projections": initialise_project.projections(rank, rates),
        "_times": times,
    }


def show(results: dict[str, Any], quick: bool) -> None:
    """Tables, goals, projections; takes the timings out of the results."""
    times, ratios = results.pop("_times"), results["ratios"]
    rows = []
    for name, timing in times.items():
        over = [f"{key}: {show_ratio(tuple(ratios[key].values()))}" for key, (a, _) in RATIOS.items() if a == name]
        rows.append([name, show_seconds(timing), f"{results['cpu_seconds'][name]:.3g} s", "\n".join(over)])
    table("A basis from disk", ("peer", "time (min-max)", "of all cores", "ratio (min-max)"), rows)
    pipeline, memory = results["pipeline"], results["memory"]
    parts = ", ".join(f"{kind} {pipeline[kind]:.3g} s" for kind in ("reading", "computing", "writing", "whole"))
    console.print(f"initialise: {parts}; hidden {100 * pipeline['hidden']:.1f} % of reading and writing")
    console.print(
        f"  anonymous memory {show_bytes(memory['peak_bytes'])} at its peak, of which "
        f"{show_bytes(memory['after_imports_bytes'])} after the imports; planned beside these "
        f"{show_bytes(memory['planned_bytes'])}; the disk alone {show_bytes(results['rates']['disk'])} a second"
    )
    if quick:
        console.print("--quick: no figures, and no goals")
        return
    for facts in results["goals"]:
        console.print(verdict(facts))
    table("Larger models, PROJECTED", initialise_project.COLUMNS, initialise_project.rows(results["projections"]))
    console.print("The projections assume that\n- " + ";\n- ".join(results["assumptions"]))


# -- the whole ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Make, check, measure, show, write."""
    recipe = Recipe(options.blocks, options.scale, options.seed)
    asked = ("blocks", "scale", "rank", "tol", "repetitions", "seed", "quick")
    this = Run("initialise", "cpu", {name: getattr(options, name) for name in asked})
    with console.status("making the checkpoint") as status:
        made = checkpoint(options.folder, recipe)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            status.update("the basis is made and checked")
            words = (str(made.folder), options.rank, options.tol, options.seed, options.threads)
            task = Task("initialise", *words, basis=str(Path(folder) / "basis"))
            facts, wrong = initialise_work.check(made, task)
            if wrong:
                raise Refused("the basis is wrong, so that nothing is timed:\n" + "\n".join(wrong[:10]))
            console.print(
                f"{facts['layers']} layers, {show_bytes(made.bytes)}: all are right (residual "
                f"{facts['worst_residual']:.1e} with what rounding adds), and what osora.attach has, bit for bit"
            )
            found = measure(task, options.repetitions, Path(folder), status.update)
            plan = initialise_work.plan(task)
    check_same(found, facts["fingerprint"])
    results = evaluate(found, facts | {"checkpoint_bytes": made.bytes}, plan, options.rank, options.threads)
    results["goals"] = [] if options.quick else judged(results)
    show(results, options.quick)
    this.finish({"results": results}, options.output)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--blocks", type=int, default=5, help="of the model; 436 MB each")
    add("--scale", type=int, default=1, help="what the widths are divided by")
    add("--rank", type=int, default=64)
    add("--tol", type=float, default=1e-3)
    add("--repetitions", type=int, default=3)
    add("--threads", type=int, default=2, help="of initialise, attach, pissa_niter_16 and reuse")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, default=FOLDER, help="for the checkpoint, which stays (default: build/bench)")
    add("--output", type=Path, help="folder for the JSON (default: bench/results)")
    add("--quick", action="store_true", help="two blocks at a 64th of the widths, rank 8, once: no figures")
    options = parser.parse_args(argv)
    if options.quick:
        options.blocks, options.scale, options.rank, options.repetitions = 2, 64, 8, 1
    for name in ("blocks", "scale", "rank", "repetitions", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    least = HIDDEN // 4 // options.scale
    if options.rank > least:
        parser.error(f"--rank: at --scale {options.scale} the smallest layer has {least} rows")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        run(options)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
