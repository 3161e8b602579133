# SPDX-License-Identifier: Apache-2.0
"""OSoRA, its ablations, SORSA, LoRA, PiSSA, VeRA and DoRA on the same models, rows, seeds and steps: a table, a figure.

`python examples/compare.py --help` says what can be chosen; docs/compare.md has what came out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is ever downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

try:
    import matplotlib  # noqa: F401  (used at the very end; its absence should be noticed now)
    import peft  # noqa: F401
    import rich  # noqa: F401
    import torch
    import transformers  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(
        f"This example needs the package {missing.name!r}. Install what it uses with: pip install 'osora[demo]' peft"
    )

import compare_assets
import compare_report
import compare_store
import compare_timings
from chat_data import DataError
from compare_methods import MAIN, METHODS
from compare_store import Store
from compare_tasks import DTYPES, TASKS
from compare_work import be_quiet, make_task, work_apart, work_here
from demo_assets import DemoAssetError

DESCRIPTION = """\
Train OSoRA, its ablations, SORSA, LoRA, PiSSA, VeRA and DoRA on the same real models, rows, seeds and steps.
For each method the learning rate is searched on validation rows; the test rows are for the rate that was best there.
Each run is a line of CELLS as soon as it is over: the same command goes on where it was stopped. All methods have
their runs at one rate before any at the next, and at one seed before the next."""
EPILOG = """\
what is written to OUTPUT: cells.jsonl (a line for each run), timings/ (by --timings), comparison.md, comparison.json,
comparison.png (of all that is there so far, with what is missing).
exit code: 0 all that was asked for is there, 2 wrong request or data, or a run failed; 3 out of --minutes: give the
command again."""
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
    size = "card: for a GPU, minutes; full: for a large machine, hours to days; tiny: a rehearsal without packages"
    add("--size", choices=("default", "card", "full", "tiny"), default="default", help=size)
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=DTYPES, help="of the base (default: float32, of SmolLM2 on a GPU bfloat16)")
    add("--gsm8k", type=Path, metavar="FILE", help="GSM8K's train split as JSONL (default: part of the test split)")
    add("--wordnet", type=Path, metavar="FOLDER", default=compare_assets.WORDNET, help="holds data.noun")
    add("--output", type=Path, default=Path("build/compare"), help="folder for the results (default: build/compare)")
    cells = "the file of the results (default: OUTPUT/cells.jsonl)"
    add("--cells", type=Path, metavar="CELLS", help=cells)
    resume = "earlier results, cells.jsonl or a folder that holds one: what is whole in them is not run again"
    add("--resume", nargs="+", type=Path, metavar="EARLIER", default=[], help=resume)
    jobs = "runs at the same time, on a thread each (default: 2, on a GPU 6, where there are so many cores)"
    add("--jobs", type=int, metavar="N", help=jobs)
    add("--minutes", type=float, metavar="M", help="start no run that would not be over by then, as far as is known")
    add("--timings", action="store_true", help="measure times and memory instead; the machine must be idle")
    add("--report", action="store_true", help="only write the table and the figure again, of the files that are there")
    add("--time-one", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)  # how --timings calls itself
    arguments = parser.parse_args(argv)
    if arguments.jobs is None:
        arguments.jobs = min(6 if arguments.device.startswith("cuda") else 2, os.cpu_count() or 1)
    if arguments.cells is None:
        arguments.cells = arguments.output / compare_store.NAME
    arguments.resume = [path / compare_store.NAME if path.is_dir() else path for path in arguments.resume]
    if arguments.size == "tiny":
        arguments.tasks = ["encoder"]
    for path in arguments.resume:
        if not path.is_file():
            parser.error(f"--resume: there is no file {path}")
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


def say(line: str) -> None:
    """A line of progress."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def command_for(arguments: argparse.Namespace, *more: str) -> list[str]:
    """This script again, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--size", arguments.size, "--jobs", "1"]
    command += ["--device", arguments.device, *(["--dtype", arguments.dtype] if arguments.dtype else [])]
    command += ["--output", str(arguments.output), "--wordnet", str(arguments.wordnet)]
    if arguments.gsm8k is not None:
        command += ["--gsm8k", str(arguments.gsm8k)]
    return [*command, *more]


def work(arguments: argparse.Namespace, methods: dict[str, list[str]], store: Store) -> bool:
    """All runs that are not there yet. False if the time did not suffice."""
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here")
    for path in arguments.resume:
        say(f"{store.take_over(path)} results of {path.name} are taken over")
    for task, names in methods.items():
        store.ask(task, names)
    return (work_here if arguments.jobs == 1 else work_apart)(arguments, methods, store, say)


def main(argv: Sequence[str] | None = None) -> int:
    """See EPILOG for the exit codes."""
    arguments = parse_arguments(argv)
    be_quiet()
    methods = {task: methods_of(task, arguments) for task in arguments.tasks}
    try:
        if arguments.time_one:
            task, method = arguments.time_one
            compare_timings.print_one(make_task(task, arguments), METHODS[method])
            return 0
        store = Store(arguments.cells, say)
        try:
            finished = True
            if arguments.timings:
                compare_timings.measure(methods, arguments.output, lambda *more: command_for(arguments, *more), say)
            elif not arguments.report:
                finished = work(arguments, methods, store)
        finally:  # of what there is, also when a run failed
            if store.results:
                compare_report.write(arguments.output, store)
        if not store.results and finished:
            raise DataError(f"there are no results in {arguments.cells} yet")
        return 0 if finished else UNFINISHED
    except (DataError, DemoAssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
