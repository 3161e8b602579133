# SPDX-License-Identifier: Apache-2.0
"""The 224 linears of Llama-2-7B on a card: their decomposition, a block's training step, a token's decoding.

  python bench/llama.py [attach] [block] [decode] [--device cuda|cpu]

attach   osora.attach on all of them, resident in bfloat16, in its own batches; and torch.svd_lowrank(niter=16), which
         PEFT takes, one by one on a few of them, scaled to all and said to be
block    the seven linears of a block, forward and backward: frozen, osora, PEFT LoRA
decode   one row through all of them: frozen, osora; queued by the host, and as a graph

The matrices are those of spectra.py, eight of each shape; the others are these with their rows turned, which leaves the
singular values as they are. Before any time: every residual against float64, the singular values of one matrix of each
shape against a float64 SVD, and the layers' outputs and gradients. Exit code 1, and no time, where one is wrong.
--scale divides the widths: a rehearsal on a CPU takes 64.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import clock
import init
import layers
import measure
import models
import spectra
import torch
from layers import Basis, Shape
from linear_cases import Case, Row, Step, Truth, Turns, check
from measure import Refused, Run, Timing, check_device, console, interleaved, show_bytes, show_ratio, show_seconds
from torch import Tensor, nn

import osora
from osora.layers.base_weight import oriented_weight
from osora.model.decompose import batches, decompose_targets
from osora.model.targets import find_targets

HIDDEN, WIDE, BLOCKS = 4096, 11008, 32
LINEARS = {name: (HIDDEN, HIDDEN, "query") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
LINEARS |= {"gate_proj": (WIDE, HIDDEN, "gate"), "up_proj": (WIDE, HIDDEN, "gate"), "down_proj": (HIDDEN, WIDE, "down")}
KNOWN, TURN = 8, 37  # matrices of a shape that are made; rows by which the others are turned
LOWRANK = (4, 2, 2)  # matrices of each shape that svd_lowrank is timed on
PARTS = ("attach", "block", "decode")

Tell = Callable[[str, dict[str, Any]], None]  # what a part has found, as soon as it has


@dataclass
class Model:
    """All linears by name, and for each which of the matrices that were made it is."""

    module: nn.Module
    origin: dict[str, int]


def sizes_of(options: argparse.Namespace) -> dict[str, tuple[int, int, str]]:
    return {name: (d // options.scale, k // options.scale, kind) for name, (d, k, kind) in LINEARS.items()}


def make_model(options: argparse.Namespace) -> Model:
    """Every weight is its own memory, as in a model."""
    dtype, source = models.DTYPES[options.dtype], spectra.Source("stored")
    made: dict[tuple[int, int], list[Tensor]] = {}
    for d, k, kind in sizes_of(options).values():
        if (d, k) not in made:
            made[d, k] = [
                spectra.make(kind, d, k, 1, options.rank, torch.float32, options.device, seed, source)
                .weight[0]
                .to(dtype)
                for seed in range(min(KNOWN, options.blocks))
            ]
    module, origin = nn.ModuleList(), {}
    count: dict[tuple[int, int], int] = {}
    for number in range(options.blocks):
        block = nn.ModuleDict()
        for name, (d, k, _) in sizes_of(options).items():
            place = count[d, k] = count.get((d, k), -1) + 1
            turn, which = divmod(place, len(made[d, k]))
            linear = nn.utils.skip_init(nn.Linear, k, d, bias=False, device="meta", dtype=dtype)
            linear.weight = nn.Parameter(made[d, k][which].roll(TURN * turn, 0), requires_grad=False)
            block[name], origin[f"{number}.{name}"] = linear, which
        module.append(block)
    return Model(module, origin)


# -- attach ------------------------------------------------------------------------------------------------------------


def check_factors(model: Model, config: osora.OsoraConfig) -> dict[str, Any]:
    """What attach's decompositions are worth, in float64; Refused if they say more than is true."""
    targets = find_targets(model.module, config)
    true: dict[tuple[int, ...], Tensor] = {}
    worst = sigma = 0.0
    passes, unconverged, wrong = [], 0, []
    sizes = [[*batch[0].weight.shape, len(batch)] for batch in batches(targets)]
    found = decompose_targets(targets, config, max_memory=None, unconverged="warn", progress=False)
    for target, factors in found:
        W = oriented_weight(target.module).detach().double()
        U, S, V = (part.double() for part in (factors.U, factors.S, factors.V))
        if model.origin[target.name] == 0:
            shape = tuple(W.shape)
            if shape not in true:
                true[shape] = spectra.by_float64(W, len(S)).S
            sigma = max(sigma, float(((S - true[shape]).abs() / true[shape]).max()))
        left, right = init.true_residuals(W, U, S, V)
        here = torch.maximum(left, right)
        errors = init.Errors(residual=float(here.max()))
        wrong += init.complaints(target.name, errors, left, factors, config.tol)
        worst, unconverged = max(worst, errors.residual), unconverged + (not factors.converged)
        passes.append(factors.passes)
    limit = max(init.SIGMA_TOLERANCE, 100 * config.tol**2)
    if not sigma <= limit:
        wrong.append(f"a singular value is off by {sigma:.1e}, relative (limit {limit:.1e})")
    if wrong:
        raise Refused("osora's answers are wrong, so they are not timed:\n" + "\n".join(wrong[:10]))
    facts = {"worst_residual": worst, "sigma_error": sigma, "unconverged": unconverged}
    return {**facts, "passes": [min(passes), max(passes)], "batches": sizes}


def attach(options: argparse.Namespace, tell: Tell) -> None:
    """Check, time, compare."""
    model = make_model(options)
    count, card = len(model.origin), clock.card_of(options.device)
    config = osora.OsoraConfig(r=options.rank, tol=options.tol, seed=options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what has not converged is counted
        facts = check_factors(model, config)
        seconds, peak = [], None
        for _ in range(options.repetitions):
            before = measure.memory_now(options.device)
            reset = measure.reset_peak(options.device)
            seconds.append(clock.seconds_of(lambda: osora.attach(model.module, config, progress=False), card))
            peak = measure.peak_memory(options.device) - before if reset else None
            osora.detach(model.module)
    timing = Timing(tuple(seconds))
    facts |= {"matrices": count, "seconds": timing.as_dict(), "peak_bytes": peak}
    console.print(f"attach: {count} linears, r = {options.rank}, tol {options.tol:g}: {show_seconds(timing)}")
    console.print(f"  worst residual in float64 {facts['worst_residual']:.1e}, {facts['unconverged']} not converged,")
    shown = "not measured" if peak is None else show_bytes(peak)
    console.print(f"  passes {facts['passes']}, memory beyond the model {shown}, batches {facts['batches']}")
    tell("attach", facts)
    tell("lowrank", lowrank(model, options, card))


def lowrank(model: Model, options: argparse.Namespace, card: clock.Card | None) -> dict[str, Any]:
    """What PEFT's pissa_niter_16 does for a layer, on a few of them."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for linear in model.module.modules():
        if isinstance(linear, nn.Linear):
            by_shape.setdefault(tuple(linear.weight.shape), []).append(linear.weight.detach())
    total, measured = 0.0, 0
    for wanted, weights in zip(LOWRANK, by_shape.values(), strict=True):
        some = weights[:wanted]

        def call(weight: Tensor = some[0]) -> Any:
            return torch.svd_lowrank(weight.float(), q=options.rank, niter=16)

        call()
        total += len(weights) * median(clock.seconds_of(lambda w=w, call=call: call(w), card) for w in some)
        measured += len(some)
    count = len(model.origin)
    console.print(f"  svd_lowrank(niter=16), one by one: {total:.3g} s (measured on {measured} of {count}, scaled)")
    return {"seconds": total, "measured": measured, "of": count}


# -- layers ------------------------------------------------------------------------------------------------------------


def made_layers(
    names: tuple[str, ...], number: int, n: int, options: argparse.Namespace, checked: bool
) -> list[tuple[dict[str, nn.Module], Tensor, Tensor]]:
    """The peers of each linear of a block, with x and dy."""
    found = []
    for place, (d, k, _) in enumerate(sizes_of(options).values()):
        shape = Shape("llama2-7b", d, k, False)
        seed = options.seed + 1000 * number + place
        basis: Basis = layers.make_basis(shape, options.rank, models.DTYPES[options.dtype], options.device, seed)
        ours = layers.make_osora(basis, options.rank, seed)
        peers = {name: layers.make(name, basis, options.rank, ours) for name in names}
        random = layers.draw(options.device, seed + 500)
        x, dy = (random(n, size).to(basis.linear.weight.dtype) for size in (k, d))
        x.requires_grad_()
        if checked:
            case = Case(shape, n, options.dtype, (options.rank,))
            rows = [Row("osora", options.rank, ours, layers.floors("osora", shape, options.rank))]
            check(case, rows, Truth(basis, x, dy, seed), x, dy)
        found.append((peers, x, dy))
    return found


def compare(
    title: str, calls: dict[str, Callable[[], Any]], options: argparse.Namespace, floor: float | None = None
) -> dict[str, Any]:
    """In turn; on a card as replays of graphs too."""
    card = clock.card_of(options.device)
    times = interleaved(calls, options.repetitions, device=options.device)
    replays, reasons = clock.graphs(calls, card) if card else ({}, {})
    graphs = interleaved(replays, options.repetitions, device=options.device) if replays else {}
    facts: dict[str, Any] = {"no_graph": reasons, "floor": floor, "peers": {}}
    console.print(title + ("" if floor is None else f" (by arithmetic alone {floor:.3f} over frozen)"))
    for kind, found in (("queued", times), ("graph", graphs)):
        for name, timing in found.items():
            about = facts["peers"].setdefault(name, {})
            about[kind] = timing.as_dict()
            line = f"  {name}, {kind}: {show_seconds(timing)}"
            for other in ("frozen", "lora"):
                if other in found and name != other and (name, other) != ("frozen", "lora"):
                    over = timing.ratio(found[other])
                    about[f"{kind}_over_{other}"] = dict(zip(("median", "min", "max"), over, strict=True))
                    line += f", over {other} {show_ratio(over)}"
            console.print(line)
    return facts


def block(options: argparse.Namespace, tell: Tell) -> None:
    """Forward and backward of seven linears, each with an input of its own, and nothing between them."""
    names = ("frozen", "osora", "lora") if measure.installed("peft") else ("frozen", "osora")
    made = made_layers(names, 0, options.rows, options, checked=True)
    calls = {name: Turns([Step(peers[name], x, dy) for peers, x, dy in made]).both for name in names}
    shapes = [(d, k) for d, k, _ in sizes_of(options).values()]
    extra = sum(options.rank * layers.columns("osora", d, k)[1] for d, k in shapes)
    floor = 1 + extra / sum(2 * d * k for d, k in shapes)
    title = f"block: seven linears, {options.rows} rows, r = {options.rank}, forward and backward"
    tell("block", {"rows": options.rows, **compare(title, calls, options, floor)})


@torch.no_grad()
def decode(options: argparse.Namespace, tell: Tell) -> None:
    """One row through every linear of the model, without gradients."""
    made = []
    for number in range(options.blocks):
        with torch.enable_grad():
            made += made_layers(("frozen", "osora"), number, 1, options, checked=number == 0)

    def run(name: str) -> Callable[[], Any]:
        return lambda: [peers[name](x) for peers, x, _ in made]

    title = f"decode: one row through {len(made)} linears, r = {options.rank}"
    calls = {name: run(name) for name in ("frozen", "osora")}
    tell("decode", {"linears": len(made), **compare(title, calls, options)})


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="attach|block|decode", help="default: all")
    add("--device", default="cuda", help="cuda or cpu")
    add("--dtype", choices=list(models.DTYPES), default="bfloat16")
    add("--rank", type=int, default=64)
    add("--tol", type=float, default=1e-3)
    add("--rows", type=int, default=8192, help="of the block's step")
    add("--blocks", type=int, default=BLOCKS)
    add("--scale", type=int, default=1, help="what the widths are divided by")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="folder for the JSON (default: bench/results)")
    options = parser.parse_args(argv)
    for name in options.what:
        if name not in PARTS:
            parser.error(f"there is {', '.join(PARTS)}, not {name}")
    for name in ("rank", "rows", "blocks", "scale", "repetitions", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.rank > HIDDEN // options.scale:
        parser.error(f"--rank: at --scale {options.scale} there are {HIDDEN // options.scale} columns")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        check_device(options.device)
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "what")}
        run, results = Run("llama", options.device, settings), {}

        def tell(part: str, facts: dict[str, Any]) -> None:
            results[part] = facts
            run.case({"part": part, **facts})

        for name in options.what or PARTS:
            {"attach": attach, "block": block, "decode": decode}[name](options, tell)
        run.finish({"results": results}, options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
