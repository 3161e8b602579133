# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share, the step of training, and the plan for a card."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from benches import BENCH, assert_complete, only_result, quick

import osora

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT and transformers, our peers

# -- step.py -----------------------------------------------------------------------------------------------------------


def test_step_checks_the_gradients_and_then_compares(bench, tmp_path, capsys):
    assert bench("step").main(quick(tmp_path, "--no-memory")) == 0
    result = only_result(tmp_path)
    assert_complete(result, "step")
    for part, itemsize in zip(result["results"], (4, 2), strict=True):
        assert part["layers"] == 14
        assert 0 < part["check"]["osora"]["grad_o"] <= part["check"]["tolerance"]
        peers = part["peers"]
        assert list(peers) == ["frozen", "osora", "op-by-op", "vera", "lora"]
        assert peers["frozen"]["trained"] == 0 < peers["osora"]["trained"] == peers["op-by-op"]["trained"]
        rows, rank, layers = 2 * 24, 8, 14
        assert peers["osora"]["saved_bytes"] - peers["frozen"]["saved_bytes"] == rows * rank * itemsize * layers
        # [n, d] of every layer, and h itself (and its product with S) beside it
        widths = 2 * (48 + 48 + 16 + 16 + 96 + 96 + 48)
        assert peers["op-by-op"]["saved_bytes"] - peers["frozen"]["saved_bytes"] >= rows * widths * itemsize
        assert all(set(peers[name]["over_frozen"]) == {"median", "min", "max"} for name in peers if name != "frozen")
        assert part["floor"]["linears"] > part["floor"]["with_head"] > 1
    assert "gradients are right" in capsys.readouterr().out


def test_step_measures_memory_in_processes_of_their_own(bench, tmp_path):
    arguments = quick(tmp_path, "--dtype", "float32", "--peers", "osora")
    assert bench("step").main(arguments) == 0
    (part,) = only_result(tmp_path)["results"]
    assert list(part["peers"]) == ["osora"]
    found = part["peers"]["osora"]["memory_bytes"]
    assert 2**24 < found["loaded"] and found["peak"] >= found["loaded"] - 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["s", "o"])
def test_step_refuses_wrong_gradients(bench, tmp_path, capsys, monkeypatch, dtype, which):
    right = osora.layers.OsoraLinear.forward

    def wrong(layer, x):  # the right values, but a gradient that is half as large again
        parameter = getattr(layer, which)
        bent = 1.5 * parameter - 0.5 * parameter.detach()
        y = right(layer, x)
        return y + (
            osora.ops.linear(
                x.detach(),
                None,
                None,
                layer.U,
                layer.V,
                layer.S0,
                *((bent, layer.o.detach()) if which == "s" else (layer.s.detach(), bent)),
            )
            - osora.ops.linear(x.detach(), None, None, layer.U, layer.V, layer.S0, layer.s.detach(), layer.o.detach())
        )

    monkeypatch.setattr(osora.layers.OsoraLinear, "forward", wrong)
    monkeypatch.setattr(bench("step"), "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert bench("step").main(quick(tmp_path, "--no-memory", "--dtype", dtype)) == 1
    shown = capsys.readouterr()
    assert f"grad_{which} is off by" in shown.err and "osora / this" not in shown.out
    assert list(tmp_path.iterdir()) == []


# -- what they share ---------------------------------------------------------------------------------------------------


def test_peers_take_turns_in_a_rotating_order(bench):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = bench("measure").interleaved(calls, 3, warm_up=1)
    assert "".join(order) in ("cababcbcacab",)
    assert all(len(times[name].seconds) == 3 for name in "abc")


def test_statistics(bench):
    Timing = bench("measure").Timing
    ours, theirs = Timing((1.0, 2.0, 9.0)), Timing((2.0, 2.0, 3.0))
    assert ours.ratio(theirs) == (1.0, 0.5, 3.0)  # of pairs that ran side by side, not of the medians
    assert (ours + theirs).seconds == (3.0, 4.0, 12.0) and (ours + theirs).median == 4.0
    facts = ours.as_dict()
    assert (facts["median"], facts["min"], facts["max"], facts["quartiles"]) == (2.0, 1.0, 9.0, [1.5, 5.5])
    assert Timing((2.0,)).as_dict()["quartiles"] == [2.0, 2.0]


def test_peak_memory_can_be_reset(bench):
    measure = bench("measure")
    size = 2**26
    before = measure.memory_now("cpu")
    if not measure.reset_peak("cpu"):
        pytest.skip("this system cannot reset the peak")
    block = torch.ones(size, dtype=torch.uint8)
    assert measure.peak_memory("cpu") - before > 0.9 * size
    del block
    now = measure.memory_now("cpu")
    measure.reset_peak("cpu")
    assert measure.peak_memory("cpu") - now < 0.5 * size


def test_a_result_is_written_whole_or_not_at_all(bench, tmp_path):
    path = tmp_path / "new" / "result.json"
    bench("measure").write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        bench("measure").write_json(path, {"a": [1, float("nan")]})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("name", ["init", "step"])
def test_wrong_requests(bench, tmp_path, capsys, name):
    main = bench(name).main
    assert main(["--model", str(tmp_path / "nothing"), "--output", str(tmp_path)]) == 1
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--rank", "0"])
    assert stopped.value.code == 2 and "--rank must be at least 1" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(quick(tmp_path, "--device", "cuda")) == 1
        assert "nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- gpu_check.sh ------------------------------------------------------------------------------------------------------


def gpu_check(python, output, *more):
    command = ["bash", BENCH / "gpu_check.sh", "--python", python, "--output", output, "--model", "tiny", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    return done, json.loads(output.read_text(encoding="utf-8")) if output.exists() else None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_without_a_gpu_says_so(tmp_path):
    stages = "machine,tests,sanitizer,rates,init,step,svd,linear"  # the build takes minutes
    done, report = gpu_check(sys.executable, tmp_path / "report.json", "--stages", stages)
    assert done.returncode == 3, done.stderr
    assert report["gpu"] is None and report["failed"] == [] and report["passed"] == ["machine"]
    reasons = {record["stage"]: record["skipped"] for record in report["stages"]}
    assert list(reasons) == ["machine", "build", "tests", "sanitizer", "rates", "init", "step", "svd", "linear"]
    assert reasons["build"] == "not chosen"
    assert all("no GPU" in reasons[name] for name in ("tests", "rates", "init", "step", "svd", "linear"))
    assert not any("measured" in record or "results" in record for record in report["stages"])
    assert "none, so nothing here says anything about one" in done.stdout
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_runs_every_stage_whatever_fails(tmp_path):
    # says that there is a GPU, and cannot build or test; what the benchmarks say for themselves is the next test's
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *sys.exit*cuda.is_available*) exit 0 ;;\n"
        '  *"-m pip"*|*"-m pytest"*) echo "made to fail"; exit 7 ;;\n'
        '  "bench/gpu_"*) ;;\n'
        '  "bench/"*) echo "made to refuse"; exit 1 ;;\n'
        "esac\n"
        'case "$*" in\n'
        f'  *) exec "{sys.executable}" "$@" ;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    done, report = gpu_check(fake, tmp_path / "report.json")
    assert done.returncode == 1
    codes = {record["stage"]: record["rc"] for record in report["stages"]}
    assert codes.pop("sanitizer") in (7, None)  # None: there is no compute-sanitizer here
    assert codes == {"machine": 0, "build": 7, "tests": 7, "rates": 1, "init": 1, "step": 1, "svd": 1, "linear": 1}
    tails = {record["stage"]: record["tail"] for record in report["stages"]}
    assert "made to fail" in tails["build"] and "made to fail" in tails["tests"]
    assert all("made to refuse" in tails[name] for name in ("init", "step", "svd", "linear"))
    # The lie about the GPU gives no figure: whoever measures looks for itself.
    assert report["gpu"] is None and "nothing was measured" in tails["rates"]
    assert not any("measured" in record or "results" in record for record in report["stages"])
    assert str(BENCH.parent) not in json.dumps(report)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_check_calls_each_benchmark_as_it_may_be_called(bench, tmp_path, capsys):
    """With the words of the script, in this process: a new one takes seconds to start."""
    script = (BENCH / "gpu_check.sh").read_text(encoding="utf-8")
    call = r'^\w+\(\) { "\$python" bench/(\w+)\.py --device cuda (.*); }$'
    calls = dict(re.findall(call, script, flags=re.MULTILINE))
    assert list(calls) == ["init", "step", "svd", "linear"]
    for name, words in calls.items():
        given = words.replace('"$model"', "tiny").replace('"$RESULTS"', str(tmp_path)).split()
        assert bench(name).main(["--device", "cuda", *given]) == 1
        assert "nothing was measured" in capsys.readouterr().err
        program = (BENCH / f"{name}.py").read_text(encoding="utf-8")
        assert program.endswith('\nif __name__ == "__main__":\n    sys.exit(main())\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [("--stages", "machine,nonsense"), ("--output",), ("--nonsense",)])
def test_gpu_check_refuses_wrong_arguments(wrong):
    done = subprocess.run(["bash", BENCH / "gpu_check.sh", *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr
