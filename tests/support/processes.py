# SPDX-License-Identifier: Apache-2.0
"""A program in a process of its own, and a function on several that talk by gloo, on the CPU.

What fails in one fails the test, and none stays. They are forked from a server that has imported what nearly all of
them need, and done nothing else: five seconds of work for each process otherwise. A test of what an import does, or
of how much memory there is at first, runs a new interpreter: helpers.run_python.
"""

import contextlib
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

SECONDS = 300  # for everything, start included: a machine may be busy
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(START)
if START == "forkserver":
    # What cannot be imported is passed over.
    CONTEXT.set_forkserver_preload(["helpers", "osora", "transformers.models.llama.modeling_llama", "accelerate"])


def _program(program: str, arguments: tuple[str, ...], threads: int, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    sys.argv = ["-c", *arguments]
    with open(f"{folder}/output", "w", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        try:
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        except BaseException:
            Path(folder, "error").write_text(traceback.format_exc(), encoding="utf-8")
            raise SystemExit(1) from None


def run_program(folder: Path, program: str, *arguments: object) -> str:
    """Run a program in another process with this one's threads and environment; give back what it printed."""
    words = tuple(map(str, arguments))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        process = CONTEXT.Process(
            target=_program, args=(program, words, torch.get_num_threads(), dict(os.environ), scratch)
        )
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"the program has not ended after {SECONDS} seconds")
        error = Path(scratch, "error")
        assert process.exitcode == 0, error.read_text(encoding="utf-8")[-4000:] if error.exists() else process.exitcode
        return Path(scratch, "output").read_text(encoding="utf-8")


def _enter(rank: int, count: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch.distributed itself
    if Path("/sys/class/net/lo").exists():  # else gloo asks for the host's name, which need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
        distributed.barrier()  # nobody leaves while another still talks to it
    finally:
        distributed.destroy_process_group()


def on_processes(folder: Path, function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What `function(rank, *arguments)` gave on each of `count` processes, one thread each.

    The function must be one of a module. Skips where torch has no gloo.
    """
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    context = multiprocessing.start_processes(
        _enter, (count, str(folder), function, arguments), nprocs=count, join=False, start_method=START
    )
    try:
        end = time.monotonic() + SECONDS
        while not context.join(timeout=1):  # raises what a process raised
            if time.monotonic() > end:
                pytest.fail(f"the processes have not ended after {SECONDS} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
