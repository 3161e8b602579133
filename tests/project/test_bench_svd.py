# SPDX-License-Identifier: Apache-2.0
"""bench/svd.py checks every peer before it times, and refuses a wrong answer."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from benches import (
    only_result,
    spoil_converged,
    spoil_residuals,
    spoil_vectors,
    spoil_with_nan,
)

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT and transformers, our peers


def svd_quick(output, *more):
    return ["--preset", "quick", "--threads", "1", "--output", str(output), *more]


ONE = ("--shapes", "96x64", "--batch", "1")


def test_svd_checks_every_peer_and_then_compares(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "drawn" / "all.svg"
    assert bench("svd").main(svd_quick(tmp_path / "json", "--plot", str(picture))) == 0
    result = only_result(tmp_path / "json")
    assert result["benchmark"] == "svd" and result["settings"]["preset"] == "quick"
    assert str(Path.home()) not in json.dumps(result) and str(tmp_path) not in json.dumps(result)
    assert min(result["gemm_gflops"][when] for when in ("before", "after")) > 0
    assert [(case["d"], case["k"], case["batch"]) for case in result["results"]] == [
        (96, 64, 1),
        (96, 64, 2),
        (64, 96, 1),
        (64, 96, 2),
    ]
    for case in result["results"]:
        peers = case["peers"]
        assert set(peers) == {"osora-auto-1e-3", "svd", *bench("svd").LOWRANK, "sklearn", "scipy"}
        for name in ("osora-auto-1e-3", "svd"):
            assert peers[name]["largest_error"]["sigma"] < 1e-5 and peers[name]["largest_error"]["angle_sine"] < 1e-3
        ours = peers["osora-auto-1e-3"]
        assert ours["passes"] > 0 and ours["unconverged"] == 0 and ours["method"]
        # Read rightly: more iterations are better, in every respect.
        for error in ("sigma", "residual", "angle_sine"):
            few, many = (peers[name]["largest_error"][error] for name in ("lowrank-1.5r-4", "lowrank-1.5r-16"))
            assert many < few
        assert peers["lowrank-16"]["over_reference"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        products = 2 * 96 * 64 * 4 * (2 * 16 + 2) * case["batch"]
        assert peers["lowrank-16"]["gflop"] == pytest.approx(products / 1e9)
    shown = capsys.readouterr().out
    assert "31 stored points" in shown and "randomized_svd" in shown and "absent" not in shown
    assert os.listdir(picture.parent) == ["all.svg"]
    drawn = picture.read_text(encoding="utf-8")
    # matplotlib draws glyphs, and leaves each text in a comment
    assert drawn.count("svd_lowrank q=1.5r niter=16") == drawn.count("osora 1e-3") == 4
    assert "gate, 2 of 64×96, r = 4" in drawn


def test_svd_draws_labels_that_cover_nothing(bench, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-8, 1))
    bench("svd_report").place_labels(figure, axes, [(0.02, 1e-4, f"number {i} of six", "red") for i in range(6)])
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in axes.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_svd_measures_memory_in_processes_of_their_own(bench, tmp_path):
    more = ("--memory", "--peers", "--reference", "osora", "--shapes", "512x512", "--batch", "1")
    assert bench("svd").main(svd_quick(tmp_path, *more)) == 0
    (case,) = only_result(tmp_path)["results"]
    (ours,) = case["peers"].values()
    if ours["extra_memory_bytes"] is None:
        pytest.skip("this system cannot reset the peak")
    assert 0 <= ours["extra_memory_bytes"] < 2**28


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda item: dataclasses.replace(item, S=item.S * (1 + 3e-4)), "singular value is off by 3.0e-04"),
        (spoil_vectors, "orthonormal only to"),
        (spoil_residuals, "is reported"),
        (spoil_converged, "reported as converged to 0.001 with a residual of"),
        (spoil_with_nan, "not finite"),
    ],
)
def test_svd_refuses_a_wrong_answer(bench, tmp_path, capsys, monkeypatch, spoil, complaint):
    svd = bench("svd")
    right = bench("svd_peers").decompose
    monkeypatch.setattr(bench("svd_peers"), "decompose", lambda *a, **k: [spoil(item) for item in right(*a, **k)])
    monkeypatch.setattr(svd, "time_rows", lambda *a, **k: pytest.fail("it was timed"))
    assert svd.main(svd_quick(tmp_path, *ONE)) == 1
    shown = capsys.readouterr()
    assert re.search(rf"gate, 96×64, r = 4, osora 1e-3, matrix 0: .*{re.escape(complaint)}", shown.err)
    assert "lowrank" not in shown.out and list(tmp_path.iterdir()) == []


def test_svd_refuses_a_truth_that_lapack_does_not_confirm(bench, tmp_path, capsys, monkeypatch):
    svd = bench("svd")
    right = bench("svd_peers").full
    monkeypatch.setattr(bench("svd_peers"), "full", lambda *a: [(U, S * 1.001, V) for U, S, V in right(*a)])
    assert svd.main(svd_quick(tmp_path, *ONE)) == 1
    assert "torch.linalg.svd is off by 1.0e-03" in capsys.readouterr().err


def test_svd_names_what_is_absent(bench, tmp_path, capsys, monkeypatch):
    svd = bench("svd")
    there = bench("svd_peers").installed
    monkeypatch.setattr(bench("svd_peers"), "installed", lambda module: module != "sklearn" and there(module))
    peers = ("--peers", "sklearn", "lowrank-1.5r-4", "gesvdp", "--ranks", "60")
    assert svd.main(svd_quick(tmp_path, *ONE, *peers)) == 0
    (case,) = only_result(tmp_path)["results"]
    expected = {
        "sklearn": "not installed: scikit-learn",
        "lowrank-1.5r-4": "needs 90 columns, there are 64",
        "gesvdp": "needs --device cuda",
    }
    assert {name: facts["absent"] for name, facts in case["peers"].items() if "absent" in facts} == expected
    shown = capsys.readouterr().out
    assert all(reason in shown for reason in expected.values())


def test_svd_names_a_method_that_cannot_run(bench, tmp_path, capsys):
    more = ("--methods", "auto", "lanczos", "--peers", "--ranks", "32")
    assert bench("svd").main(svd_quick(tmp_path, *ONE, *more)) == 0
    (case,) = only_result(tmp_path)["results"]
    assert 'method "lanczos" needs' in case["peers"]["osora-lanczos-1e-3"]["absent"]
    assert "absent" not in case["peers"]["osora-auto-1e-3"]


def test_svd_runs_slow_peers_once(bench):
    svd = bench("svd")
    count = dict.fromkeys(("osora-auto-1e-3", "lowrank-16", "svd", "lowrank-4"), 0)

    def call(name):
        count[name] += 1

    rows = [svd.Row(name, name, call=lambda name=name: call(name), first=6.0) for name in count]
    rows[3].first = 0.1
    rows.append(svd.Row("scipy", "scipy", absent="not installed: scipy", call=lambda: pytest.fail("it is not there")))
    svd.time_rows(rows, "lowrank-16", 4, 5.0, "cpu")
    assert count == {"osora-auto-1e-3": 4, "lowrank-16": 4, "svd": 1, "lowrank-4": 4}
    assert [len(row.seconds.seconds) for row in rows] == [4, 4, 1, 4, 0]
    alone = rows[2].seconds.seconds[0] / rows[1].seconds.seconds[0]
    assert bench("svd_report").ratio(rows[2], rows[1]) == (alone,) * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--peers", "nonsense"], "invalid choice: 'nonsense'"),
        (["--reference", "nonsense"], "invalid choice: 'nonsense'"),
        (["--shapes", "4096"], "a shape is written 4096x4096 (out_features x in_features), got '4096'"),
        (["--shapes", "0x8"], "got '0x8'"),
        (["--ranks", "65"], "a 96x64 matrix has ranks 1 .. 64, got 65"),
        (["--ranks", "0"], "--ranks must be at least 1, got [0]"),
        (["--repetitions", "0"], "--repetitions must be at least 1, got 0"),
        (["--tols", "0"], "--tols must be positive, got [0.0]"),
        (["--matrices", "real"], "have the shapes 1536x576, 576x1536, 576x576"),
        (["--plot", "picture.gif"], "must end in .png or .svg, got picture.gif"),
    ],
)
def test_svd_refuses_wrong_arguments(bench, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench("svd").main(svd_quick(tmp_path, *arguments))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_svd_presets(bench):
    svd = bench("svd")
    options, cases = svd.parse([])
    assert options.tols == [1e-3, 1e-4] and options.repetitions == 5 and options.memory
    assert {(case.d, case.k, case.rank) for case in cases} == {
        *((d, 4096, rank) for d in (4096, 11008) for rank in (64, 128)),
        (4096, 4096, 512),
        (2048, 2048, 64),
    }
    options, cases = svd.parse(["--preset", "decide", "--batch", "1"])
    assert options.peers == [] and options.reference == "osora" and {case.batch for case in cases} == {1}
    _, cases = svd.parse(["--preset", "full"])
    assert all(case.batch * case.d * case.k <= svd.CPU_BATCH or case.batch == 1 for case in cases)
    assert {case.kind for case in cases} == {"gate", "down", "query", "real"}


@pytest.mark.parametrize("kind", ["gate", "down", "query"])
@pytest.mark.parametrize("d, k", [(96, 64), (64, 96), (97, 97)])
@pytest.mark.parametrize("dtype, sigma, sine", [("float32", 1e-7, 1e-5), ("float64", 1e-13, 1e-12)])
def test_known_triplets_are_those_of_the_matrix(bench, kind, d, k, dtype, sigma, sine):
    spectra = bench("spectra")
    made = spectra.make(kind, d, k, 2, 24, getattr(torch, dtype), "cpu", 0, spectra.Source("stored"))
    assert made.weight.shape == (2, d, k) and not torch.equal(made.weight[0], made.weight[1])
    for weight, known in zip(made.weight.double(), made.truth, strict=True):
        U, S, Vh = torch.linalg.svd(weight)
        torch.testing.assert_close(known.S, S[:24], rtol=sigma, atol=0)
        assert known.next == pytest.approx(float(S[24]), rel=sigma)
        assert known.gap == pytest.approx(float(1 - S[24] / S[23]), abs=4 * sigma)
        for mine, true in ((known.U, U), (known.V, Vh.mT)):
            torch.testing.assert_close(mine.mT @ mine, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-13)
            assert torch.linalg.matrix_norm(true[:, 24:].mT @ mine, ord=2) < sine
        torch.testing.assert_close(
            (known.U * known.S).mT @ weight @ known.V, known.S.square().diag(), rtol=1e-6, atol=1e-4
        )


def test_the_truth_of_16_bit_matrices_is_that_of_what_was_rounded(bench, monkeypatch):
    spectra = bench("spectra")
    source = spectra.Source("stored")
    for columns in (2048, 32):  # by LAPACK's SVD, and by the Gram matrix
        monkeypatch.setattr(spectra, "LAPACK_UP_TO", columns)
        for d, k in ((96, 64), (64, 96)):
            made = spectra.make("query", d, k, 1, 16, torch.bfloat16, "cpu", 0, source)
            assert made.weight.dtype == torch.bfloat16
            assert spectra.residual(made.weight[0], made.truth[0]) < 1e-11


def test_a_truth_that_does_not_hold_is_refused(bench, monkeypatch):
    spectra = bench("spectra")
    monkeypatch.setattr(spectra, "rotate", lambda columns, signs: columns * 1.001)
    with pytest.raises(bench("measure").Refused, match="known triplets of gate 96x64 fit only to"):
        spectra.make("gate", 96, 64, 1, 8, torch.float32, "cpu", 0, spectra.Source("stored"))


def test_stretched_spectra_keep_their_shape(bench):
    spectra = bench("spectra")
    places, values, _ = spectra.Source("stored").spectrum("gate")
    assert len(places) == len(values) == len(spectra.NODES) and bool((values.diff() < 0).all())
    generator = torch.Generator().manual_seed(0)
    same = spectra.stretch(places, values, spectra.POINTS, generator)
    torch.testing.assert_close(same[list(spectra.NODES)], values, rtol=3e-3, atol=0)
    wide = spectra.stretch(places, values, 8 * spectra.POINTS, generator)
    assert len(wide) == 8 * spectra.POINTS and bool((wide.diff() <= 0).all())
    torch.testing.assert_close(wide[8 * 100 + 4], values[spectra.NODES.index(100)], rtol=3e-3, atol=0)
