# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one adapted linear layer, forward and backward, against the same layer frozen.

The peers share the base weight; they run in turn in one process, all ranks of a case together:
  frozen     torch.nn.Linear without an adapter; its x wants a gradient, as inside a model
  osora      osora's layer
  op-by-op   the paper's formula in plain torch, which keeps an [n, d] tensor for the backward
  hand       osora's formula as an autograd.Function in plain torch
  vera, lora PEFT's layers at the same rank, adapters in the base's dtype

First every peer that computes OSoRA runs once, and its output and gradients are compared with float64. If osora's are
wrong, nothing is timed and the exit code is 1. --multi: many adapters in one batch, see multi.py.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import clock
import layers
import measure
import models
import multi
import torch
from layers import PEERS, Basis, Shape
from linear_cases import DEFAULTS, FAMILIES, MOST_REPETITIONS, PRESETS, Case, Row, Step, Truth, Turns, check
from linear_report import as_dict, pairs, plot, ratios, show, summary
from measure import Refused, Run, Timing, check_device, console, gemm_rate, interleaved
from torch import Tensor, nn


def prepare(case: Case, basis: Basis, options: argparse.Namespace) -> list[Row]:
    """The peers asked for, and osora for the check, whose row is dropped later if nobody asked for it."""
    rows = []
    for rank in case.ranks:
        ours = layers.make_osora(basis, rank, options.seed)
        for name in PEERS:
            if name == "osora" or (name in options.peers and (name != "frozen" or rank == case.ranks[0])):
                layer = layers.make(name, basis, rank, ours)
                rank_of = 0 if name == "frozen" else rank
                rows.append(Row(name, rank_of, layer, layers.floors(name, case.shape, rank)))
    return rows


def time_rows(rows: list[Row], x: Tensor, dy: Tensor, options: argparse.Namespace) -> None:
    """In turn; the check was the warm-up. Short ones are repeated until the first has run for --spend seconds."""
    steps = {f"{row.peer} {row.rank}": Step(row.layer, x, dy) for row in rows}
    first = interleaved({"first": next(iter(steps.values()))}, 1, warm_up=0)["first"].median
    count = max(options.repetitions, min(MOST_REPETITIONS, math.ceil(options.spend / first)))
    times = interleaved(steps, count, warm_up=int(first < 0.1))
    for row, (name, step) in zip(rows, steps.items(), strict=True):
        row.step, row.forward = times[name], Timing(tuple(step.forward[-count:]))
        row.backward = row.step - row.forward


def time_on_card(case: Case, rows: list[Row], inputs: list[tuple[Tensor, Tensor]], options: argparse.Namespace) -> None:
    """By events, nothing waits between forward and backward; then replays of graphs, in which the host has no part."""
    device, card = options.device, clock.card_of(options.device)
    turns = {
        f"{row.peer} {row.rank}": Turns([Step(layer, *each) for layer, each in zip(row.layers, inputs, strict=True)])
        for row in rows
    }
    sets = len(inputs)
    calls = {"step": {name: turn.both for name, turn in turns.items()}}
    calls["forward"] = {name: turn.forward for name, turn in turns.items()}
    first = interleaved({"first": next(iter(turns.values())).both}, 1, device=device, each=sets)["first"].median
    count = max(options.repetitions, min(MOST_REPETITIONS, math.ceil(options.spend / first)))
    for part, of_part in calls.items():  # a capture that fails may leave a card that captures no more: these come first
        times = interleaved(of_part, count, device=device, each=sets)
        for row, name in zip(rows, turns, strict=True):
            setattr(row, part, times[name])
    for part, of_part in calls.items():
        replays, reasons = clock.graphs(of_part, card)
        replayed = interleaved(replays, count, device=device, each=sets) if replays else {}
        for row, name in zip(rows, turns, strict=True):
            setattr(row, "graph" if part == "step" else "graph_forward", replayed.get(name))
            row.no_graph = row.no_graph or reasons.get(name)
    for row in rows:
        row.backward = row.step - row.forward


def measure_memory(rows: list[Row], x: Tensor, dy: Tensor) -> None:
    """Bytes beyond what was there before the step. Everything has run before: a library's own buffers are there."""
    device = str(x.device)
    with measure.quick_collections():
        for row in rows:
            step = Step(row.layer, x, dy)
            before = measure.memory_now(device)
            if measure.reset_peak(device):
                step()
                row.peak = max(0, measure.peak_memory(device) - before)


def inputs_of(case: Case, seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """x, which wants a gradient, and dy."""
    random = layers.draw(options.device, seed)
    where: dict[str, Any] = {"device": options.device, "dtype": models.DTYPES[case.dtype]}
    x, dy = (random(case.n, size).to(**where) for size in (case.shape.k, case.shape.d))
    return x.requires_grad_(), dy


def sets_of(case: Case, options: argparse.Namespace) -> int:
    """How many weights and inputs take turns."""
    d, k = case.shape.d, case.shape.k
    size = (d * k + case.n * (d + k)) * models.DTYPES[case.dtype].itemsize
    return clock.sets_for(clock.card_of(options.device), size)


def run_case(
    case: Case, bases: list[Basis], rate: float, options: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    """Make, check, time, measure, show. Of the bases beyond the first as many as have to take turns are used."""
    bases = bases[: sets_of(case, options)]
    inputs = [inputs_of(case, options.seed + case.n + 1000 * number, options) for number in range(len(bases))]
    x, dy = inputs[0]
    rows = prepare(case, bases[0], options)
    check(case, rows, Truth(bases[0], x, dy, options.seed), x, dy)
    rows = [row for row in rows if row.peer in options.peers]
    resident = {id(t): t for row in rows for t in (*row.layer.parameters(), *row.layer.buffers())}
    for row in rows:
        row.saved = measure.saved_bytes(lambda row=row: row.layer(x), resident.values())
    if clock.card_of(options.device) is None:
        time_rows(rows, x, dy, options)
    else:
        for basis in bases[1:]:
            more = {(row.peer, row.rank): row.layer for row in prepare(case, basis, options)}
            for row in rows:
                row.others.append(more[row.peer, row.rank])
        time_on_card(case, rows, inputs, options)
    if options.memory:
        measure_memory(rows, x, dy)
    show(case, rows, rate)
    return rows, {**as_dict(case, rows, rate), "sets": len(bases)}


# -- a run -------------------------------------------------------------------------------------------------------------


def run_all(cases: list[Case], options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """A base weight is made once for all that use it."""
    size = 512 if options.preset == "quick" else 4096
    rates, results, multi_results = {}, [], []
    drawn: list[tuple[Case, list[Row]]] = []
    for dtype in options.dtypes:
        rates[dtype] = {"size": size, "before": gemm_rate(size, models.DTYPES[dtype], options.device)}
        console.print(f"A product of {size}×{size} matrices in {dtype} runs at {rates[dtype]['before']:.0f} GFLOP/s.")
        here = [case for case in cases if case.dtype == dtype]
        for shape in dict.fromkeys(case.shape for case in here):
            same = [case for case in here if case.shape == shape]
            widest = max(rank for case in same for rank in case.ranks)
            bases = [
                layers.make_basis(shape, widest, models.DTYPES[dtype], options.device, options.seed + 1000 * number)
                for number in range(max(sets_of(case, options) for case in same))
            ]
            for case in same:
                rows, result = run_case(case, bases, rates[dtype]["before"], options)
                results.append(result)
                run.case(result)
                for row in rows:
                    row.layer, row.others = nn.Identity(), []  # times alone are needed from here on
                drawn.append((case, rows))
        if options.multi:
            multi_results += multi.run(dtype, options, run.case)
        rates[dtype]["after"] = gemm_rate(size, models.DTYPES[dtype], options.device)
    summary(drawn)
    worst = [ratios(ours, frozen)[0] / ours.floors[1] for ours, frozen in pairs(drawn)]
    if worst:
        console.print(f"osora / frozen over its floor: {median(worst):.3f} in the middle, {max(worst):.3f} at most.")
    if options.plot:
        where = f"{options.device}, CPU threads: {options.threads}"
        plot(options.plot, drawn, where)
    return {"gemm_gflops": rates, "results": results, "multi": multi_results}


# -- arguments ---------------------------------------------------------------------------------------------------------


def shapes_of(families: Sequence[str], options: argparse.Namespace) -> list[Shape]:
    if options.shapes:
        return [Shape("given", d, k, options.bias) for d, k in options.shapes]
    chosen = options.models or families
    return [Shape(name, d, k, name == "gpt2" or options.bias) for name in chosen for d, k in FAMILIES[name]]


def cases_of(options: argparse.Namespace, error: Callable[[str], Any]) -> list[Case]:
    """The preset's groups with what was given in their place. A rank that a shape has not is refused, or left out
    where it is the preset's.
    """
    found: dict[tuple[Shape, int, str], tuple[int, ...]] = {}
    for families, numbers, ranks in PRESETS[options.preset]["groups"]:
        for shape in shapes_of(families, options):
            most = min(shape.d, shape.k)
            if options.ranks and max(options.ranks) > most:
                error(f"--ranks: a {shape.d}x{shape.k} layer has ranks 1 .. {most}, got {max(options.ranks)}")
            fitting = tuple(sorted(set(options.ranks or [rank for rank in ranks if rank <= most])))
            for n in options.rows or numbers:
                for dtype in options.dtypes:
                    key = (shape, n, dtype)
                    found[key] = tuple(sorted({*found.get(key, ()), *fitting}))
    return [Case(shape, n, dtype, ranks) for (shape, n, dtype), ranks in found.items()]


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="goals", help="what the options below do not say (default: goals)")
    add("--models", nargs="+", choices=list(FAMILIES), help="whose shapes")
    add("--shapes", nargs="+", type=measure.shape_of, help="such as 4096x4096: out_features x in_features")
    add("--bias", action="store_true", help="layers with a bias (gpt2 has one anyway)")
    add("--rows", nargs="+", type=int, help="numbers of rows of x (tokens)")
    add("--ranks", nargs="+", type=int)
    add("--dtypes", nargs="+", choices=list(models.DTYPES), help="default: float32, bfloat16; float16 too on a GPU")
    add("--peers", nargs="+", choices=PEERS)
    add("--repetitions", type=int, help="at least (default: 5)")
    add("--spend", type=float, help=f"seconds of a peer; short ones run more often, at most {MOST_REPETITIONS} times")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0)
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    add("--multi", action=argparse.BooleanOptionalAction, default=True, help="many adapters in one batch as well")
    add("--multi-shapes", nargs="+", type=measure.shape_of, help="of many adapters (default: 2048x2048, 4096x4096)")
    add("--plot", type=Path, metavar="FILE", help="draw times over the frozen layer's, FILE.png or FILE.svg")
    add("--output", type=Path, help="folder for the JSON (default: bench/results)")
    options = parser.parse_args(argv)
    for name, value in (DEFAULTS | PRESETS[options.preset]).items():
        if name != "groups" and getattr(options, name, None) is None:
            setattr(options, name, value)
    if not options.dtypes:
        options.dtypes = ["float32", "bfloat16", *(["float16"] if options.device.startswith("cuda") else [])]
    for name in ("repetitions", "threads", "ranks", "rows"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} must be at least 1, got {given}")
    if not 0 <= options.spend < math.inf:
        parser.error(f"--spend must be seconds, 0 or more, got {options.spend}")
    if options.models and options.shapes:
        parser.error("--models and --shapes: give one of them")
    if options.plot and options.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot: the file's name must end in .png or .svg, got {options.plot.name}")
    return options, cases_of(options, parser.error)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    options, cases = parse(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        check_device(options.device)
        if options.plot and not measure.installed("matplotlib"):
            raise Refused("--plot needs matplotlib: pip install 'osora[test]'")
        left_out = ("output", "plot", "models", "shapes", "ranks", "rows")
        settings = {name: value for name, value in vars(options).items() if name not in left_out}
        run = Run("linear", options.device, settings)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)  # PEFT and the products draw from torch's own
            run.finish(run_all(cases, options, run), options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
