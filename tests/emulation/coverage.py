# SPDX-License-Identifier: Apache-2.0
"""Which lines of csrc/cuda the tests run: `python tests/emulation/coverage.py BUILD [-- pytest arguments]`.

BUILD is a build folder with OSORA_CUDA=ON and OSORA_EMULATION=ON in which the target `osora_emulated_coverage` was
built. With `--`, its counters are set back and pytest runs on that library first, in processes that share the tests and
add up their counters. Lines count that g++ compiled: what nvcc alone sees (`#ifndef OSORA_EMULATED`) is not among them.
Exit status 1 below the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
OBJECTS = ("osora_emulated_coverage.dir", "osora_cuda_host_coverage.dir")
Counts = dict[Path, dict[int, int]]


def notes(build: Path) -> list[Path]:
    """What the compiler wrote about each object of the instrumented library."""
    found = [path for path in sorted(build.rglob("*.gcno")) if any(name in path.parts for name in OBJECTS)]
    if not found:
        sys.exit(f"{build} holds no instrumented library: build the target osora_emulated_coverage")
    return found


class Share:
    """Of the tests that pytest collects, every `jobs`-th is run."""

    def __init__(self, first: int, jobs: int) -> None:
        self.first, self.jobs = first, jobs

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.first :: self.jobs]


def run_tests(build: Path, jobs: int, arguments: list[str]) -> None:
    library = build / "tests/emulation/coverage"
    for note in notes(build):
        note.with_suffix(".gcda").unlink(missing_ok=True)
    threads = {"OMP_NUM_THREADS": "1"}  # a process for each core instead
    environment = {**os.environ, **threads, "OSORA_EMULATION_DIR": str(library), "OSORA_REQUIRE_EMULATION": "1"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(first)) for first in range(jobs)]
        shares = []
        for first, log in enumerate(logs):
            share = ["--share", str(first), "--jobs", str(jobs)]
            command = [sys.executable, __file__, str(build), *share, "--", *arguments]
            with open(log, "w", encoding="utf-8") as output:
                shares.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        statuses = [share.wait() for share in shares]
        for log in logs:
            print(log.read_text(encoding="utf-8"), end="", flush=True)
    if any(statuses):
        sys.exit(f"pytest ended with {' and '.join(map(str, statuses))}")


def count_lines(build: Path, gcov: str) -> Counts:
    """How often each line ran, over all objects, template instances and inlined copies."""
    counts: Counts = defaultdict(lambda: defaultdict(int))
    for note in notes(build):
        command = [gcov, "--json-format", "--stdout", note]
        done = subprocess.run(command, capture_output=True, text=True, cwd=note.parent)
        if done.returncode:
            sys.exit(f"gcov: {done.stderr}")
        for report in done.stdout.splitlines():
            described = json.loads(report)
            for file in described["files"]:
                path = Path(described["current_working_directory"], file["file"]).resolve()
                if not path.is_relative_to(SOURCES):
                    continue
                for line in file["lines"]:
                    counts[path][line["line_number"]] += line["count"]
    return counts


def spans(lines: list[int]) -> str:
    """1, 2, 3, 7 as "1-3 7"."""
    parts: list[list[int]] = []
    for line in lines:
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def report(counts: Counts) -> float:
    ran = known = 0
    for path in sorted(counts):
        missed = sorted(line for line, count in counts[path].items() if count == 0)
        lines = len(counts[path])
        ran, known = ran + lines - len(missed), known + lines
        share = 100 * (lines - len(missed)) / lines
        print(f"{path.relative_to(ROOT)!s:36} {lines - len(missed):5d} of {lines:5d}  {share:6.1f} %  {spans(missed)}")
    total = 100 * ran / known if known else 0.0
    print(f"{'all':36} {ran:5d} of {known:5d}  {total:6.1f} %")
    return total


def main() -> None:
    arguments, separator, tests = sys.argv[1:], "--" in sys.argv, []
    if separator:
        tests = arguments[arguments.index("--") + 1 :]
        arguments = arguments[: arguments.index("--")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--limit", type=float, default=98.0, help="percent of the lines of csrc/cuda")
    parser.add_argument("--gcov", default="gcov", help="of the compiler that built the library")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run the tests")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # run_tests: what this process does for it
    options = parser.parse_args(arguments)
    build = options.build.resolve()
    if options.share is not None:
        sys.path[0] = str(ROOT)  # as `python -m pytest` has it; this folder's coverage.py is not the package
        sys.exit(pytest.main(tests, plugins=[Share(options.share, options.jobs)]))
    if separator:
        run_tests(build, options.jobs, tests)
    if report(count_lines(build, options.gcov)) < options.limit:
        sys.exit(f"less than {options.limit:g} % of the lines of csrc/cuda ran")


if __name__ == "__main__":
    main()
