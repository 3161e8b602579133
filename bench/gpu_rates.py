# SPDX-License-Identifier: Apache-2.0
"""What this GPU really does: bytes per second of a copy, products per second of a large GEMM. JSON on the last line.

The kernels are judged against these, not against a data sheet. Exit code 1, and no figure, without a CUDA device.
`--device cpu` is a rehearsal on tiny sizes: that it runs, no figure.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import torch

REPETITIONS = 20
SIZES = {"cuda": 8192, "cpu": 64}  # of the GEMM
BYTES = {"cuda": 2**30, "cpu": 2**16}  # of the copy


def seconds_once(call: Callable[[], object], device: str) -> float:
    """By CUDA events on a card."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def median_seconds(call: Callable[[], object], device: str) -> dict[str, float]:
    """After a warm-up."""
    for _ in range(3):
        call()
    seconds = [seconds_once(call, device) for _ in range(REPETITIONS)]
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def gemm(dtype: torch.dtype, device: str, tf32: bool = False) -> dict[str, float]:
    """Random numbers: zeros would run faster than real data. The result is checked on a part of it first."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    size = SIZES[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    expected = a[:8].double() @ b.double()
    error = float((out[:8].double() - expected).norm() / expected.norm())
    if not error <= 1e-2:
        raise SystemExit(f"the GEMM in {dtype} is off by {error:.1e}: nothing is reported")
    found = median_seconds(lambda: torch.mm(a, b, out=out), device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {**found, "flop_per_s": 2 * size**3 / found["median_s"], "relative_error": error}


def copy(device: str) -> dict[str, float]:
    """A copy reads and writes every byte."""
    source = torch.randn(BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    found = median_seconds(lambda: target.copy_(source), device)
    return {**found, "bytes_per_s": 2 * BYTES[device] / found["median_s"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report: dict[str, Any] = {"benchmark": "rates", "gpu": None}
    kinds = {"float32": (torch.float32,), "bfloat16": (torch.bfloat16,), "float64": (torch.float64,)}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        report |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}"}
        kinds |= {"tf32": (torch.float32, True), "float16": (torch.float16,)}
    calls = {"copy": lambda: copy(device)}
    calls |= {name: lambda kind=kind: gemm(kind[0], device, *kind[1:]) for name, kind in kinds.items()}
    for name, call in calls.items():
        found = report[name] = call()
        measure.append_line({"benchmark": "rates", "gpu": report["gpu"], "case": {"of": name, **found}})
        rate = found.get("bytes_per_s") or found["flop_per_s"]
        shown = f"{rate:.4g} {'byte/s' if 'bytes_per_s' in found else 'flop/s'}" if device == "cuda" else "runs"
        print(f"{name:10} {shown}", flush=True)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
