# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison, one after the other in this process or several at a time in processes of their own.

What is done is in the store as soon as it is done, so whoever ends this loses only the runs under way.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import transformers
from chat_data import DataError
from compare_cells import Cell, run, shown
from compare_methods import METHODS
from compare_plan import Outline, in_order, outline_of
from compare_store import Store
from compare_tasks import TASKS

ATTEMPTS = 2  # at a run whose process is killed; it may have been killed for its neighbour

Say = Callable[[str], None]
Methods = Mapping[str, Sequence[str]]


def be_quiet() -> None:
    """Of transformers and PEFT, what is no news to anybody who compares methods."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks for the old name


class Clock:
    """How long runs may still be started."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, seconds: float) -> bool:
        """Something that takes so long."""
        return self.end is None or time.monotonic() + seconds < self.end


def make_task(name: str, arguments: argparse.Namespace) -> Any:
    """The task, its model and its rows loaded."""
    data = arguments.wordnet if name == "encoder" else arguments.gsm8k
    return TASKS[name](arguments.size, data, arguments.device, arguments.dtype)


def timed(cell: Cell) -> tuple[dict[str, Any], float]:
    """A run, and its seconds."""
    began = time.perf_counter()
    result = run(cell)
    if cell.task.device != "cpu":
        gc.collect()  # a model that is held by a circle holds memory of the card
    return result, time.perf_counter() - began


def work_here(arguments: argparse.Namespace, methods: Methods, store: Store, say: Say) -> bool:
    """False if the time did not suffice."""
    torch.set_num_threads(1)  # small products: threads would only wait for each other
    clock, tasks = Clock(arguments.minutes), [make_task(name, arguments) for name in arguments.tasks]
    while cells := in_order(tasks, methods, lambda cell: store.found(*cell.which())):
        if not clock.allows(store.expected(cells[0].task.name, cells[0].method.name)):
            return False
        result, seconds = timed(cells[0])
        store.put(result, seconds)
        say(f"{cells[0]}: {shown(result)}")
    return True


# -- in processes of their own -----------------------------------------------------------------------------------------

_ARGUMENTS: list[argparse.Namespace] = []
_TASKS: dict[str, Any] = {}


def start_worker(arguments: argparse.Namespace) -> None:
    """In a new process: one thread, and an end with its parent, even one that is killed."""
    torch.set_num_threads(1)
    be_quiet()
    _ARGUMENTS.append(arguments)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def task_here(name: str) -> Any:
    """Loaded once by each process that needs it."""
    if name not in _TASKS:
        _TASKS[name] = make_task(name, _ARGUMENTS[0])
    return _TASKS[name]


def outline_there(name: str) -> Outline:
    return outline_of(task_here(name))


def run_there(task: str, method: str, rate: float, seed: int, stage: str) -> tuple[dict[str, Any], float]:
    return timed(Cell(task_here(task), METHODS[method], rate, seed, stage))


class Workers:
    """Processes that take runs, started again when one of them is killed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a forked process has no CUDA
        return ProcessPoolExecutor(self.arguments.jobs, context, start_worker, (self.arguments,))

    def submit(self, cell: Cell) -> Future[tuple[dict[str, Any], float]]:
        what = (cell.task.name, cell.method.name, cell.rate, cell.seed, cell.stage)
        try:
            return self.pool.submit(run_there, *what)
        except BrokenProcessPool:  # every run that was under way says so by itself
            self.pool = self._start()
            return self.pool.submit(run_there, *what)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def work_apart(arguments: argparse.Namespace, methods: Methods, store: Store, say: Say) -> bool:
    """False if the time did not suffice. DataError, when all else is done, if a run failed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    clock, workers = Clock(arguments.minutes), Workers(arguments)
    running: dict[Future[tuple[dict[str, Any], float]], Cell] = {}
    attempts: dict[tuple[Any, ...], int] = {}
    failed: list[str] = []
    finished = True
    try:
        tasks = list(workers.pool.map(outline_there, arguments.tasks))
        while True:
            busy = {cell.which() for cell in running.values()}
            for cell in in_order(tasks, methods, lambda cell: store.found(*cell.which())):
                if len(running) == arguments.jobs:
                    break
                if cell.which() in busy or attempts.get(cell.which(), 0) >= ATTEMPTS:
                    continue
                if not clock.allows(store.expected(cell.task.name, cell.method.name)):
                    finished = False
                    continue
                running[workers.submit(cell)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    result, seconds = future.result()
                except BrokenProcessPool:
                    attempts[cell.which()] = attempts.get(cell.which(), 0) + 1
                    say(f"{cell}: its process was killed, or one beside it")
                except Exception as error:  # whatever it is, the others go on
                    attempts[cell.which()] = ATTEMPTS
                    traceback.print_exception(error)
                else:
                    store.put(result, seconds)
                    say(f"{cell}: {shown(result)}")
                if attempts.get(cell.which(), 0) >= ATTEMPTS:
                    failed.append(str(cell))
    finally:
        workers.close()
    if failed:
        raise DataError(f"these runs failed, see above: {'; '.join(failed)}")
    return finished
