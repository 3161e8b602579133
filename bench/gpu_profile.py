# SPDX-License-Identifier: Apache-2.0
"""Where the time goes on a card: a batched SVD, and one adapted layer's forward and backward.

  python bench/gpu_profile.py [svd] [layer] [--device cuda|cpu]

Times by events, a layer's also from a captured graph, where the host counts for nothing; then the kernels that take
most. What matters most comes first, so that a run that is cut has answered that. --device cpu is a rehearsal on tiny
sizes: that it runs, no figure.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import clock
import measure
import spectra
import torch
import torch.nn.functional as F
from gpu_smoke import short
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import osora
from osora import ops

KERNELS = 20  # lines of a table
# For a card, what matters most first, and for a rehearsal.
SHAPES = {"cuda": [(4096, 4096), (1024, 4096), (11008, 4096)], "cpu": [(96, 64)]}
RANKS = {"cuda": (64, 128), "cpu": (8,)}
BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 2)}
LAYERS = {"cuda": [(4096, 4096), (11008, 4096), (4096, 11008)], "cpu": [(96, 64)]}
ROWS = {"cuda": (512, 8192, 8, 1, 2048), "cpu": (4,)}


ABOUT: dict[str, Any] = {"benchmark": "profile", "gpu": None}


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
    measure.append_line({**ABOUT, "case": facts})


def milliseconds(call: Callable[[], object], device: str, times: int) -> float:
    """The median. Between two events on a card, with all calls queued one after the other; one has run before."""
    call()
    if device == "cpu":
        began = [time.perf_counter()]
        for _ in range(times):
            call()
            began.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in pairwise(began))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def kernels(title: str, call: Callable[[], object], device: str) -> None:
    """What ran on the device during one call, by kernel; the host's operators where there is no card."""
    call()
    measure.synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        began = time.perf_counter()
        call()
        measure.synchronise(device)
        wall = time.perf_counter() - began
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [event for event in found.key_averages() if getattr(event, key) > 0]
    if device == "cuda":  # those of the host have the times of the kernels they start, too
        events = [event for event in events if str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) / 1e3
    facts = {"kernels": sum(event.count for event in events), "device_ms": total, "wall_ms": 1e3 * wall}
    facts["top"] = [[e.key[:100], e.count, round(getattr(e, key) / 1e3, 4)] for e in events[:KERNELS]]
    tell(profile=title, **facts)


def products(batched: Tensor, found: Any, device: str) -> float:
    """Milliseconds that torch takes for as many products with W and its transpose, as wide, as these had."""
    width = max(1, round(float(found.columns.double().mean() / found.passes.double().mean())))
    count, d, k = batched.shape
    right, left = (torch.randn(count, size, width, device=device).to(batched.dtype) for size in (k, d))
    times = 10 if device == "cuda" else 2
    both = milliseconds(lambda: torch.bmm(batched, right), device, times)
    both += milliseconds(lambda: torch.bmm(batched.mT, left), device, times)
    return both * float(found.passes.double().mean()) / 2


def decompositions(device: str) -> None:
    """Milliseconds a matrix by shape, dtype, rank and batch, and what runs in a batch."""
    for d, k in SHAPES[device]:
        made = spectra.make("gate", d, k, 1, max(RANKS[device]), torch.float32, device, 0, spectra.Source("stored"))
        for dtype in (torch.bfloat16, torch.float32):
            weight = made.weight[0].to(dtype)
            for rank in RANKS[device]:
                for batch in BATCHES[device]:
                    # The same matrix with its rows turned: other numbers, the same spectrum.
                    batched = torch.stack([weight.roll(37 * number, 0) for number in range(batch)])
                    about = {"svd": f"{d}x{k}", "dtype": short(dtype), "rank": rank, "batch": batch}

                    def run(batched: Tensor = batched, rank: int = rank) -> Any:
                        return osora.truncated_svd(batched, rank)

                    try:
                        found = run()
                        took = milliseconds(run, device, 3)
                        facts = {"ms": took, "ms_each": took / batch, "passes": found.passes[[0, -1]].tolist()}
                        share = products(batched, found, device) / took
                        tell(**about, **facts, share_of_products=share, converged=bool(found.converged.all()))
                        if rank == RANKS[device][0] and (d, k) == SHAPES[device][0]:
                            kernels(f"svd {d}x{k} {short(dtype)} r{rank} batch {batch}", run, device)
                    except Exception as error:  # such as too little memory for this batch
                        tell(**about, exception=f"{type(error).__name__}: {error}"[:300])
        peer = made.weight[0]
        took = milliseconds(lambda peer=peer: torch.svd_lowrank(peer, q=RANKS[device][0], niter=16), device, 3)
        tell(svd=f"{d}x{k}", dtype="float32", rank=RANKS[device][0], peer="svd_lowrank(niter=16)", ms=took)


def peers(d: int, k: int, rank: int, device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """y of x, and what is trained."""
    W = (torch.randn(d, k, device=device) / k**0.5).bfloat16()
    U, V = (torch.linalg.qr(torch.randn(m, rank, device=device)).Q.bfloat16() for m in (d, k))
    S0 = torch.linspace(2, 1, rank, device=device)
    s, o = ((0.1 * torch.randn(m, device=device)).requires_grad_() for m in (rank, d))
    A, B = V.t().contiguous().requires_grad_(), U.clone().requires_grad_()
    return {
        "frozen": (lambda x: F.linear(x, W), []),
        "osora": (lambda x: ops.linear(x, W, None, U, V, S0, s, o), [s, o]),
        "lora": (lambda x: F.linear(x, W) + F.linear(F.linear(x, A), B), [A, B]),
    }


def layer(device: str) -> None:
    """bfloat16: one forward, and forward with backward, queued by the host and from a graph, over the frozen layer."""
    rank, times = RANKS[device][0], 30 if device == "cuda" else 2
    for d, k in LAYERS[device]:
        made = peers(d, k, rank, device)
        for n in ROWS[device]:
            x = torch.randn(n, k, device=device).bfloat16().requires_grad_()
            dy = torch.randn(n, d, device=device).bfloat16()
            base: dict[str, float] = {}
            for name, (function, trained) in made.items():

                def forward(function: Callable[[Tensor], Tensor] = function, x: Tensor = x) -> Tensor:
                    with torch.no_grad():
                        return function(x)

                def step(
                    function: Callable[[Tensor], Tensor] = function,
                    wanted: tuple[Tensor, ...] = (x, *trained),
                    dy: Tensor = dy,
                ) -> tuple[Tensor, ...]:
                    return torch.autograd.grad(function(wanted[0]), wanted, dy)

                took: dict[str, float] = {}
                about: dict[str, Any] = {"layer": f"{d}x{k}", "rows": n, "rank": rank, "peer": name}
                try:
                    for part, call in (("forward", forward), ("step", step)):
                        took[part] = milliseconds(call, device, times)
                        if device == "cuda":
                            took[f"{part}_graph"] = milliseconds(clock.Card(device).capture(call)[0], device, times)
                except Exception as error:
                    about["exception"] = f"{type(error).__name__}: {error}"[:300]
                base = base or took
                over = {part: round(value / base[part], 4) for part, value in took.items() if part in base}
                tell(**about, ms={part: round(value, 5) for part, value in took.items()}, over_frozen=over)
                if name == "osora" and (d, k) == LAYERS[device][0] and n in ROWS[device][:2]:
                    kernels(f"layer {d}x{k} rows {n}", step, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="svd|layer", help="default: both")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    parts = {"svd": decompositions, "layer": layer}
    for name in options.what:
        if name not in parts:
            parser.error(f"there is {' and '.join(parts)}, not {name}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    if options.device == "cuda":
        ABOUT["gpu"] = torch.cuda.get_device_name(0)
    torch.manual_seed(0)
    for name in options.what or parts:
        parts[name](options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
