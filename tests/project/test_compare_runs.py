# SPDX-License-Identifier: Apache-2.0
"""The comparison is stopped, killed, damaged and taken up again: what is done counts once, and in the same order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from root import ROOT

for package in ("matplotlib", "peft", "rich", "tokenizers", "transformers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for it
SOME = ("base", "osora", "lora")


def command(output, *more):
    script = str(ROOT / "examples/compare.py")
    return [sys.executable, script, "--size", "tiny", "--output", str(output), "--methods", *SOME, *more]


def results(path):
    """(what it is about, everything else), in the order of the file."""
    found = [json.loads(line).get("result") for line in path.read_text(encoding="utf-8").splitlines()]
    names = ("method", "stage", "rate", "seed")
    return [(tuple(result[name] for name in names), result) for result in found if result]


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """A folder with all runs."""
    folder = tmp_path_factory.mktemp("whole")
    assert example("compare").main([*command(folder)[2:], "--jobs", "1"]) == 0
    return folder


def test_all_methods_have_a_run_before_any_has_the_next(whole):
    runs = [which for which, _ in results(whole / "cells.jsonl")]
    assert [method for method, *_ in runs[:6]] == [*SOME, *SOME]
    assert {stage for _, stage, *_ in runs[:6]} == {"search"}
    seeds = [seed for _, stage, _, seed in runs if stage == "final"]
    assert seeds == [1] * len(SOME)  # seed 0 is the search's best
    assert "Not there yet" not in (whole / "comparison.md").read_text(encoding="utf-8")
    rows = json.loads((whole / "comparison.json").read_text(encoding="utf-8"))["tasks"]["encoder"]
    assert [row["seeds"] for row in rows] == [[0, 1]] * len(SOME)
    assert "A rehearsal, no figure" in (whole / "comparison.md").read_text(encoding="utf-8")


def test_killed_in_the_middle_it_goes_on(example, whole, tmp_path):
    cells = tmp_path / "cells.jsonl"
    process = subprocess.Popen(command(tmp_path, "--jobs", "2"), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (cells.exists() and len(results(cells)) >= 3):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    for worker in workers:  # they end with their parent
        deadline = time.monotonic() + 60
        while alive(worker):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    before = cells.read_text(encoding="utf-8")
    assert run(example, tmp_path) == 0
    assert cells.read_text(encoding="utf-8").startswith(before)  # nothing is done again
    again, expected = results(cells), results(whole / "cells.jsonl")
    assert len(again) == len(expected) and dict(again) == dict(expected)


def children_of(number):
    found = []
    for path in os.listdir("/proc"):
        if path.isdigit():
            try:
                with open(f"/proc/{path}/stat", encoding="utf-8") as file:
                    if int(file.read().rpartition(")")[2].split()[1]) == number:
                        found.append(int(path))
            except OSError:
                continue
    return found


def alive(number):
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(example, output, *more):
    return example("compare").main([*command(output)[2:], "--jobs", "1", *map(str, more)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: line.replace('"loss": 4', '"loss": 3', 1),
        lambda line: line.replace('"seed": 0', '"seed": 1', 1),
        lambda line: line[:40] + "\udcff" + line[41:],
        lambda line: "[1, 2]",
        lambda line: '{"digest": 3}',
        lambda line: "null",
    ],
    ids=["cut", "another loss", "another seed", "no UTF-8", "a list", "nothing in it", "null"],
)
def test_a_damaged_line_is_set_aside_and_its_run_done_again(example, whole, tmp_path, capsys, damage):
    lines = (whole / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    spoilt = damage(lines[2])
    assert spoilt != lines[2]
    text = "\n".join([*lines[:2], spoilt, *lines[3:]]) + "\n"
    (tmp_path / "cells.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert run(example, tmp_path) == 0
    shown = capsys.readouterr().out
    assert shown.count("line 3 is damaged and set aside: its run will be done again") == 1
    assert shown.count(" seed ") == 1  # one run
    found = example("compare_store").Store(tmp_path / "cells.jsonl").results
    assert {which: found[which] for which in sorted(found, key=str)} == {
        which: result
        for which, result in sorted(example("compare_store").Store(whole / "cells.jsonl").results.items(), key=str)
    }


def test_what_was_cut_in_its_last_line_is_no_part_of_the_next(example, whole, tmp_path):
    text = (whole / "cells.jsonl").read_text(encoding="utf-8")
    (tmp_path / "cells.jsonl").write_text(text[:-30], encoding="utf-8")
    assert run(example, tmp_path) == 0
    lines = (tmp_path / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["result"] == json.loads(text.splitlines()[-1])["result"]
    assert len(lines) == len(text.splitlines()) + 1


def test_earlier_results_are_taken_over(example, whole, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    lines = (whole / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for folder, part in ((first, lines[:5]), (second, [*lines[4:9], '{"torn'])):
        folder.mkdir()
        (folder / "cells.jsonl").write_text("".join(part), encoding="utf-8")
    out = tmp_path / "out"
    assert run(example, out, "--resume", first, second / "cells.jsonl", "--minutes", 0) == 3
    shown = capsys.readouterr().out
    assert "4 results of cells.jsonl are taken over" in shown and "line 6 is damaged" in shown  # one line says what
    assert dict(results(out / "cells.jsonl")) == dict(results(whole / "cells.jsonl")[:8])
    assert run(example, out) == 0
    assert dict(results(out / "cells.jsonl")) == dict(results(whole / "cells.jsonl"))


def test_a_part_is_reported_with_what_is_missing(example, whole, tmp_path):
    lines = (whole / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:3]), encoding="utf-8")  # what was asked for, and two runs
    assert run(example, tmp_path, "--report") == 0
    report = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in report["tasks"]["encoder"]] == ["base", "osora"]
    assert [row["seeds"] for row in report["tasks"]["encoder"]] == [[0], [0]]
    assert (tmp_path / "comparison.png").exists()
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for line in report["missing"]["encoder"]:
        assert f"- {line}\n" in table
    assert [line.partition(":")[0] for line in report["missing"]["encoder"]] == ["no adapter", "OSoRA", "LoRA"]
    assert "LoRA: rates 1.0e-03, 3.2e-03 of the search, then seeds" in table
    # All but the last seed of the last method.
    (tmp_path / "cells.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    assert run(example, tmp_path, "--report") == 0
    assert json.loads((tmp_path / "comparison.json").read_text())["missing"]["encoder"] == ["LoRA: seeds 1"]


def test_nothing_at_all_is_no_report(example, tmp_path, capsys):
    assert run(example, tmp_path, "--report") == 2
    assert "there are no results in" in capsys.readouterr().err
    assert not (tmp_path / "comparison.md").exists()


def test_a_run_that_fails_is_named_and_the_others_go_on(example, tmp_path):
    """In processes of their own: the file for `osora`'s class is one that refuses."""
    for path in (ROOT / "examples").glob("*.py"):
        shutil.copy(path, tmp_path)
    methods = (tmp_path / "compare_methods.py").read_text(encoding="utf-8")
    broken = methods.replace(
        "def config(targets: list[str], seed: int) -> Any:", "def config(targets, seed):\n        1 / 0"
    )
    assert broken != methods
    (tmp_path / "compare_methods.py").write_text(broken, encoding="utf-8")
    words = command(tmp_path / "out", "--jobs", "2")
    words[1] = str(tmp_path / "compare.py")
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "these runs failed, see above: encoder lora search" in done.stderr and "ZeroDivisionError" in done.stderr
    runs = {which[0] for which, _ in results(tmp_path / "out/cells.jsonl")}
    assert runs == {"base", "osora"}
    assert "LoRA: rates" in (tmp_path / "out/comparison.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_no_result(example, tmp_path, capsys):
    assert run(example, tmp_path, "--device", "cuda") == 2
    assert "there is no CUDA device here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_time_is_kept(example, tmp_path):
    """A run that would not be over in time is not begun, as far as those before can tell."""
    store = example("compare_store").Store(tmp_path / "cells.jsonl")
    about = dict.fromkeys(example("compare_store").WHICH, "x")
    for method, seconds in (("osora", 3.0), ("osora", 5.0), ("lora", 9.0)):
        store.put({**about, "task": "encoder", "method": method, "seed": seconds}, seconds)
    assert store.expected("encoder", "osora") == 5 and store.expected("encoder", "dora") == 9
    assert store.expected("smollm2", "osora") == 0
    clock = example("compare_work").Clock
    assert clock(None).allows(1e9) and clock(1).allows(5) and not clock(1).allows(61)


def test_a_card_has_its_own_results(example):
    """Settings say where and in which dtype: results of a card and of a CPU are not mixed."""
    task = example("compare_tasks").EncoderTask("tiny", None)
    cells, methods = example("compare_cells"), example("compare_methods").METHODS
    here = cells.Cell(task, methods["osora"], 1e-3, 0, "search").key()
    task.device = "cuda:0"
    there = cells.Cell(task, methods["osora"], 1e-3, 0, "search").key()
    assert here != there and task.settings()["device"] == "cuda"
