# SPDX-License-Identifier: Apache-2.0
"""Time of a whole model's initialisation: osora against PEFT's `pissa` and `pissa_niter_16` on the same layers.

What is timed, per group of equal layers (attach's own batches), the peers in turn:
  osora            what `osora.attach` does: checks, truncated SVDs with certificates, the adapter layers
  pissa            PEFT's LoraLayer.pissa_init: torch.linalg.svd, its two factors, its residual weight
  pissa_niter_16   the same with torch.svd_lowrank(niter=16)
PEFT's finding and wrapping of layers is left out of its time.

First every layer of every peer is compared with its true triplets: a float64 SVD, or what the model was made of where
that is known (--model llama3-8b-layers). If one of osora's answers is wrong (singular values, reported residuals, or
"converged" where it is not), no time is shown and the exit code is 1. With --slow, a batch for which `pissa` took more
than so many seconds is not given to it again: the run that was checked is the one whose time stands, marked "once",
and the ratio is to osora's run before it. osora and pissa_niter_16 run as often as asked.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import clock
import loading
import models
import torch
from measure import (
    Refused,
    Run,
    Timing,
    check_device,
    console,
    interleaved,
    show_ratio,
    show_seconds,
    table,
)
from spectra import Truth
from torch import Tensor, nn

from osora import OsoraConfig
from osora.layers import OsoraLinear
from osora.layers.base_weight import oriented_weight
from osora.model.decompose import batches, decompose_targets
from osora.model.targets import Target, find_targets
from osora.svd.certificate import Decomposition

PEERS = ("osora", "pissa", "pissa_niter_16")
MAY_BE_SLOW = ("pissa",)
SLOW = {models.LLAMA: 5.0}  # --slow where it is not given: else never
SIGMA_TOLERANCE = 1e-5  # relative, every singular value
RESIDUAL_FACTOR = 10  # a reported residual and the true one
# What float32 factors can show: below it a residual is rounding, and a singular value is zero.
ROUNDING = 1e-6


@dataclass
class Errors:
    """The largest over some matrices. Residuals of both sides: ‖Wᵀu − σv‖ and ‖Wv − σu‖, over σ."""

    sigma: float = 0.0
    residual: float = 0.0
    angle_sine: float = 0.0
    orthogonality: float = 0.0

    def __or__(self, other: "Errors") -> "Errors":
        return Errors(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass
class Found:
    """A peer's triplets of one matrix; the reported residuals where the peer reports any."""

    U: Tensor
    S: Tensor
    V: Tensor
    decomposition: Decomposition | None = None


def relative_to(S: Tensor) -> Tensor:
    """What an error of each singular value is relative to: itself, or the largest where it is zero to rounding."""
    return torch.where(S > ROUNDING * S[0], S, S[0].clamp_min(torch.finfo(S.dtype).tiny))


def _angle_sine(found: Tensor, true: Tensor) -> float:
    """Sine of the largest principal angle between the spans of two sets of columns, `true` orthonormal."""
    Q = torch.linalg.qr(found).Q
    return float(torch.linalg.matrix_norm(Q - true @ (true.mT @ Q), ord=2))


def true_residuals(W: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """‖Wᵀu − σv‖ / σ and ‖Wv − σu‖ / σ of each triplet, all in float64."""
    scale = relative_to(S)
    return (
        torch.linalg.vector_norm(W.mT @ U - V * S, dim=0) / scale,
        torch.linalg.vector_norm(W @ V - U * S, dim=0) / scale,
    )


def errors_of(W: Tensor, truth: tuple[Tensor, Tensor, Tensor], found: Found) -> tuple[Errors, Tensor]:
    """The errors of one matrix, and the true residuals of its left side."""
    U, S, V = (t.detach().to(W.device, torch.float64) for t in (found.U, found.S, found.V))
    if not all(bool(t.isfinite().all()) for t in (U, S, V)):
        return Errors(*[math.inf] * 4), torch.full_like(S, math.inf)
    true_U, true_S, true_V = truth
    left, right = true_residuals(W, U, S, V)
    eye = torch.eye(len(S), dtype=torch.float64, device=W.device)
    return Errors(
        sigma=float(((S - true_S).abs() / relative_to(true_S)).max()),
        residual=float(torch.maximum(left, right).max()),
        angle_sine=max(_angle_sine(U, true_U), _angle_sine(V, true_V)),
        orthogonality=max(float((Q.mT @ Q - eye).abs().max()) for Q in (U, V)),
    ), left


def complaints(name: str, errors: Errors, true: Tensor, claimed: Decomposition, tol: float) -> list[str]:
    """What is wrong with osora's answer for one matrix; `true`: the left residuals recomputed in float64."""
    wrong = []
    if not all(math.isfinite(value) for value in asdict(errors).values()):
        return [f"{name}: its factors are not finite"]
    if errors.sigma > SIGMA_TOLERANCE:
        wrong.append(f"{name}: a singular value is off by {errors.sigma:.1e}, relative")
    if errors.orthogonality > 10 * SIGMA_TOLERANCE:
        wrong.append(f"{name}: its vectors are orthonormal only to {errors.orthogonality:.1e}")
    true, reported = true.cpu(), claimed.residuals.to("cpu", torch.float64)
    for a, b in ((true, reported), (reported, true)):
        beyond = (a > RESIDUAL_FACTOR * b + ROUNDING).nonzero().flatten().tolist()
        if beyond:
            i = beyond[0]
            wrong.append(f"{name}: residual {i} is {true[i]:.1e}, but {reported[i]:.1e} is reported")
    if claimed.converged and float(true.max()) > tol * 1.001:
        wrong.append(f"{name}: reported as converged to {tol:g} with a residual of {true.max():.1e}")
    return wrong


# -- the peers -------------------------------------------------------------------------------------------------------


def osora_initialise(batch: list[Target], config: OsoraConfig) -> list[Decomposition]:
    """attach's work for one of its batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what has not converged is counted in the table
        pairs = list(decompose_targets(batch, config, max_memory=None, unconverged="warn", progress=False))
    for target, factors in pairs:
        OsoraLinear(target.module, factors)
    return [factors for _, factors in pairs]


class PissaLayers:
    """PEFT's LoRA layers around a batch of linear layers, whose weights they may replace but not write to."""

    def __init__(self, batch: list[Target], kind: str) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        self.kind = kind
        self.weights = [oriented_weight(target.module).detach() for target in batch]
        self.layers = []
        for target, weight in zip(batch, self.weights, strict=True):
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            base.weight = nn.Parameter(weight, requires_grad=False)
            config = LoraConfig(r=target.rank, lora_alpha=target.rank)  # scaling 1
            self.layers.append(Linear(base, "default", config, r=target.rank, lora_alpha=target.rank))

    def initialise(self) -> None:
        """One initialisation of all of them, from the original weights."""
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.pissa_init("default", self.kind)

    def found(self) -> list[Found]:
        """σ, U and V out of A = diag(√σ) Vᵀ and B = U diag(√σ)."""
        result = []
        for layer in self.layers:
            A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            a, b = torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)
            tiny = torch.finfo(torch.float64).tiny
            result.append(Found(B / b.clamp_min(tiny), a * b, (A / a.clamp_min(tiny)[:, None]).mT))
        return result


# -- correctness, then time ------------------------------------------------------------------------------------------


@dataclass
class Group:
    """One of attach's batches, with the outcome of its check."""

    batch: list[Target]
    shape: tuple[int, int]
    errors: dict[str, Errors]
    passes: list[int]
    unconverged: int
    first: dict[str, Timing]  # of the run that was checked

    def once(self, slow: float | None) -> set[str]:
        """The peers that have run often enough."""
        return {name for name in MAY_BE_SLOW if slow is not None and self.first[name].median > slow}


def timed(call: Callable[[], Any], device: str) -> tuple[Any, Timing]:
    """One run and its time."""
    results: list[Any] = []
    seconds = clock.seconds_of(lambda: results.append(call()), clock.card_of(device))
    return results[0], Timing((seconds,))


def truth_of(target: Target, known: Mapping[str, Truth]) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V in float64, where the weight is: what is known, or of an SVD."""
    if target.name in known:
        true = known[target.name].top(target.rank)
        return true.U, true.S, true.V
    U, S, Vh = torch.linalg.svd(oriented_weight(target.module).detach().double(), full_matrices=False)
    return U[:, : target.rank].clone(), S[: target.rank].clone(), Vh[: target.rank].mT.clone()


def check(
    batch: list[Target],
    config: OsoraConfig,
    known: Mapping[str, Truth],
    device: str,
    tell: Callable[[], None],
    alone: bool = False,
) -> tuple[Group, list[str]]:
    """Every peer on every layer of the batch against the truth; osora first, the others not if it is wrong or alone."""
    ours, seconds = timed(lambda: osora_initialise(batch, config), device)
    truth = [truth_of(target, known) for target in batch]
    first, worst, wrong = {"osora": seconds}, {name: Errors() for name in PEERS}, []

    def compare(name: str, answers: list[Found]) -> None:
        for i, target in enumerate(batch):
            W = oriented_weight(target.module).detach().double()
            errors, left = errors_of(W, truth[i], answers[i])
            worst[name] |= errors
            if name == "osora":
                wrong.extend(complaints(target.name, errors, left, ours[i], config.tol))
                tell()

    compare("osora", [Found(item.U, item.S, item.V, item) for item in ours])
    for kind in () if alone or wrong else PEERS[1:]:
        layers = PissaLayers(batch, kind)
        _, first[kind] = timed(layers.initialise, device)
        compare(kind, layers.found())
    passes = [item.passes for item in ours]
    unconverged = sum(not item.converged for item in ours)
    return Group(batch, tuple(oriented_weight(batch[0].module).shape), worst, passes, unconverged, first), wrong


def time_group(group: Group, config: OsoraConfig, options: argparse.Namespace) -> dict[str, Timing]:
    """The peers in turn on one batch, without those that once is enough for."""
    calls: dict[str, Callable[[], object]] = {"osora": lambda: osora_initialise(group.batch, config)}
    for kind in PEERS[1:]:
        if kind not in group.once(options.slow):
            calls[kind] = PissaLayers(group.batch, kind).initialise
    return interleaved(calls, options.repetitions, warm_up=options.warm_up, device=options.device)


def add(times: list[Timing]) -> Timing:
    """Repetition by repetition."""
    return sum(times[1:], times[0])


def summarise(name: str, groups: list[Group], times: list[dict[str, Timing]]) -> dict[str, Any]:
    """Some batches as one line of the table: times are added, errors are the largest.

    A peer that ran once on one of the batches is given the time of its first run on all of them, beside osora's first.
    """
    first = {peer: add([group.first[peer] for group in groups]) for peer in PEERS}
    once = {peer for peer in PEERS if any(peer not in t for t in times)}
    total = {peer: first[peer] if peer in once else add([t[peer] for t in times]) for peer in PEERS}
    ratios = {peer: (first if peer in once else total)["osora"].ratio(total[peer]) for peer in PEERS}
    passes = [count for group in groups for count in group.passes]
    peers = {}
    for peer in PEERS:
        worst = Errors()
        for group in groups:
            worst |= group.errors[peer]
        peers[peer] = {"seconds": total[peer].as_dict(), "largest_error": asdict(worst), "once": peer in once}
        if peer != "osora":
            peers[peer]["osora_over_this"] = dict(zip(("median", "min", "max"), ratios[peer], strict=True))
        if peer in once:
            peers[peer]["osora_seconds_beside"] = first["osora"].median
    peers["osora"] |= {
        "passes": {"min": min(passes), "max": max(passes), "mean": sum(passes) / len(passes)},
        "unconverged": sum(group.unconverged for group in groups),
    }
    return {"what": name, "matrices": len(passes), "peers": peers, "_times": total, "_ratios": ratios}


def show(title: str, summaries: list[dict[str, Any]]) -> None:
    """The table; takes the timings out of the summaries."""
    rows: list[list[str | None]] = []
    for line in summaries:
        times, ratios = line.pop("_times"), line.pop("_ratios")
        for peer in PEERS:
            facts = line["peers"][peer]
            worst, ratio, passes = facts["largest_error"], "", ""
            if peer == "osora":
                count = facts["passes"]
                passes = f"{count['min']}" if count["min"] == count["max"] else f"{count['min']} - {count['max']}"
                passes += f", {facts['unconverged']} not converged" if facts["unconverged"] else ""
            else:
                ratio = f"{ratios[peer][0]:.3f}" if facts["once"] else show_ratio(ratios[peer])
            seconds = show_seconds(times[peer])
            seconds = seconds.partition(" (")[0] + ", once" if facts["once"] else seconds
            first = f"{line['what']}, {line['matrices']}" if peer == "osora" else ""
            errors = [f"{worst[key]:.1e}" for key in ("sigma", "residual", "angle_sine")]
            rows.append([first, peer, seconds, ratio, *errors, passes])
        rows.append([None])
    columns = ("layers", "peer", "time (min-max)", "osora / this", "σ error", "residual", "sin angle", "passes")
    table(title, columns, rows)


def run_dtype(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One dtype: load, check, time, show."""
    model, known = loading.load_known(options.model, dtype, options.device, options.layers, options.rank)
    config = OsoraConfig(r=options.rank, tol=options.tol, seed=options.seed)
    parts = list(batches(find_targets(model, config)))
    count = sum(map(len, parts))
    groups, wrong = [], []
    with console.status("") as status:
        done = 0

        def tell() -> None:
            nonlocal done
            done += 1
            status.update(f"{dtype}: {done} of {count} layers compared with the truth")

        for batch in parts:
            group, found = check(batch, config, known, options.device, tell, alone=bool(wrong))
            groups.append(group)
            wrong += found
        if wrong:
            more = f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise Refused(
                f"{dtype}: osora's answers are wrong, so they are not timed:\n" + "\n".join(wrong[:10]) + more
            )
        console.print(f"{dtype}: all {count} layers are right. Timing.")
        times = []
        for number, group in enumerate(groups):
            status.update(f"{dtype}: timing batch {number + 1} of {len(groups)}")
            times.append(time_group(group, config, options))
    shapes = list(dict.fromkeys(group.shape for group in groups))
    summaries = []
    for shape in shapes:
        chosen = [i for i, group in enumerate(groups) if group.shape == shape]
        name = "{}×{}".format(*shape)
        summaries.append(summarise(name, [groups[i] for i in chosen], [times[i] for i in chosen]))
    summaries.append(summarise("all", groups, times))
    show(
        f"Initialisation of {models.label(options.model)}, {dtype}, r = {options.rank}, tol {options.tol:g}", summaries
    )
    truth = "known" if known else "float64 SVD"
    return {"dtype": dtype, "checked_against_float64": count, "truth": truth, "lines": summaries}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=models.CHOICES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    parser.add_argument("--tol", type=float, default=1e-3, help="osora's tolerance on the residuals")
    slow = "seconds; where `pissa` takes more it runs once (default: 5 for llama3-8b-layers, never for other models)"
    parser.add_argument("--slow", type=float, help=slow)
    options = models.parse(parser, argv)
    options.slow = SLOW.get(options.model) if options.slow is None else options.slow
    if options.slow is not None and not 0 <= options.slow < math.inf:
        parser.error(f"--slow must be seconds, 0 or more, got {options.slow}")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        settings = {"model": models.label(options.model), "rank": options.rank, "tol": options.tol}
        asked = ("layers", "repetitions", "warm_up", "slow", "quick", "seed")
        settings |= {key: getattr(options, key) for key in asked}
        run = Run("init", check_device(options.device), settings)
        results = []
        for dtype in options.dtype:
            results.append(run_dtype(dtype, options))
            run.case(results[-1])
        run.finish({"results": results}, options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
