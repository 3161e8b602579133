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
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import init
import measure
import models
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
    show_bytes,
    show_seconds,
)
from spectra import Matrices, Truth
from torch import Tensor

import osora
from osora.svd.arguments import SVD_METHODS
from osora.svd.certificate import Decomposition
from osora.svd.truncated import decompose

LOWRANK = {"lowrank-4": (1.0, 4), "lowrank-16": (1.0, 16), "lowrank-1.5r-4": (1.5, 4), "lowrank-1.5r-16": (1.5, 16)}
PACKAGES = {"sklearn": ("sklearn", "scikit-learn"), "scipy": ("scipy", "scipy")}  # what to import, what to install
DRIVERS = ("gesvdr", "gesvda", "gesvdj", "gesvdp", "gesvd")
PEERS = ("svd", *LOWRANK, *PACKAGES, *DRIVERS)
OWN = tuple(method for method in SVD_METHODS if method not in DRIVERS)
DTYPES = {**models.DTYPES, "float64": torch.float64}

# osora's singular values may be off by 100 tol² (an error of second order, over a gap of a hundredth or more between
# σ_r and what was not found), and by 1e-5 whatever the tolerance.
SIGMA_OVER_TOL_SQUARED, SIGMA_TOLERANCE = 100, init.SIGMA_TOLERANCE
EXACT_SIGMA = 1e-4  # of torch.linalg.svd; beyond it this benchmark is wrong, or LAPACK
CPU_BATCH, GPU_BATCH = 2**25, 2**29  # entries of a preset's batches

Group = tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[int]]  # matrices, shapes, ranks, batches
WIDE = ("1024x4096", "4096x4096", "11008x4096", "14336x4096")
PRESETS: dict[str, dict[str, Any]] = {
    # to see that it works: no figures
    "quick": {
        "groups": [(["gate"], ["96x64", "64x96"], [4], [1, 2])],
        "tols": [1e-3],
        "repetitions": 1,
        "memory": False,
        "source": "stored",
    },
    # what the project promises
    "goals": {
        "groups": [
            (["gate"], ["4096x4096", "11008x4096"], [64, 128], [1]),
            (["gate"], ["4096x4096"], [512], [1]),
            (["gate"], ["2048x2048"], [64], [1]),
        ]
    },
    "full": {
        "groups": [
            (["gate", "down", "query", "real"], ["576x1536", "1536x576"], [16, 64, 128], [1, 8]),
            (["gate", "down", "query"], ["2048x2048"], [16, 64, 128], [1, 8]),
            (["gate", "down", "query"], WIDE, [16, 64, 128], [1, 8]),
        ]
    },
    # osora's methods against each other: where should "auto" change from one to the other?
    "decide": {
        "groups": [
            (["gate"], ["576x1536", "1536x576"], [16, 32, 64, 128], [1, 8]),
            (["gate"], ["2048x2048", "4096x4096", "11008x4096"], [64, 128, 256, 512], [1]),
        ],
        "tols": [1e-3],
        "methods": ["auto", "lanczos", "gram"],
        "peers": [],
        "reference": "osora",
    },
}
DEFAULTS = {"tols": [1e-3, 1e-4], "methods": ["auto"], "reference": "lowrank-16", "repetitions": 5, "memory": True}
DEFAULTS |= {"source": "auto"}


@dataclass(frozen=True)
class Case:
    """What one table is about."""

    kind: str
    d: int
    k: int
    batch: int
    rank: int

    def __str__(self) -> str:
        batch = f"{self.batch} of " if self.batch > 1 else ""
        return f"{self.kind}, {batch}{self.d}×{self.k}, r = {self.rank}"


@dataclass
class Row:
    """One peer in one case: why it is not there, or what it gave."""

    peer: str
    about: str
    absent: str | None = None
    call: Callable[[], Any] | None = None
    first: float = math.nan  # seconds of the run that was checked
    errors: init.Errors = field(default_factory=init.Errors)
    facts: dict[str, Any] = field(default_factory=dict)
    gflop: float | None = None
    seconds: Timing = field(default_factory=lambda: Timing(()))
    memory: int | None = None

    @property
    def ours(self) -> bool:
        return self.peer.startswith("osora")


# -- the peers: [batch, d, k] and a rank -> U, S, V of each matrix ---------------------------------------------------

Triplets = tuple[Tensor, Tensor, Tensor]


def working(weight: Tensor) -> Tensor:
    """In a dtype that has linear algebra; converting is part of a peer's work."""
    return weight if weight.dtype == torch.float64 else weight.float()


def full(weight: Tensor, rank: int) -> list[Triplets]:
    U, S, Vh = torch.linalg.svd(working(weight), full_matrices=False)
    return [(u[:, :rank], s[:rank], vh[:rank].mT) for u, s, vh in zip(U, S, Vh, strict=True)]


def lowrank(weight: Tensor, rank: int, columns: int, iterations: int) -> list[Triplets]:
    U, S, V = torch.svd_lowrank(working(weight), q=columns, niter=iterations)
    return [(u[:, :rank], s[:rank], v[:, :rank]) for u, s, v in zip(U, S, V, strict=True)]


def from_numpy(U: Any, S: Any, Vh: Any) -> Triplets:
    """In descending order, which scipy does not promise."""
    order = S.argsort()[::-1].copy()
    return torch.from_numpy(U[:, order]), torch.from_numpy(S[order]), torch.from_numpy(Vh[order]).mT


def sklearn(weight: Tensor, rank: int) -> list[Triplets]:
    from sklearn.utils.extmath import randomized_svd

    return [from_numpy(*randomized_svd(one.numpy(), rank, random_state=0)) for one in working(weight)]


def scipy(weight: Tensor, rank: int) -> list[Triplets]:
    from scipy.sparse.linalg import svds

    return [from_numpy(*svds(one.numpy(), k=rank, rng=0)) for one in working(weight)]


def ours_checked(weight: Tensor, rank: int, method: str, tol: float) -> list[Decomposition]:
    """With everything osora says about its answer; unconverged ones are marked in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return decompose(list(weight), rank, names=[""] * len(weight), tol=tol, method=method)


def ours_timed(weight: Tensor, rank: int, method: str, tol: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return osora.truncated_svd(weight, rank, tol=tol, method=method)


def show_tol(tol: float) -> str:
    """1e-3, not 0.001."""
    mantissa, _, exponent = f"{tol:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def own_names(methods: Iterable[str], tols: Iterable[float]) -> dict[str, tuple[str, float]]:
    """Peers that are osora's: name -> method and tolerance."""
    return {f"osora-{method}-{show_tol(tol)}": (method, tol) for tol in tols for method in methods}


def absence(name: str, weight: Tensor, rank: int) -> str | None:
    """Why a peer cannot take part, or None."""
    on_gpu, smaller = weight.is_cuda, min(weight.shape[-2:])
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if not installed(module):
            return f"not installed: {package}"
        if on_gpu:
            return "runs on the CPU only"
        if name == "scipy" and rank >= smaller:
            return f"needs a rank below {smaller}"
    if name in DRIVERS:
        if not on_gpu:
            return "needs --device cuda"
        if name not in SVD_METHODS:
            return f"this osora has no method {name}"
    if name in LOWRANK and round(LOWRANK[name][0] * rank) > smaller:
        return f"needs {round(LOWRANK[name][0] * rank)} columns, there are {smaller}"
    return None


def full_flop(d: int, k: int) -> float:
    """Thin U, Σ and V by QR iteration (Golub and Van Loan, 4th edition, figure 8.6.1); LAPACK needs less."""
    m, n = max(d, k), min(d, k)
    return min(14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)


def prepare(name: str, weight: Tensor, rank: int, own: dict[str, tuple[str, float]], tol: float) -> Row:
    """A peer on these matrices. Its GFLOP: products with W and Wᵀ alone, or those of a whole SVD."""
    batch, d, k = weight.shape
    if name in own:
        method, tol = own[name]
        about = name.replace("-", " ", 2).replace(" auto", "")
        return Row(name, about, call=lambda: ours_timed(weight, rank, method, tol))
    absent = absence(name, weight, rank)
    if name in LOWRANK:
        columns, iterations = round(LOWRANK[name][0] * rank), LOWRANK[name][1]
        about = f"svd_lowrank q={'r' if columns == rank else '1.5r'} niter={iterations}"
        call = lambda: lowrank(weight, rank, columns, iterations)  # noqa: E731
        flop = 2.0 * d * k * columns * (2 * iterations + 2)
        return Row(name, about, absent, call, gflop=batch * flop / 1e9)
    if name == "svd":
        return Row(name, "torch.linalg.svd", absent, lambda: full(weight, rank), gflop=batch * full_flop(d, k) / 1e9)
    if name == "sklearn":
        iterations = 7 if rank < 0.1 * min(d, k) else 4  # its own rule, and 10 columns more than asked for
        flop = 2.0 * d * k * (rank + 10) * (2 * iterations + 2)
        return Row(name, "randomized_svd", absent, lambda: sklearn(weight, rank), gflop=batch * flop / 1e9)
    if name == "scipy":
        return Row(name, "scipy svds", absent, lambda: scipy(weight, rank))
    return Row(name, f"cuSOLVER {name}", absent, lambda: ours_timed(weight, rank, name, tol))


# -- correctness -----------------------------------------------------------------------------------------------------


def errors_of(W: Tensor, truth: Truth, factors: Triplets) -> tuple[init.Errors, Tensor]:
    """Of one matrix, in float64 where it lies; and its left residuals. The angle is that of V's span."""
    U, S, V = (part.detach().to(W.device, torch.float64) for part in factors)
    if not all(bool(part.isfinite().all()) for part in (U, S, V)):
        return init.Errors(*[math.inf] * 4), torch.full_like(S, math.inf)
    left, right = init.true_residuals(W, U, S, V)
    Q = torch.linalg.qr(V).Q
    outside = Q - truth.V @ (truth.V.mT @ Q)
    sine = float(torch.linalg.eigvalsh(outside.mT @ outside)[-1].clamp_min(0).sqrt())
    eye = torch.eye(len(S), dtype=W.dtype, device=W.device)
    return init.Errors(
        sigma=float(((S - truth.S).abs() / init.relative_to(truth.S)).max()),
        residual=float(torch.maximum(left, right).max()),
        angle_sine=sine,
        orthogonality=max(float((part.mT @ part - eye).abs().max()) for part in (U, V)),
    ), left


def complaints(name: str, errors: init.Errors, left: Tensor, claimed: Decomposition, tol: float) -> list[str]:
    """init.py's rules, but σ is judged by tol, and only where convergence is claimed."""
    limit = max(SIGMA_TOLERANCE, SIGMA_OVER_TOL_SQUARED * tol**2) if claimed.converged else math.inf
    harmless = errors.sigma <= limit and math.isfinite(errors.sigma)
    checked = dataclasses.replace(errors, sigma=0.0) if harmless else errors
    return init.complaints(name, checked, left.cpu(), claimed, tol)


def check(
    row: Row, weight: Tensor, truth: list[Truth], case: Case, own: dict[str, tuple[str, float]], tol: float
) -> None:
    """Run a peer once and compare; a peer that cannot run is told apart, a wrong answer of osora's is Refused."""
    method, tol = own.get(row.peer, (row.peer, tol))
    certified = row.ours or row.peer in DRIVERS
    if row.absent or row.call is None:
        return
    measure.synchronise(str(weight.device))
    began = time.perf_counter()
    try:
        answers = ours_checked(weight, case.rank, method, tol) if certified else row.call()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if method == "auto":
            raise
        row.absent = "could not run: " + str(error).strip().partition("\n")[0][:150]
        return
    measure.synchronise(str(weight.device))
    row.first = time.perf_counter() - began
    wrong = []
    for number, (answer, true) in enumerate(zip(answers, truth, strict=True)):
        factors = (answer.U, answer.S, answer.V) if certified else answer
        errors, left = errors_of(weight[number].double(), true, factors)
        row.errors |= errors
        if certified:
            wrong += complaints(f"{case}, {row.about}, matrix {number}", errors, left, answer, tol)
    if row.ours and wrong:
        raise Refused("osora's answer is wrong, so nothing is timed:\n" + "\n".join(wrong[:10]))
    if row.peer == "svd" and not row.errors.sigma <= EXACT_SIGMA:
        raise Refused(f"{case}: torch.linalg.svd is off by {row.errors.sigma:.1e}: the truth or LAPACK is wrong")
    if certified:
        row.facts = {
            "method": sorted({answer.method for answer in answers}),
            "passes": max(answer.passes for answer in answers),
            "unconverged": sum(not answer.converged for answer in answers),
            "wrong": wrong,
        }
        columns: list[Any] = [getattr(answer, "columns", None) for answer in answers]
        if row.ours and None not in columns:
            row.gflop = 2.0 * case.d * case.k * sum(columns) / 1e9


# -- time and memory -------------------------------------------------------------------------------------------------


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


def ratio(row: Row, reference: Row) -> tuple[float, float, float]:
    """Of the repetitions that both ran."""
    both = min(len(row.seconds.seconds), len(reference.seconds.seconds))
    return Timing(row.seconds.seconds[:both]).ratio(Timing(reference.seconds.seconds[:both]))


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


# -- showing ---------------------------------------------------------------------------------------------------------


def show(title: str, rows: list[Row], reference: Row | None, rate: float) -> None:
    """The table of one case; reasons and complaints stand below it."""
    lines, notes = [], []
    for row in rows:
        if row.absent:
            lines.append([row.about, "absent", *["–"] * 8])
            notes.append(f"{row.about}: {row.absent}")
            continue
        once = len(row.seconds.seconds) == 1
        seconds = show_seconds(row.seconds).partition(" (")[0] + ", once" if once else show_seconds(row.seconds)
        over = "1" if row is reference else "–"
        if reference and row is not reference:
            middle, low, high = ratio(row, reference)
            over = f"{middle:.3g}" if once else f"{middle:.3g} ({low:.3g}-{high:.3g})"
        errors = [f"{getattr(row.errors, name):.1e}" for name in ("sigma", "angle_sine", "residual")]
        passes = "–"
        if row.facts:
            passes = f"{row.facts['passes']} {'/'.join(row.facts['method'])}"
            if row.facts["unconverged"]:
                notes.append(f"{row.about}: {row.facts['unconverged']} not converged, and says so")
            notes += row.facts["wrong"]
        work = ["–", "–"]
        if row.gflop is not None:
            work = [f"{row.gflop:.3g}", f"{100 * row.gflop / row.seconds.median / rate:.0f} %"]
        memory = "–" if row.memory is None else show_bytes(row.memory)
        lines.append([row.about, seconds, over, *errors, passes, *work, memory])
    over = f"/ {reference.peer}" if reference else "ratio"
    columns = ("peer", "time (min-max)", over, "σ error", "sin angle", "residual", "passes", "GFLOP", "of GEMM")
    measure.table(title, (*columns, "memory"), lines)
    for note in notes:
        console.print(f"  {note}")


def as_dict(row: Row, reference: Row | None, rate: float) -> dict[str, Any]:
    """For the JSON, which knows no infinity."""
    if row.absent:
        return {"absent": row.absent}
    errors = {name: value if math.isfinite(value) else None for name, value in asdict(row.errors).items()}
    result = {"seconds": row.seconds.as_dict(), "first_seconds": row.first, "largest_error": errors, **row.facts}
    result |= {"gflop": row.gflop, "extra_memory_bytes": row.memory, "of_gemm_rate": None, "over_reference": None}
    if row.gflop is not None:
        result["of_gemm_rate"] = row.gflop / row.seconds.median / rate
    if reference:
        result["over_reference"] = dict(zip(("median", "min", "max"), ratio(row, reference), strict=True))
    return result


def look(row: Row) -> tuple[str, str]:
    """Marker and colour of a peer in the plot."""
    if row.ours:
        return "*", "#c1121f"
    markers = dict(zip(PEERS, "sv^<>DPXdphH8", strict=False))
    family = "#0353a4" if row.peer in ("svd", *DRIVERS) else "#555555" if row.peer in LOWRANK else "#2b9348"
    return markers[row.peer], family


def place_labels(figure: Any, axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """A label near each point, where it covers no other label and no marker (or the fewest)."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    pixels = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in pixels]
    frame, renderer = axes.get_window_extent(), figure.canvas.get_renderer()
    turns = [0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11]  # sixteenths, the sides first
    spots = [(distance, math.pi * turn / 8) for distance in (8, 16, 26, 38, 52, 68, 86) for turn in turns]
    for number, (x, y, text, colour) in enumerate(points):
        best: tuple[Any, Any] | None = None
        least = math.inf
        for distance, angle in spots:
            right, up = math.cos(angle), math.sin(angle)
            label = axes.annotate(
                text,
                (x, y),
                (distance * right, distance * up),
                textcoords="offset points",
                ha="center" if abs(right) < 0.1 else "left" if right > 0 else "right",
                va="center" if abs(up) < 0.1 else "bottom" if up > 0 else "top",
                fontsize=7.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "shrinkB": 3} if distance > 10 else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line to its point
            covered = sum(box.overlaps(other) for i, other in enumerate(taken) if i != number)
            covered += 10 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if covered < least:
                if best:
                    best[0].remove()
                best, least = (label, box), covered
            else:
                label.remove()
            if least == 0:
                break
        if best:
            taken.append(best[1])


def plot(path: Path, cases: list[tuple[str, list[Row]]], subtitle: str) -> None:
    """The error of the singular values against time, a panel for each case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure(figsize=(5.2 * across, 4.2 * down + 0.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Truncated SVDs: error of σ against time, lower left is better\n{subtitle}", fontsize=11)
    panels, texts = list(figure.subplots(down, across, squeeze=False).flat), []
    for axes in panels[len(cases) :]:
        axes.remove()
    for axes, (title, rows) in zip(panels, cases, strict=False):
        points = []
        for row in rows:
            if row.absent or not math.isfinite(row.errors.sigma):
                continue
            marker, colour = look(row)
            x, y = row.seconds.median, max(row.errors.sigma, 1e-9)
            size = 110 if row.ours else 45
            axes.scatter([x], [y], marker=marker, color=colour, s=size, zorder=3, edgecolor="white", linewidth=0.6)
            points.append((x, y, row.about, colour))
        axes.set(xscale="log", yscale="log", title=title, xlabel="seconds, median", ylabel="σ error")
        axes.margins(0.22)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, which="major", alpha=0.3)
        texts.append((axes, points))
    figure.draw_without_rendering()  # settles the layout, so that labels can be measured
    figure.set_layout_engine("none")
    for axes, points in texts:
        place_labels(figure, axes, points)
    measure.write_figure(figure, path)


# -- a run -----------------------------------------------------------------------------------------------------------


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


def run_all(cases: list[Case], options: argparse.Namespace) -> dict[str, Any]:
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


# -- arguments -------------------------------------------------------------------------------------------------------


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
            run.finish(run_all(cases, options), options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
