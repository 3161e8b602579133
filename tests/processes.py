# SPDX-License-Identifier: Apache-2.0
"""A function on several processes that talk by gloo, on the CPU. What fails in one fails the test, and none stays."""

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

SECONDS = 300  # for everything, start included: a machine may be busy


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
        _enter, (count, str(folder), function, arguments), nprocs=count, join=False, start_method="spawn"
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
