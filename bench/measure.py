# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: interleaved timing, peak memory, a description of the machine, JSON and tables.

The rules (README.md in this folder): a benchmark checks that its peers are right before it times them and refuses
otherwise; peers run in turn, in one process, so that a machine that slows down slows them all; figures are medians
with their smallest and largest value.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import clock
import torch
from rich.console import Console
from rich.table import Table

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)


class Refused(RuntimeError):
    """A correctness check failed, so there is nothing to time."""


# -- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition, in the order they ran (so that those of two peers can be paired)."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def __add__(self, other: "Timing") -> "Timing":
        """Repetition by repetition, as when both parts had run one after the other."""
        return Timing(tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=True)))

    def __sub__(self, other: "Timing") -> "Timing":
        """Repetition by repetition: what the rest took."""
        return Timing(tuple(a - b for a, b in zip(self.seconds, other.seconds, strict=True)))

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """Median, smallest and largest of this time over the other's in the same repetition."""
        pairs = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return median(pairs), min(pairs), max(pairs)

    def quickest_ratio(self, other: "Timing") -> float:
        """The shortest time over the other's shortest. Whatever else the machine does only ever adds."""
        return min(self.seconds) / min(other.seconds)

    def as_dict(self) -> dict[str, Any]:
        few = len(self.seconds) < 2
        low, _, high = [self.median] * 3 if few else quantiles(self.seconds, n=4, method="inclusive")
        spread = {"min": min(self.seconds), "max": max(self.seconds), "quartiles": [low, high]}
        digits = [float(f"{seconds:.5g}") for seconds in self.seconds]  # the clock is not better than that
        return {"median": self.median, **spread, "all": digits}


def synchronise(device: str) -> None:
    """Wait for the device: CUDA calls return before their work is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def quick_collections():
    """What is there already is left out of collections, which otherwise take longer than many a peer."""
    frozen = gc.get_freeze_count() > 0  # by whoever called: it stays so
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def interleaved(
    peers: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    warm_up: int = 1,
    device: str = "cpu",
    each: int = 1,
) -> dict[str, Timing]:
    """The peers in turn, `repetitions` times. The order rotates, so that nobody always runs after the same peer.

    `each`: how often a call does the work that is timed.
    """
    names, card = list(peers), clock.card_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with quick_collections():
        for repetition in range(-warm_up, repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                spent = clock.seconds_of(peers[name], card)
                if repetition >= 0:
                    seconds[name].append(spent / each)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def gemm_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """GFLOP per second of a square product, the best of three; float32 without TF32, as torch has it by default."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    timing = interleaved({"gemm": lambda: a @ b}, 3, device=device)["gemm"]
    return 2 * size**3 / min(timing.seconds) / 1e9


# -- memory ----------------------------------------------------------------------------------------------------------


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def memory_now(device: str) -> int:
    """Bytes in use: of the device for CUDA, else resident in this process, freed memory given back first."""
    gc.collect()
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed; it would hide the next peak
    except (OSError, AttributeError):
        pass
    return _status("VmRSS") or peak_memory(device)


def reset_peak(device: str) -> bool:
    """Forget the peak so far; False where the system cannot."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory(device: str) -> int:
    """Largest number of bytes in use since `reset_peak`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where it can be helped: it is never reset, and a child inherits its parent's.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saved_bytes(forward: Callable[[], object], resident: Iterable[torch.Tensor]) -> int:
    """What autograd keeps for the backward of `forward`: bytes of distinct storages that are not `resident` ones."""
    known = {tensor.untyped_storage().data_ptr() for tensor in resident}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor  # held, so that its address is nobody else's meanwhile
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def run_child(arguments: Sequence[str]) -> dict[str, Any]:
    """A benchmark in a process of its own, for its peak memory; its last line of output is JSON."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the child process ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# -- where and with what ---------------------------------------------------------------------------------------------


def _cpu() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    flags = " ".join(flag for flag in facts.get("flags", "").split() if flag in wanted)
    return {"cpu": facts.get("model name") or platform.processor() or platform.machine(), "cpu_flags": flags}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Of the last minute."""
    return round(os.getloadavg()[0], 2)


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on. `gpu` is None unless this very run used one."""
    gpu = None
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        gpu = {
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory,
            "multiprocessors": card.multi_processor_count,
        }
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    where = {**_cpu(), "cores": os.cpu_count(), "usable_cores": usable_cores(), "memory_bytes": pages}
    return {**where, "threads": torch.get_num_threads(), "device": device, "gpu": gpu}


def versions() -> dict[str, Any]:
    """Of everything that takes part."""
    import osora

    build = osora.build_info()
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("peft", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    wanted = ("version", "commit", "compiler", "cuda", "cuda_version", "cublas", "cusolver")
    return {**found, "osora": {name: build.get(name) for name in wanted}}


def check_device(device: str) -> str:
    """The device's name, or Refused where it is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Refused("there is no CUDA device here: nothing was measured")
    return device


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def shape_of(text: str) -> tuple[int, int]:
    """out_features and in_features from an argument such as 4096x4096."""
    d, cross, k = text.lower().replace("×", "x").partition("x")
    if not (cross and d.isdigit() and k.isdigit() and int(d) and int(k)):
        raise argparse.ArgumentTypeError(f"a shape is written 4096x4096 (out_features x in_features), got {text!r}")
    return int(d), int(k)


# -- what a run leaves and shows -------------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Whole or not at all: written beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
        try:
            json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def write_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(descriptor)
    try:
        figure.savefig(unfinished)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    console.print(f"drawn to {path.name}")


def append_line(facts: Mapping[str, Any], path: Path | None = None) -> None:
    """One line of JSON at the end of a file, there as soon as this returns: what comes later may be killed.

    `path` is $OSORA_RESULTS_JSONL unless given; without either nothing is written. What is not finite becomes text.
    """
    path = path or Path(os.environ.get("OSORA_RESULTS_JSONL", ""))
    if path != Path(""):
        finite = json.loads(json.dumps(facts, ensure_ascii=False, default=str), parse_constant=str)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


class Run:
    """One run of a benchmark: what it is about, under what load it ran, its JSON file, and a line for each case."""

    def __init__(self, name: str, device: str, settings: Mapping[str, Any], lines: Path | None = None) -> None:
        self.name, self.device, self.lines = name, device, lines
        self.began, self.load_before = datetime.now(timezone.utc), load_average()
        self.content: dict[str, Any] = {"benchmark": name, "date": f"{self.began:%Y-%m-%dT%H:%M:%SZ}"}
        self.content |= {"settings": dict(settings), "machine": machine(device), "versions": versions()}
        append_line(self.content, lines)

    def case(self, result: Mapping[str, Any]) -> None:
        """One case has ended; `finish` gets it too, if the run comes so far."""
        append_line({"benchmark": self.name, "case": result}, self.lines)

    def finish(self, results: Mapping[str, Any], folder: Path | None = None) -> Path:
        """Write everything; say where, and whether other work was running."""
        self.content["load_average"] = {"before": self.load_before, "after": load_average()}
        self.content |= results
        append_line(
            {"benchmark": self.name, "finished": True, "load_average": self.content["load_average"]}, self.lines
        )
        path = (folder or RESULTS) / f"{self.name}-{self.began:%Y%m%dT%H%M%SZ}.json"
        write_json(path, self.content)
        where = self.content["machine"]
        console.print(f"{(where['gpu'] or {}).get('name') or where['cpu']}, {where['threads']} CPU threads,", end=" ")
        console.print(f"torch {torch.__version__}, load average {self.load_before} before", end=" ")
        console.print(f"and {self.content['load_average']['after']} after")
        if self.load_before > 0.25 * usable_cores():
            console.print("[yellow]Other work was running when this began: do not quote its times.[/]")
        console.print(f"written to {path.name}")
        return path


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str | None]]) -> None:
    """A table whose first column is text; a row of None draws a line."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        if row[0] is None:
            grid.add_section()
        else:
            grid.add_row(*row)
    console.print(grid)


def show_seconds(timing: Timing) -> str:
    """Median, smallest and largest in a unit that suits them."""
    unit, name = (1, "s") if timing.median >= 1 else (1e3, "ms")
    low, high = min(timing.seconds) * unit, max(timing.seconds) * unit
    return f"{timing.median * unit:.3g} {name} ({low:.3g}-{high:.3g})"


def show_ratio(ratio: tuple[float, float, float]) -> str:
    """Median, smallest and largest."""
    return "{:.3f} ({:.3f}-{:.3f})".format(*ratio)


def show_bytes(count: float) -> str:
    """In kB, MB or GB (powers of ten)."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u or n == "kB")
    return f"{count / unit:.3g} {name}"
