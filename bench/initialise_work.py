# SPDX-License-Identifier: Apache-2.0
"""What bench/initialise.py times, each in a process of its own, and what it checks before.

  python bench/initialise_work.py '{"kind": "initialise", ...}'

The process says "ready" when it has imported everything (and loaded the model, where its kind wants one), begins when
it is sent a line, and prints what it found as its last line of output, in JSON.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from initialise_checkpoint import Checkpoint
from torch import nn

import osora
from osora.files.basis import BasisFolder

SAMPLES = 0.02  # seconds between two looks at the memory
_READ = 2**24  # bytes at a time
# Orthonormality of vectors that were rounded to bfloat16, of which each entry is off by 2⁻⁹ of itself at the most.
ORTHONORMAL = 1e-2


@dataclass(frozen=True)
class Task:
    """What a process does."""

    kind: str
    checkpoint: str
    rank: int
    tol: float
    seed: int
    threads: int
    basis: str = ""
    """The folder that is written, or read."""
    part: str | None = None
    cold: bool = True
    """Whether the checkpoint's files are to be read from the disk, not from the system's memory."""

    @property
    def config(self) -> osora.OsoraConfig:
        """For osora."""
        return osora.OsoraConfig(r=self.rank, tol=self.tol, seed=self.seed)


def forget(folder: str | os.PathLike[str]) -> None:
    """Drop a folder's files from the system's memory, where the system takes such advice."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous() -> int:
    """Bytes of this process that are no file's: what it really takes. 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Peak:
    """The largest `anonymous()` while it is entered."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLES):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous())


# -- what a process does -----------------------------------------------------------------------------------------------


def load(task: Task) -> nn.Module:
    """The model, every weight in memory of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def initialise(task: Task) -> Callable[[], dict[str, Any]]:
    import transformers  # noqa: F401  (whose import is no part of the time; LlamaForCausalLM is found by its name)
    from transformers import LlamaForCausalLM  # noqa: F401

    def work() -> dict[str, Any]:
        done = osora.initialise(
            task.checkpoint, task.basis, task.config, part=task.part, device="cpu", threads=task.threads, progress=False
        )
        return {
            "times": asdict(done.times) | {"hidden": done.times.hidden},
            "fingerprint": done.fingerprint,
            "layers": len(done.computed),
        }

    return work


def attach(task: Task) -> Callable[[], dict[str, Any]]:
    model = load(task)

    def work() -> dict[str, Any]:
        osora.attach(model, task.config, progress=False)
        return {}

    return work


def reuse(task: Task) -> Callable[[], dict[str, Any]]:
    model = load(task)

    def work() -> dict[str, Any]:
        osora.attach(model, task.config, basis=task.basis, progress=False)
        return {}

    return work


def pissa(task: Task) -> Callable[[], dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    model = load(task)

    def work() -> dict[str, Any]:
        config = LoraConfig(
            r=task.rank, lora_alpha=task.rank, init_lora_weights="pissa_niter_16", target_modules="all-linear"
        )
        get_peft_model(model, config)
        return {}

    return work


def read(task: Task) -> Callable[[], dict[str, Any]]:
    """The checkpoint's bytes, and nothing else."""
    piece = bytearray(_READ)

    def work() -> dict[str, Any]:
        total = 0
        for path in sorted(Path(task.checkpoint).glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(piece):
                    total += count
        return {"bytes": total}

    return work


KINDS = {"initialise": initialise, "attach": attach, "reuse": reuse, "pissa_niter_16": pissa, "read": read}


def main(task: Task) -> dict[str, Any]:
    """Prepare, wait for the word, work."""
    torch.set_num_threads(task.threads)
    work = KINDS[task.kind](task)
    imported = anonymous()
    print("ready", flush=True)
    sys.stdin.readline()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with Peak() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.monotonic()  # one clock for all processes
        facts = work()
        ended = time.monotonic()
    after = resource.getrusage(resource.RUSAGE_SELF)
    facts |= {"began": began, "ended": ended, "anonymous_before": imported, "anonymous_peak": peak.bytes}
    return facts | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def together(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What the processes of some tasks found, all of which begin at the same time."""
    with ExitStack() as stack:
        processes = []
        for task in tasks:
            words = [sys.executable, __file__, json.dumps(asdict(task))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(words, text=True, **pipes)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            while (line := process.stdout.readline()) and line.strip() != "ready":
                pass
        if any(task.cold for task in tasks):
            forget(tasks[0].checkpoint)
        for process in processes:
            if process.poll() is None:
                process.stdin.write("begin\n")
                process.stdin.flush()
        found = []
        for process in processes:
            out, err = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"a process ended with {process.returncode}:\n{err[-2000:]}")
            found.append(json.loads(out.strip().splitlines()[-1]))
    return found


# -- what is checked before --------------------------------------------------------------------------------------------


def check(made: Checkpoint, task: Task) -> tuple[dict[str, Any], list[str]]:
    """Make the basis and compare it: with the weights in float64, with what is known, and with `osora.attach`.

    Returns what was found, and what is wrong with it.
    """
    done = osora.initialise(
        made.folder, task.basis, task.config, device="cpu", threads=task.threads, progress=False, unconverged="warn"
    )
    found, basis, wrong = osora.check_basis(task.basis, made.folder, sample=None), BasisFolder(task.basis), []
    for layer in found.measured:
        if not layer.ok:
            wrong.append(f"{layer.name}: its residual is {layer.residual:.1e}, and {layer.allowed:.1e} is certified")
        if not layer.orthonormal <= ORTHONORMAL:
            wrong.append(f"{layer.name}: its vectors are orthonormal only to {layer.orthonormal:.1e}")
    sigma = 0.0
    for name, layer in basis.layers.items():
        known, S = made.known[layer.entry.out_features, layer.entry.in_features], basis.read(name).S.double()
        true = torch.tensor(known.sigma[: len(S)], dtype=torch.float64)
        share = float(((S - true).abs() / (known.rounding + 100 * task.tol**2 * true)).max())
        sigma = max(sigma, share)
        if not share <= 1:
            wrong.append(f"{name}: a singular value is off by {share:.1f} times what rounding to bfloat16 allows")
    model = load(task)
    osora.attach(model, task.config, progress=False)
    for name in basis.layers:
        kept, layer = basis.read(name), model.get_submodule(name)
        for kind, here, there in (("U", layer.U, kept.U), ("S0", layer.S0, kept.S), ("V", layer.V, kept.V)):
            if not torch.equal(here, there):
                wrong.append(f"{name}: {kind} of the basis is not what osora.attach has on the loaded model")
    facts = {
        "layers": found.layers,
        "fingerprint": done.fingerprint,
        "worst_residual": max(layer.residual for layer in found.measured),
        "orthonormal": max(layer.orthonormal for layer in found.measured),
        "unconverged": len(done.unconverged),
        "sigma_error_over_rounding": sigma,
        "bytes": sum(path.stat().st_size for path in Path(task.basis).iterdir()),
    }
    return facts, wrong


def plan(task: Task) -> osora.InitialisationPlan:
    """Bytes and operations, as osora counts them."""
    return osora.plan_initialisation(task.checkpoint, task.basis, task.config, device="cpu")


if __name__ == "__main__":
    print(json.dumps(main(Task(**json.loads(sys.argv[1])))))
