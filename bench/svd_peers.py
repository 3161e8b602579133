# SPDX-License-Identifier: Apache-2.0
"""The peers of bench/svd.py: what each computes, whether it can run here, and whether it is right."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import init
import measure
import models
import torch
from measure import (
    Refused,
    Timing,
    installed,
)
from spectra import Truth
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


# -- the peers: [batch, d, k] and a rank -> U, S, V of each matrix -----------------------------------------------------

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


# -- correctness -------------------------------------------------------------------------------------------------------


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
    return init.complaints(name, checked, left, claimed, tol)


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
