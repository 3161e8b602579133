# SPDX-License-Identifier: Apache-2.0
"""Time and accuracy of truncated SVDs: osora against what else there is, on matrices whose triplets are known.

Matrices (spectra.py): `gate`, `down`, `query` have the singular values of a SmolLM2 layer, stretched to any size, and
known singular vectors; `real` are SmolLM2's own layers, at their own shapes only. The peers, in turn:
  svd               torch.linalg.svd, everything
  lowrank-N         torch.svd_lowrank(q=r, niter=N); lowrank-1.5r-N: with q = 1.5 r
  sklearn, scipy    sklearn.utils.extmath.randomized_svd, scipy.sparse.linalg.svds (CPU only)
  gesvdr, gesvda, gesvdj, gesvdp, gesvd   cuSOLVER's own, through osora.truncated_svd(method=...) (CUDA only)
  osora             osora.truncated_svd for each of --methods and --tols

First every peer runs once and is compared with the truth. If one of osora's own answers is wrong (a singular value,
a reported residual, or "converged" where it is not), nothing is timed and the exit code is 1. A peer whose first run
took more than --slow seconds is then timed once; osora and the reference always as often as asked.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure
import spectra
import torch
from measure import (
    Refused,
    Run,
    Timing,
    check_device,
    console,
    gemm_rate,
    installed,
    interleaved,
    shape_of,
)
from spectra import Matrices
from svd_peers import (
    CPU_BATCH,
    DEFAULTS,
    DRIVERS,
    DTYPES,
    GPU_BATCH,
    LOWRANK,
    OWN,
    PACKAGES,
    PEERS,
    PRESETS,
    Case,
    Group,
    Row,
    check,
    own_names,
    prepare,
    working,
)
from svd_report import as_dict, plot, show


def time_rows(rows: list[Row], reference: str, repetitions: int, slow: float, device: str) -> None:
    """In turn; the check was the warm-up. All run in the first repetition, slow ones in no other."""
    calls = {row.peer: row.call for row in rows if row.call and not row.absent}
    often = {row.peer for row in rows if row.ours or row.peer == reference or row.first <= slow}
    times = interleaved(calls, 1, warm_up=0, device=device)
    calls = {name: call for name, call in calls.items() if name in often}
    more = interleaved(calls, repetitions - 1, warm_up=0, device=device)
    for row in rows:
        if row.peer in times:
            later = more[row.peer].seconds if row.peer in more else ()
            row.seconds = Timing(times[row.peer].seconds + later)


def child(options: argparse.Namespace) -> int:
    """Peak memory of one peer on matrices from a file: prints one line of JSON."""
    own = own_names(options.methods, options.tols)
    small = torch.randn(1, 256, 192, dtype=torch.float32, device=options.device)
    weight = torch.load(options.child, map_location=options.device, weights_only=True)
    (name,), (rank,) = options.peers or own, options.ranks
    row = prepare(name, small.to(weight.dtype), 4, own, options.tols[0])
    if row.call:  # code, handles and a library's buffers are no memory of the method
        row.call()
    gemm_rate(512, working(small.to(weight.dtype)).dtype, options.device)
    row = prepare(name, weight, rank, own, options.tols[0])
    loaded = measure.memory_now(options.device)
    reset = measure.reset_peak(options.device)
    if row.call:
        row.call()
    print(json.dumps({"loaded": loaded, "peak": measure.peak_memory(options.device), "reset": reset}))
    return 0


def extra_memory(
    row: Row, saved: Path, case: Case, own: dict[str, tuple[str, float]], options: argparse.Namespace
) -> int | None:
    """Bytes a peer takes beyond its input, from a process of its own; None where the peak cannot be reset."""
    method, tol = own.get(row.peer, ("auto", options.tols[0]))
    which = ["--peers", *([] if row.ours else [row.peer]), "--methods", method, "--tols", str(tol)]
    where = ["--ranks", str(case.rank), "--threads", str(options.threads), "--device", options.device]
    found = measure.run_child([__file__, "--child", str(saved), *which, *where])
    return max(0, found["peak"] - found["loaded"]) if found["reset"] else None


# -- a run -------------------------------------------------------------------------------------------------------------


def run_case(
    case: Case, matrices: Matrices, saved: Path | None, rate: float, options: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    """Check, time, show."""
    truth = [each.top(case.rank) for each in matrices.truth]
    own = own_names(options.methods, options.tols)
    reference_name = next(iter(own)) if options.reference == "osora" else options.reference
    names = [*own, *(name for name in PEERS if name in {*options.peers, options.reference})]
    rows = [prepare(name, matrices.weight, case.rank, own, options.tols[0]) for name in names]
    with console.status("") as status:
        for row in rows:
            status.update(f"{case}: checking {row.about}")
            check(row, matrices.weight, truth, case, own, options.tols[0])
        status.update(f"{case}: timing")
        time_rows(rows, reference_name, options.repetitions, options.slow, options.device)
        for row in rows:
            if saved and not row.absent:
                status.update(f"{case}: memory of {row.about}")
                row.memory = extra_memory(row, saved, case, own, options)
    reference = next((row for row in rows if row.peer == reference_name and not row.absent), None)
    gap = min(each.gap for each in truth)
    show(f"{case}, {options.dtype}; gap after r {gap:.1e} ({matrices.origin})", rows, reference, rate)
    peers = {row.peer: as_dict(row, reference, rate) for row in rows}
    return rows, {**asdict(case), "gap": gap, "origin": matrices.origin, "peers": peers}


def run_all(cases: list[Case], options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Matrices are made once for all the ranks they are asked with."""
    dtype, source = DTYPES[options.dtype], spectra.Source(options.source)
    size = 512 if options.preset == "quick" else 4096
    rates = [gemm_rate(size, working(torch.empty(0, dtype=dtype)).dtype, options.device)]
    console.print(f"A product of {size}×{size} matrices runs at {rates[0]:.0f} GFLOP/s.")
    console.print(f"A peer that takes more than {options.slow:g} s is timed once, if it is neither osora", end=" ")
    console.print("nor the reference.")
    results, drawn = [], []
    places: dict[Case, list[Case]] = {}
    for case in cases:
        places.setdefault(dataclasses.replace(case, rank=0), []).append(case)
    for place, here in places.items():
        rank, seed = max(case.rank for case in here), options.seed
        made = spectra.make(place.kind, place.d, place.k, place.batch, rank, dtype, options.device, seed, source)
        with tempfile.TemporaryDirectory() if options.memory else nullcontext() as folder:
            saved = Path(folder, "weight.pt") if folder else None
            if saved:
                torch.save(made.weight.cpu(), saved)
            for case in here:
                rows, result = run_case(case, made, saved, rates[0], options)
                results.append(result)
                run.case(result)
                drawn.append((str(case), rows))
    rates.append(gemm_rate(size, working(torch.empty(0, dtype=dtype)).dtype, options.device))
    if options.plot:
        where = f"{options.device}, CPU threads: {options.threads}"
        plot(options.plot, drawn, f"{options.dtype}, {where}, repetitions: {options.repetitions}")
    return {"gemm_gflops": {"size": size, "before": rates[0], "after": rates[1]}, "results": results}


def blas_threads(count: int) -> AbstractContextManager[Any]:
    """NumPy's and SciPy's BLAS have threads of their own."""
    if not installed("threadpoolctl"):
        if any(installed(module) for module, _ in PACKAGES.values()):
            console.print("threadpoolctl is not installed: NumPy and SciPy use as many threads as they like")
        return nullcontext()
    from threadpoolctl import threadpool_limits

    for module in ("scipy.linalg", "sklearn.utils.extmath"):  # a library must be loaded to be limited
        if installed(module.partition(".")[0]):
            importlib.import_module(module)
    return threadpool_limits(count, user_api="blas")


# -- arguments ---------------------------------------------------------------------------------------------------------


def cases_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    """The preset's groups with what was given in their place; combinations that cannot be are refused or left out.

    Left out: `real` where SmolLM2 has no such shape, unless nothing else was asked for; a preset's large batches.
    """
    groups: list[Group] = PRESETS[options.preset]["groups"]
    found: dict[Case, None] = {}
    limit = GPU_BATCH if options.device.startswith("cuda") else CPU_BATCH
    for kinds, shapes, ranks, batches in groups:
        for kind in options.matrices or kinds:
            for d, k in options.shapes or map(shape_of, shapes):
                for batch in options.batch or batches:
                    for rank in options.ranks or ranks:
                        if rank > min(d, k):
                            parser.error(f"--ranks: a {d}x{k} matrix has ranks 1 .. {min(d, k)}, got {rank}")
                        large = not options.batch and batch > 1 and batch * d * k > limit
                        if not large and (kind != "real" or (d, k) in spectra.REAL):
                            found[Case(kind, d, k, batch, rank)] = None
    if not found:
        known = ", ".join("{}x{}".format(*each) for each in spectra.REAL)
        parser.error(f"--matrices real: SmolLM2's layers have the shapes {known}; none of them was asked for")
    return list(found)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="goals", help="what the options below do not say (default: goals)")
    add("--matrices", nargs="+", choices=spectra.KINDS)
    add("--shapes", nargs="+", type=shape_of, help="such as 4096x4096: out_features x in_features")
    add("--ranks", nargs="+", type=int)
    add("--batch", nargs="+", type=int, help="numbers of matrices in one call")
    add("--tols", nargs="+", type=float, help="osora's tolerances")
    add("--methods", nargs="+", choices=OWN, help="osora's methods")
    add("--peers", nargs="*", choices=PEERS, help="default: all that fit the device; none: osora and the reference")
    add("--reference", choices=("osora", *PEERS), help="what times are divided by (default: lowrank-16)")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--repetitions", type=int, help="default: 5")
    add("--slow", type=float, default=5.0, help="seconds; slower peers are timed once (default: 5)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0)
    add("--source", choices=("auto", "smollm2", "stored"), help="of the spectra: auto takes SmolLM2 where it is there")
    add("--memory", action=argparse.BooleanOptionalAction, help="measure peak memory, in processes of their own")
    add("--plot", type=Path, metavar="FILE", help="draw σ error against time, FILE.png or FILE.svg")
    add("--output", type=Path, help="folder for the JSON (default: bench/results)")
    add("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    on_gpu = options.device.startswith("cuda")
    fitting = ["svd", *LOWRANK, *(DRIVERS if on_gpu else PACKAGES)]
    for name, value in (DEFAULTS | {"peers": fitting} | PRESETS[options.preset]).items():
        if name != "groups" and getattr(options, name) is None:
            setattr(options, name, value)
    if options.preset == "decide" and on_gpu and not options.peers:
        options.peers = list(DRIVERS)
    for name in ("repetitions", "threads", "ranks", "batch"):
        given = getattr(options, name)
        if any(value < 1 for value in (given if isinstance(given, list) else [given or 1])) or given == 0:
            parser.error(f"--{name} must be at least 1, got {given}")
    if not all(0 < tol < math.inf for tol in options.tols):
        parser.error(f"--tols must be positive, got {options.tols}")
    if options.plot and options.plot.suffix not in (".png", ".svg"):
        parser.error(f"--plot: the file's name must end in .png or .svg, got {options.plot.name}")
    return options, [] if options.child else cases_of(options, parser)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    options, cases = parse(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        check_device(options.device)
        if options.plot and not installed("matplotlib"):
            raise Refused("--plot needs matplotlib: pip install 'osora[test]'")
        with blas_threads(options.threads), torch.random.fork_rng():
            torch.manual_seed(options.seed)  # svd_lowrank and the products draw from torch's own
            if options.child:
                return child(options)
            left_out = ("child", "output", "plot", "matrices", "shapes", "ranks", "batch")
            settings = {name: value for name, value in vars(options).items() if name not in left_out}
            run = Run("svd", options.device, settings)
            run.finish(run_all(cases, options, run), options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
