# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share, and the step of training."""

import json
import os

import pytest
import torch
from benches import assert_complete, only_result, quick

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


def test_every_case_is_a_line_as_soon_as_it_ends(bench, tmp_path, monkeypatch):
    measure, lines = bench("measure"), tmp_path / "lines.jsonl"

    def written():
        return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]

    monkeypatch.setenv("OSORA_RESULTS_JSONL", str(lines))
    run = measure.Run("some", "cpu", {"rank": 3})
    assert written()[0]["settings"] == {"rank": 3} and written()[0]["versions"]["torch"] == torch.__version__
    run.case({"ms": 2.0, "error": float("nan")})  # NaN is not JSON
    assert written()[1:] == [{"benchmark": "some", "case": {"ms": 2.0, "error": "NaN"}}]
    run.finish({"results": []}, tmp_path / "results")
    assert written()[2]["finished"] is True
    other = tmp_path / "other.jsonl"
    measure.Run("named", "cpu", {}, lines=other).case({})
    assert len(written()) == 3 and len(other.read_text(encoding="utf-8").splitlines()) == 2
    monkeypatch.delenv("OSORA_RESULTS_JSONL")
    measure.Run("silent", "cpu", {}).case({})
    assert sorted(os.listdir(tmp_path)) == ["lines.jsonl", "other.jsonl", "results"]


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
