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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import layers
import measure
import models
import multi
import torch
from layers import ABOUT, OSORA, PEERS, Basis, Shape
from measure import Refused, Run, Timing, check_device, console, gemm_rate, interleaved, show_bytes, show_seconds
from torch import Tensor, nn

FAMILIES = {
    "llama3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "gpt2": [(768, 768), (2304, 768), (3072, 768), (768, 3072)],  # with biases
    "square": [(2048, 2048)],
    "tiny": [(96, 64), (64, 96)],
}
ALL = ("llama3-8b", "smollm2", "gpt2", "square")
PRESETS: dict[str, dict[str, Any]] = {
    # to see that it works: no figures
    "quick": {
        "groups": [(("tiny",), (1, 24), (4, 8))],
        "repetitions": 1,
        "spend": 0.0,
        "multi_shapes": [(96, 64)],
        "multi_ranks": [4],
    },
    # what the project promises: shapes of every model at the numbers of rows of a training step
    "goals": {
        "groups": [(ALL, (512,), (8, 64, 256)), (ALL, (2048,), (64,))],
        "peers": ["frozen", "op-by-op", "vera", "lora", "osora"],
        "repetitions": 3,
        "spend": 0.4,
    },
    "full": {"groups": [(ALL, (1, 8, 128, 512, 2048), (8, 64, 256))]},
}
DEFAULTS: dict[str, Any] = {"peers": list(PEERS), "repetitions": 5, "spend": 1.0}
DEFAULTS |= {"multi_shapes": [(2048, 2048), (4096, 4096)], "multi_ranks": [64]}
MOST_REPETITIONS = 25

# Largest relative error: of a row of y or dx over the size of a row, of ds and of do as a whole. float32: sums of up to
# 14336 terms. 16 bits: x, W, U and V are exact, but h, D and the result are rounded once each, and a row is judged by
# 16 numbers. Plain torch rounds more often, to 16 bits, and may be off by five times as much before this is called
# a mistake of the benchmark.
TOLERANCE = {"float32": 3e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
OF_PLAIN_TORCH = 5
NAMES = ("y", "dx", "do", "ds")
DIRECTIONS = 16


@dataclass(frozen=True)
class Case:
    """What one table is about."""

    shape: Shape
    n: int
    dtype: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape.family}, {self.shape}, n = {self.n}, {self.dtype}"


@dataclass
class Row:
    """One peer at one rank (0: none)."""

    peer: str
    rank: int
    layer: nn.Module
    floors: tuple[float, float]
    saved: int = 0
    peak: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    forward: Timing = field(default_factory=lambda: Timing(()))
    backward: Timing = field(default_factory=lambda: Timing(()))
    step: Timing = field(default_factory=lambda: Timing(()))


class Step:
    """Forward and backward of a layer as a function without arguments. Notes when the forward was done."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self.wanted = [x, *layers.trained(layer)]
        self.forward: list[float] = []

    def __call__(self) -> tuple[Tensor, ...]:
        """y and the gradients of x and of what is trained. As in a model, nobody adds them to others."""
        began = perf_counter()
        y = self.layer(self.x)
        measure.synchronise(str(self.x.device))
        self.forward.append(perf_counter() - began)
        return (y, *torch.autograd.grad(y, self.wanted, self.dy))


# -- correctness -----------------------------------------------------------------------------------------------------


class Truth:
    """OSoRA in float64. y and dx are compared row by row through 16 random directions: n (k + d) numbers, not n k d.

    For directions of ±1 the mean square of an error's projections is that of the error.
    """

    def __init__(self, basis: Basis, x: Tensor, dy: Tensor, seed: int) -> None:
        self.x, self.dy = x.detach().double(), dy.double()
        weight = basis.linear.weight.double()
        generator = torch.Generator().manual_seed(seed)

        def signs(size: int) -> Tensor:
            return (torch.randint(2, (size, DIRECTIONS), generator=generator) * 2.0 - 1).to(x.device, torch.float64)

        self.of_y, self.of_dx = signs(weight.shape[0]), signs(weight.shape[1])
        self.y, self.dx = self.x @ (weight.t() @ self.of_y), self.dy @ (weight @ self.of_dx)
        if basis.linear.bias is not None:
            self.y += basis.linear.bias.double() @ self.of_y

    def errors(self, layer: nn.Module, found: tuple[Tensor, ...]) -> dict[str, float]:
        """Of y, dx, do and ds, as a peer with the numbers of osora's `layer` gave them."""
        U, V, S0, s, o = (getattr(layer, name).detach().double() for name in ("U", "V", "S0", "s", "o"))
        h, D = self.x @ V, U * (o[:, None] * (S0 + s) + s)
        UP = U * (self.dy.t() @ h)
        y, dx, do, ds = (tensor.detach().double() for tensor in found)
        rows = ((y @ self.of_y, self.y + h @ (D.t() @ self.of_y)),)
        rows += ((dx @ self.of_dx, self.dx + (self.dy @ D) @ (V.t() @ self.of_dx)),)
        whole = ((do, (UP * (S0 + s)).sum(1)), (ds, ((1 + o)[:, None] * UP).sum(0)))
        errors = [(got - true).norm(dim=1).max() / true.norm() * math.sqrt(len(true)) for got, true in rows]
        errors += [(got - true).norm() / true.norm() for got, true in whole]
        return {name: float(error) for name, error in zip(NAMES, errors, strict=True)}


def check(case: Case, rows: list[Row], truth: Truth, x: Tensor, dy: Tensor) -> None:
    """Run every peer once; Refused if one that computes OSoRA is wrong, osora itself first of all."""
    ours = {row.rank: row.layer for row in rows if row.peer == "osora"}
    for row in sorted(rows, key=lambda row: row.peer != "osora"):
        found = Step(row.layer, x, dy)()
        if row.peer not in OSORA:
            continue
        row.errors = truth.errors(ours[row.rank], found)
        limit = TOLERANCE[case.dtype] * (1 if row.peer == "osora" else OF_PLAIN_TORCH)
        for name, error in row.errors.items():
            if not error <= limit:  # NaN too
                who = "osora's" if row.peer == "osora" else f"this benchmark's own peer ({ABOUT[row.peer]}):"
                raise Refused(
                    f"{case}, r = {row.rank}: {who} {name} is off by {error:.1e}, relative "
                    f"(limit {limit:.1e}): nothing is timed"
                )


# -- time and memory -------------------------------------------------------------------------------------------------


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
    device = str(x.device)
    first = interleaved({"first": next(iter(steps.values()))}, 1, warm_up=0, device=device)["first"].median
    count = max(options.repetitions, min(MOST_REPETITIONS, math.ceil(options.spend / first)))
    times = interleaved(steps, count, warm_up=int(first < 0.1), device=device)
    for row, (name, step) in zip(rows, steps.items(), strict=True):
        row.step, row.forward = times[name], Timing(tuple(step.forward[-count:]))
        row.backward = Timing(tuple(a - b for a, b in zip(row.step.seconds, row.forward.seconds, strict=True)))


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


def run_case(case: Case, basis: Basis, rate: float, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Make, check, time, measure, show."""
    generator = torch.Generator().manual_seed(options.seed + case.n)
    where: dict[str, Any] = {"device": options.device, "dtype": models.DTYPES[case.dtype]}
    x, dy = (torch.randn(case.n, size, generator=generator).to(**where) for size in (case.shape.k, case.shape.d))
    x.requires_grad_()
    rows = prepare(case, basis, options)
    check(case, rows, Truth(basis, x, dy, options.seed), x, dy)
    rows = [row for row in rows if row.peer in options.peers]
    resident = {id(t): t for row in rows for t in (*row.layer.parameters(), *row.layer.buffers())}
    for row in rows:
        row.saved = measure.saved_bytes(lambda row=row: row.layer(x), resident.values())
    time_rows(rows, x, dy, options)
    if options.memory:
        measure_memory(rows, x, dy)
    show(case, rows, rate)
    return rows, as_dict(case, rows, rate)


# -- showing ---------------------------------------------------------------------------------------------------------


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
        if row.rank in ours and row.peer != "osora":
            facts["osora_over_this"] = dict(zip(names, ratios(ours[row.rank], row), strict=True))
        found.append(facts)
    return {**asdict(case), "repetitions": len(rows[0].step.seconds), "peers": found}


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


# -- a run -----------------------------------------------------------------------------------------------------------


def run_all(cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
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
            basis = layers.make_basis(shape, widest, models.DTYPES[dtype], options.device, options.seed)
            for case in same:
                rows, result = run_case(case, basis, rates[dtype]["before"], options)
                results.append(result)
                for row in rows:
                    row.layer = nn.Identity()  # times alone are needed from here on
                drawn.append((case, rows))
        if options.multi:
            multi_results += multi.run(dtype, options)
        rates[dtype]["after"] = gemm_rate(size, models.DTYPES[dtype], options.device)
    summary(drawn)
    worst = [ratios(ours, frozen)[0] / ours.floors[1] for ours, frozen in pairs(drawn)]
    if worst:
        console.print(f"osora / frozen over its floor: {median(worst):.3f} in the middle, {max(worst):.3f} at most.")
    if options.plot:
        where = f"{options.device}, CPU threads: {options.threads}"
        plot(options.plot, drawn, where)
    return {"gemm_gflops": rates, "results": results, "multi": multi_results}


def pairs(drawn: list[tuple[Case, list[Row]]]) -> Iterator[tuple[Row, Row]]:
    """Each row of osora's, and the frozen one beside it."""
    for _, rows in drawn:
        frozen = frozen_of(rows)
        yield from ((row, frozen) for row in rows if row.peer == "osora" and frozen)


# -- arguments -------------------------------------------------------------------------------------------------------


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
            run.finish(run_all(cases, options), options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
