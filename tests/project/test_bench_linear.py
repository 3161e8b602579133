# SPDX-License-Identifier: Apache-2.0
"""bench/linear.py: right before fast, exact counts of bytes and of arithmetic, honest about what is missing.

Nothing here looks at how long anything took.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from osora import ops

for package in ("peft", "rich", "transformers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT, our peer

ONE = ("--shapes", "96x64", "--rows", "24", "--ranks", "4", "--dtypes", "float32")


def quick(output, *more):
    return ["--preset", "quick", "--threads", "1", "--output", str(output), *more]


def only_result(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def refused(bench, tmp_path, capsys, monkeypatch, *more):
    """What it says when it refuses, without having timed or written anything."""
    linear = bench("linear")
    monkeypatch.setattr(linear, "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert linear.main(quick(tmp_path, *ONE, *more)) == 1
    shown = capsys.readouterr()
    assert "over floor" not in shown.out and list(tmp_path.iterdir()) == []
    return shown.err


def test_it_checks_every_peer_and_then_compares(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "drawn" / "all.svg"
    assert bench("linear").main(quick(tmp_path / "json", "--plot", str(picture), "--no-multi")) == 0
    result = only_result(tmp_path / "json")
    assert result["benchmark"] == "linear" and result["settings"]["preset"] == "quick"
    assert result["machine"]["gpu"] is None and result["machine"]["threads"] == 1
    assert str(Path.home()) not in json.dumps(result) and str(tmp_path) not in json.dumps(result)
    assert set(result["gemm_gflops"]) == {"float32", "bfloat16"}
    assert [(case["dtype"], case["shape"]["d"], case["shape"]["k"], case["n"]) for case in result["results"]] == [
        (dtype, d, k, n) for dtype in ("float32", "bfloat16") for d, k in ((96, 64), (64, 96)) for n in (1, 24)
    ]
    for case in result["results"]:
        d, k, n, itemsize = case["shape"]["d"], case["shape"]["k"], case["n"], 4 if case["dtype"] == "float32" else 2
        peers = {(row["peer"], row["rank"]): row for row in case["peers"]}
        names = ("op-by-op", "vera", "lora", "hand", "osora")
        assert set(peers) == {("frozen", None), *((name, rank) for name in names for rank in (4, 8))}
        assert peers["frozen", None]["saved_bytes"] == 0 and peers["frozen", None]["floor"] == 1
        for (name, rank), row in peers.items():
            assert row["step"]["median"] > 0 and row["of_gemm_rate"] > 0 and row["extra_memory_bytes"] is not False
            assert (row["errors"] is not None) == (name in ("op-by-op", "hand", "osora"))
            if name == "frozen":
                continue
            assert row["floor"] == pytest.approx(row["over_frozen"]["median"] / row["over_floor"])
            assert ("osora_over_this" in row) == (name != "osora")
            assert row["quickest_over_frozen"] == row["step"]["min"] / peers["frozen", None]["step"]["min"]
            if name in ("osora", "hand"):
                assert row["saved_bytes"] == n * rank * itemsize
                assert row["floor"] == pytest.approx(1 + rank * (2 * k + 3 * d) / (2 * k * d))
                assert row["forward_floor"] == pytest.approx(1 + rank * (k + d) / (k * d))
            if name in ("op-by-op", "vera"):
                assert row["saved_bytes"] >= n * d * itemsize
            if name == "lora":
                assert row["saved_bytes"] >= n * k * itemsize
    shown = capsys.readouterr().out
    assert "osora over the others" in shown and "over its floor" in shown
    drawn = picture.read_text(encoding="utf-8")
    # matplotlib draws glyphs, and leaves each text in a comment
    assert "bfloat16, n = 24, r = 8" in drawn and "osora by arithmetic alone" in drawn


@pytest.mark.parametrize("name", ["op-by-op", "vera", "lora", "hand"])
@pytest.mark.parametrize("d, k", [(40, 24), (24, 40)])
def test_the_floors_count_every_product(bench, name, d, k):
    layers, n, r = bench("layers"), 16, 8
    shape = layers.Shape("given", d, k, False)
    basis = layers.make_basis(shape, r, torch.float32, "cpu", 0)
    layer = layers.make(name, basis, r, layers.make_osora(basis, r, 0))
    x = torch.randn(n, k, requires_grad=True).clone()  # the counter's hooks refuse a leaf
    step = bench("linear").Step(layer, x, torch.randn(n, d))
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which it does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        layer(step.x)
    with FlopCounterMode(display=False, custom_mapping=in_place) as both:
        step()
    floors = layers.floors(name, shape, r)
    assert forward.get_total_flops() == pytest.approx(2 * n * k * d * floors[0])
    assert both.get_total_flops() == pytest.approx(4 * n * k * d * floors[1])


def test_the_floor_the_project_quotes(bench):
    layers = bench("layers")
    assert round(layers.floors("osora", layers.Shape("square", 2048, 2048, False), 64)[1], 3) == 1.078


# -- correctness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def known(bench):
    """A layer, a truth, and in float64 what is exactly right: y, dx, do, ds of the dense layer."""
    layers, linear = bench("layers"), bench("linear")
    basis = layers.make_basis(layers.Shape("given", 40, 24, True), 6, torch.float32, "cpu", 1)
    layer = layers.make_osora(basis, 6, 1)
    x, dy = torch.randn(15, 24), torch.randn(15, 40)
    o, s = (getattr(layer, name).detach().double().requires_grad_() for name in "os")
    exact_x = x.double().requires_grad_()
    D = layer.U.double() * ((1 + o)[:, None] * (layer.S0.double() + s) - layer.S0.double())
    weight = layer.base_layer.weight.double() + D @ layer.V.double().t()
    y = exact_x @ weight.t() + layer.bias.double()
    exact = (y.detach(), *torch.autograd.grad(y, [exact_x, o, s], dy.double()))
    return layer, linear.Truth(basis, x, dy, 0), exact


def test_the_truth_is_true(known):
    layer, truth, exact = known
    assert all(error < 1e-13 for error in truth.errors(layer, exact).values())


@pytest.mark.parametrize("which", range(4))
def test_an_error_is_as_large_as_it_is_said_to_be(known, which):
    layer, truth, exact = known
    spoiled = list(exact)
    spoiled[which] = exact[which] + 0.01 * torch.randn_like(exact[which]) * exact[which].square().mean().sqrt()
    errors = list(truth.errors(layer, tuple(spoiled)).values())
    assert 0.004 < errors.pop(which) < 0.03 and max(errors) < 1e-13


def test_one_wrong_row_is_seen(known):
    layer, truth, (y, dx, do, ds) = known
    wrong = y.clone()
    wrong[7] = y[8]
    assert truth.errors(layer, (wrong, dx, do, ds))["y"] > 0.5


def bend(value, by=0.1):
    """The same value, with a gradient that is too large."""
    return (1 + by) * value - by * value.detach()


SPOILT = {
    "y": lambda right, x, w, b, U, V, S0, s, o: right(x, w, b, U, V, S0, s, o) * 1.05,
    "dx": lambda right, x, w, b, U, V, S0, s, o: right(bend(x), w, b, U, V, S0, s, o),
    "ds": lambda right, x, w, b, U, V, S0, s, o: right(x, w, b, U, V, S0, bend(s), o),
    "do": lambda right, x, w, b, U, V, S0, s, o: right(x, w, b, U, V, S0, s, bend(o)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SPOILT)
def test_it_refuses_a_wrong_answer(bench, tmp_path, capsys, monkeypatch, name, dtype):
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *arguments: SPOILT[name](right, *arguments))
    shown = refused(bench, tmp_path, capsys, monkeypatch, "--dtypes", dtype)
    assert f"osora's {name} is off by" in shown and "given, 96×64, n = 24" in shown


def test_it_refuses_nan_and_an_adapter_that_does_nothing(bench, tmp_path, capsys, monkeypatch):
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: right(x, *rest) * float("nan"))
    assert "osora's y is off by nan" in refused(bench, tmp_path, capsys, monkeypatch)
    monkeypatch.setattr(ops, "linear", lambda x, w, b, U, V, S0, s, o: right(x, w, b, U, V, S0, 0 * s, 0 * o))
    assert "osora's y is off by" in refused(bench, tmp_path, capsys, monkeypatch, "--peers", "frozen", "lora")


def test_it_refuses_a_wrong_peer_of_its_own(bench, tmp_path, capsys, monkeypatch):
    hand, right = bench("layers").HandLinear, bench("layers").HandLinear.forward
    monkeypatch.setattr(hand, "forward", lambda self, x: right(self, x) * 1.2)
    shown = refused(bench, tmp_path, capsys, monkeypatch)
    assert "this benchmark's own peer (by hand): y is off by" in shown


# -- memory ----------------------------------------------------------------------------------------------------------


def test_peak_memory_holds_what_a_peer_keeps(bench, tmp_path):
    more = ("--shapes", "512x512", "--rows", "4096", "--ranks", "8", "--dtypes", "float32", "--no-multi")
    assert bench("linear").main(quick(tmp_path, *more, "--peers", "frozen", "op-by-op", "osora")) == 0
    (case,) = only_result(tmp_path)["results"]
    peak = {row["peer"]: row["extra_memory_bytes"] for row in case["peers"]}
    if peak["frozen"] is None:
        pytest.skip("this system cannot reset the peak")
    tensor = 4096 * 512 * 4
    assert 1.9 * tensor < peak["frozen"], "y and dx"
    assert 1.9 * tensor < peak["osora"] < peak["op-by-op"] - 0.9 * tensor, "[n, d] that plain torch keeps"


# -- many adapters ---------------------------------------------------------------------------------------------------

MULTI = ("--no-memory", "--peers", "frozen", "osora", "lora")


def plain_multi(x, weight, bias, U, V, S0, s, o, index, ranks=None):
    """What osora.ops.linear_multi computes."""
    rows = zip(x, s[index], o[index], strict=True)
    return torch.stack([ops.linear(row, weight, bias, U, V, S0, a, b) for row, a, b in rows])


def test_many_adapters_are_checked_and_compared(bench, tmp_path, capsys):
    assert bench("linear").main(quick(tmp_path, *ONE[:-2], *MULTI)) == 0
    found = only_result(tmp_path)["multi"]
    assert [(part["dtype"], part["d"], part["k"], part["rank"], part["adapters"]) for part in found] == [
        ("float32", 96, 64, 4, 64),
        ("bfloat16", 96, 64, 4, 64),
    ]
    for part in found:
        assert [peer["peer"] for peer in part["peers"]] == ["frozen", "one", "multi", "in-turn", "gathered", "lora"]
        checked = {peer["peer"] for peer in part["peers"] if peer["error"] is not None}
        assert checked == {"multi", "in-turn", "gathered"}
    assert "64 adapters, 64 rows, 96×64, r = 4, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *arguments: plain_multi(*arguments).roll(1, 0),
        lambda x, w, b, U, V, S0, s, o, index: plain_multi(x, w, b, U, V, S0, s, o, index.roll(1)),
        lambda x, w, b, U, V, S0, s, o, index: plain_multi(x, w, b, U, V, S0, s[:1], o[:1], index * 0),
    ],
    ids=["rows", "index", "one adapter for all"],
)
def test_rows_of_a_wrong_adapter_are_refused(bench, tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.setattr(ops, "linear_multi", wrong)
    monkeypatch.setattr(bench("multi"), "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert bench("linear").main(quick(tmp_path, *ONE, *MULTI)) == 1
    assert "osora's answer (osora, 64 adapters) is off by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- arguments -------------------------------------------------------------------------------------------------------


def test_presets(bench):
    linear = bench("linear")
    _, cases = linear.parse([])
    shapes = {(case.shape.family, case.shape.d, case.shape.k) for case in cases}
    assert len(shapes) == 13 and {("llama3-8b", 14336, 4096), ("gpt2", 2304, 768), ("smollm2", 192, 576)} <= shapes
    assert {case.n for case in cases} == {512, 2048} and {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert all(case.shape.bias == (case.shape.family == "gpt2") for case in cases)
    ranks = {(case.shape.d, case.n): case.ranks for case in cases}
    assert ranks[4096, 512] == (8, 64, 256) and ranks[192, 512] == (8, 64) and ranks[4096, 2048] == (64,)
    options, cases = linear.parse(["--preset", "full", "--device", "cuda"])
    assert options.dtypes == ["float32", "bfloat16", "float16"] and len(cases) == 13 * 5 * 3
    _, cases = linear.parse(["--shapes", "7x5", "--bias", "--rows", "3", "--ranks", "2", "5", "--dtypes", "float32"])
    assert [(str(case), case.ranks) for case in cases] == [("given, 7×5 and bias, n = 3, float32", (2, 5))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--peers", "nonsense"], "invalid choice: 'nonsense'"),
        (["--shapes", "4096"], "a shape is written 4096x4096 (out_features x in_features), got '4096'"),
        (["--ranks", "65"], "a 96x64 layer has ranks 1 .. 64, got 65"),
        (["--ranks", "0"], "--ranks must be at least 1, got [0]"),
        (["--rows", "0"], "--rows must be at least 1, got [0]"),
        (["--repetitions", "0"], "--repetitions must be at least 1, got 0"),
        (["--spend", "nan"], "--spend must be seconds, 0 or more, got nan"),
        (["--models", "gpt2", "--shapes", "8x8"], "--models and --shapes: give one of them"),
        (["--plot", "picture.gif"], "must end in .png or .svg, got picture.gif"),
    ],
)
def test_wrong_arguments(bench, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench("linear").main(quick(tmp_path, *arguments))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_no_figure(bench, tmp_path, capsys):
    assert bench("linear").main(quick(tmp_path, "--device", "cuda")) == 1
    assert "nothing was measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
