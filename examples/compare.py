# SPDX-License-Identifier: Apache-2.0
"""OSoRA, its ablations, SORSA, LoRA, PiSSA, VeRA and DoRA on the same models, rows, seeds and steps: a table, a figure.

`python examples/compare.py --help` says what can be chosen; docs/compare.md has what came out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is ever downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

try:
    import matplotlib  # noqa: F401  (used at the very end; its absence should be noticed now)
    import peft  # noqa: F401
    import rich  # noqa: F401
    import torch
    import transformers
except ModuleNotFoundError as missing:
    sys.exit(
        f"This example needs the package {missing.name!r}. Install what it uses with: pip install 'osora[demo]' peft"
    )

import compare_assets
import compare_report
import compare_timings
from chat_data import DataError
from compare_cells import OutOfTime, compare, result_of
from compare_methods import MAIN, METHODS
from compare_tasks import TASKS
from demo_assets import DemoAssetError

DESCRIPTION = """\
Train OSoRA, its ablations, SORSA, LoRA, PiSSA, VeRA and DoRA on the same real models, rows, seeds and steps.
For each method the learning rate is searched on validation rows; the test rows are for the rate that was best there.
Each run is a file below OUTPUT/cells: the same command goes on where it was stopped."""
EPILOG = """\
what is written to OUTPUT: cells/ (a JSON file a run), timings/ (by --timings), comparison.md, comparison.json,
comparison.png (of all that is there so far).
exit code: 0 all that was asked for is there, 2 wrong request or data, 3 out of --minutes: give the command again."""
METHODS_NOTE = f" (default: all; SmolLM2 in the default size: {', '.join(MAIN)})"
UNFINISHED = 3


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=", ".join(METHODS) + METHODS_NOTE)
    add("--size", choices=("default", "full"), default="default", help="full: for a large machine, hours to days")
    add("--gsm8k", type=Path, metavar="FILE", help="GSM8K's train split as JSONL (default: part of the test split)")
    add("--wordnet", type=Path, metavar="FOLDER", default=compare_assets.WORDNET, help="holds data.noun")
    add("--output", type=Path, default=Path("build/compare"), help="folder for the results (default: build/compare)")
    add(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="runs at the same time, on a thread each",
    )
    add("--minutes", type=float, metavar="M", help="start no run after so long")
    add("--timings", action="store_true", help="measure times and memory instead; the machine must be idle")
    add("--report", action="store_true", help="only write the table and the figure again, of the files that are there")
    add("--time-one", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)  # how --timings calls itself
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.gsm8k is not None and not arguments.gsm8k.is_file():
        parser.error(f"--gsm8k: there is no file {arguments.gsm8k}")
    return arguments


def methods_of(task: str, arguments: argparse.Namespace) -> list[str]:
    """What was asked for. A language model's run is long: by default it has the main methods alone."""
    if arguments.methods is not None:
        return arguments.methods
    return list(MAIN if task == "smollm2" and arguments.size == "default" else METHODS)


def make_task(name: str, arguments: argparse.Namespace) -> object:
    """The task, its model and its rows loaded."""
    return TASKS[name](arguments.size, arguments.wordnet if name == "encoder" else arguments.gsm8k)


def say(line: str) -> None:
    """A line of progress."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def work_here(arguments: argparse.Namespace) -> bool:
    """Run the cells in this process. False if the time did not suffice."""
    torch.set_num_threads(1)  # small products: threads would only wait for each other
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    may_start: Callable[[], bool] = lambda: end is None or time.monotonic() < end  # noqa: E731
    try:
        for name in arguments.tasks:
            task = make_task(name, arguments)
            for method in methods_of(name, arguments):
                compare(task, METHODS[method], lambda cell: result_of(cell, arguments.output, say, may_start))
    except OutOfTime:
        return False
    return True


def command_for(arguments: argparse.Namespace, *more: str) -> list[str]:
    """This script again, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--size", arguments.size, "--jobs", "1"]
    command += ["--output", str(arguments.output), "--wordnet", str(arguments.wordnet)]
    if arguments.gsm8k is not None:
        command += ["--gsm8k", str(arguments.gsm8k)]
    return [*command, *more]


def work_apart(arguments: argparse.Namespace) -> bool:
    """A process for each method on each task, some at a time."""
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes

    def one(pair: tuple[str, str]) -> int:
        left = [] if end is None else ["--minutes", f"{max(0.0, end - time.monotonic()) / 60:.3f}"]
        command = command_for(arguments, "--tasks", pair[0], "--methods", pair[1], *left)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, check=False).returncode

    pairs = [(task, method) for task in arguments.tasks for method in methods_of(task, arguments)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(one, pairs))
    if failed := [pair for pair, code in zip(pairs, codes, strict=True) if code not in (0, UNFINISHED)]:
        raise DataError(f"these runs failed, see above: {', '.join(' '.join(pair) for pair in failed)}")
    return UNFINISHED not in codes


def main(argv: Sequence[str] | None = None) -> int:
    """See EPILOG for the exit codes."""
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks for the old name
    try:
        if arguments.time_one:
            task, method = arguments.time_one
            compare_timings.print_one(make_task(task, arguments), METHODS[method])
            return 0
        finished = True
        if arguments.timings:
            chosen = {task: methods_of(task, arguments) for task in arguments.tasks}
            compare_timings.measure(chosen, arguments.output, lambda *more: command_for(arguments, *more), say)
        elif not arguments.report:
            finished = (work_here if arguments.jobs == 1 else work_apart)(arguments)
        if arguments.jobs > 1 or arguments.timings or arguments.report or finished:
            compare_report.write(arguments.output)
        return 0 if finished else UNFINISHED
    except (DataError, DemoAssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
