# SPDX-License-Identifier: Apache-2.0
"""What this GPU really does: bytes per second of a copy, products per second of a large GEMM. JSON on the last line.

The kernels are judged against these, not against a data sheet. Exit code 1, and no figure, without a CUDA device.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

REPETITIONS = 20
SIZE = 8192  # of the GEMM
COPY = 2**30  # bytes


def median_seconds(call: Callable[[], object]) -> dict[str, float]:
    """By CUDA events, after a warm-up."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(REPETITIONS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def gemm(dtype: torch.dtype, tf32: bool = False) -> dict[str, float]:
    """Random numbers: zeros would run faster than real data. The result is checked on a part of it first."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a, b = (torch.randn(SIZE, SIZE, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    expected = a[:8].double() @ b.double()
    error = float((out[:8].double() - expected).norm() / expected.norm())
    if not error <= 1e-2:
        raise SystemExit(f"the GEMM in {dtype} is off by {error:.1e}: nothing is reported")
    found = median_seconds(lambda: torch.mm(a, b, out=out))
    return {**found, "flop_per_s": 2 * SIZE**3 / found["median_s"], "relative_error": error}


def copy() -> dict[str, float]:
    """A copy reads and writes every byte."""
    source = torch.randn(COPY // 4, device="cuda")
    target = torch.empty_like(source)
    found = median_seconds(lambda: target.copy_(source))
    return {**found, "bytes_per_s": 2 * COPY / found["median_s"]}


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    card = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {"gpu": card.name, "capability": f"{card.major}.{card.minor}"}
    report["copy"] = copy()
    report["gemm"] = {
        "float32": gemm(torch.float32),
        "tf32": gemm(torch.float32, tf32=True),
        "bfloat16": gemm(torch.bfloat16),
        "float16": gemm(torch.float16),
        "float64": gemm(torch.float64),
    }
    for name, found in (("copy", report["copy"]), *report["gemm"].items()):
        rate = found.get("bytes_per_s") or found["flop_per_s"]
        print(f"{name:10} {rate:.4g} {'byte/s' if 'bytes_per_s' in found else 'flop/s'}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
