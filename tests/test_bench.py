# SPDX-License-Identifier: Apache-2.0
"""The benchmarks do their checks before they time anything, refuse when a check fails, and write what they say.

Nothing here looks at how long anything took.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import osora
from osora.model import attach as patch
from osora.model.targets import find_targets

for package in ("peft", "rich", "transformers"):
    pytest.importorskip(package)

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.filterwarnings("default")  # of PEFT and transformers, our peers


def quick(output, *more):
    return ["--quick", "--threads", "1", "--output", str(output), *more]


def only_result(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def assert_complete(result, name):
    assert result["benchmark"] == name and result["settings"]["quick"] is True
    assert result["machine"]["gpu"] is None and result["machine"]["threads"] == 1 and result["machine"]["cpu"]
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["osora"]["version"]
    assert set(result["load_average"]) == {"before", "after"}
    assert str(Path.home()) not in json.dumps(result) and str(BENCH.parent) not in json.dumps(result)


# -- init.py ---------------------------------------------------------------------------------------------------------


def test_init_checks_every_layer_and_then_compares(bench, tmp_path, capsys):
    assert bench("init").main(quick(tmp_path)) == 0
    result = only_result(tmp_path)
    assert_complete(result, "init")
    assert [part["dtype"] for part in result["results"]] == ["float32", "bfloat16"]
    for part in result["results"]:
        assert part["checked_against_float64"] == 14
        *shapes, total = part["lines"]
        assert sum(line["matrices"] for line in shapes) == total["matrices"] == 14
        assert set(total["peers"]) == {"osora", "pissa", "pissa_niter_16"}
        ours = total["peers"]["osora"]
        assert ours["largest_error"]["sigma"] <= 1e-5 and ours["unconverged"] == 0
        for peer in ("pissa", "pissa_niter_16"):
            assert set(total["peers"][peer]["osora_over_this"]) == {"median", "min", "max"}
        # PEFT's exact way is exact: its factors were read back rightly.
        assert total["peers"]["pissa"]["largest_error"]["sigma"] < 1e-4
    shown = capsys.readouterr().out
    assert "all 14 layers are right" in shown and "pissa_niter_16" in shown


def spoil_sigma(item):
    return dataclasses.replace(item, S=item.S * (1 + 3e-5))


def spoil_vectors(item):
    return dataclasses.replace(item, U=item.U + 1e-3)


def spoil_residuals(item):
    return dataclasses.replace(item, residuals=item.residuals + 1e-4)


def spoil_converged(item):  # a large error that is reported, but as converged
    V = item.V.roll(1, 0)
    return dataclasses.replace(item, V=V, residuals=torch.full_like(item.residuals, 0.5), converged=True)


def spoil_with_nan(item):
    return dataclasses.replace(item, U=item.U * float("nan"))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (spoil_sigma, "singular value is off by 3.0e-05"),
        (spoil_vectors, "orthonormal only to"),
        (spoil_residuals, "is reported"),
        (spoil_converged, "reported as converged to 0.001 with a residual of"),
        (spoil_with_nan, "not finite"),
    ],
)
def test_init_refuses_a_wrong_answer(bench, tmp_path, capsys, monkeypatch, spoil, complaint):
    right = patch.decompose

    def wrong(weights, rank, *, names, **options):
        found = right(weights, rank, names=names, **options)
        return [spoil(item) if item.name.endswith("1.mlp.up_proj") else item for item in found]

    monkeypatch.setattr(patch, "decompose", wrong)
    monkeypatch.setattr(bench("init"), "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert bench("init").main(quick(tmp_path, "--dtype", "float32")) == 1
    shown = capsys.readouterr()
    assert re.search(rf"layers\.1\.mlp\.up_proj: .*{re.escape(complaint)}", shown.err)
    assert "osora / this" not in shown.out
    assert list(tmp_path.iterdir()) == []


# -- init.py on the model whose truth is known -----------------------------------------------------------------------


@pytest.fixture
def small_llama(bench, monkeypatch):
    """Llama-3-8B's layers at a 64th of their widths: 64x64, 16x64, 224x64 and 64x224."""
    monkeypatch.setattr(bench("loading"), "LLAMA_SCALE", 64)


def llama(output, *more):
    return ["--model", "llama3-8b-layers", "--rank", "8", "--threads", "1", "--output", str(output), *more]


@pytest.mark.parametrize("dtype, sigma, sine", [("float32", 1e-6, 1e-4), ("bfloat16", 1e-12, 1e-9)])
def test_the_known_model_is_what_it_says(bench, small_llama, dtype, sigma, sine):
    loading = bench("loading")
    model, truth = loading.load_known("llama3-8b-layers", dtype, "cpu", None, 8)
    targets = {target.name: target.module.weight for target in find_targets(model, osora.OsoraConfig(r=8))}
    assert list(targets) == list(truth) and len(truth) == 14
    for name, weight in targets.items():
        assert weight.dtype == getattr(torch, dtype)
        U, S, Vh = torch.linalg.svd(weight.double())
        torch.testing.assert_close(truth[name].S, S[:8], rtol=sigma, atol=0)
        for mine, true in ((truth[name].U, U), (truth[name].V, Vh.mT)):
            assert mine.shape[1] == 8 and mine.untyped_storage().nbytes() == mine.numel() * 8
            assert torch.linalg.matrix_norm(true[:, 8:].mT @ mine, ord=2) < sine
    same_shape = [weight for weight in targets.values() if weight.shape == (64, 64)]
    assert len(same_shape) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])
    # A model like any other, and the same one without its truth.
    tokens = torch.arange(6)[None]
    assert bool(model(tokens).logits.isfinite().all())
    plain = loading.load("llama3-8b-layers", dtype, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert len(loading.load_known("llama3-8b-layers", dtype, "cpu", 1, 8)[1]) == 7


def test_the_known_model_has_the_shapes_of_llama(bench, monkeypatch):
    spectra, made = bench("spectra"), []

    def make(kind, d, k, batch, rank, *_):
        made.append((kind, d, k, batch, rank))
        return spectra.Matrices(torch.zeros(1).expand(batch, d, k), [None], "")

    monkeypatch.setattr(spectra, "make", make)
    model, truth = bench("loading").load_known("llama3-8b-layers", "float32", "cpu", None, 64)
    query, key = ("query", 4096, 4096, 1, 64), ("query", 1024, 4096, 1, 64)
    gate, down = ("gate", 14336, 4096, 1, 64), ("down", 4096, 14336, 1, 64)
    assert made == 2 * [query, key, key, query, gate, gate, down]
    shapes = {name: model.get_submodule(name).weight.shape for name in truth}
    assert list(shapes.values()) == [(d, k) for _, d, k, _, _ in made]
    assert [name for name, shape in shapes.items() if shape == (4096, 14336)] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_init_runs_a_slow_peer_once_and_needs_no_float64_svd(bench, tmp_path, capsys, monkeypatch, small_llama):
    init, svd = bench("init"), torch.linalg.svd
    runs = dict.fromkeys(init.PEERS, 0)
    pissa, ours = init.PissaLayers.initialise, init.osora_initialise

    def single(A, *args, **kwargs):
        assert A.dtype == torch.float32
        return svd(A, *args, **kwargs)

    def counted(layers):
        runs[layers.kind] += 1
        return pissa(layers)

    def counted_ours(*arguments):
        runs["osora"] += 1
        return ours(*arguments)

    monkeypatch.setattr(torch.linalg, "svd", single)
    monkeypatch.setattr(init.PissaLayers, "initialise", counted)
    monkeypatch.setattr(init, "osora_initialise", counted_ours)
    assert init.main(llama(tmp_path, "--slow", "0", "--repetitions", "3", "--warm-up", "1")) == 0
    batches, again = 4, 1 + 1 + 3  # the check, the warm-up, the repetitions
    assert runs == {"osora": batches * again, "pissa": batches, "pissa_niter_16": batches * again}
    result = only_result(tmp_path)
    assert result["settings"]["slow"] == 0 and result["settings"]["model"] == "llama3-8b-layers"
    (part,) = result["results"]  # float32 alone
    assert part["truth"] == "known" and part["checked_against_float64"] == 14
    for line in part["lines"]:
        peers = line["peers"]
        assert {name: facts["once"] for name, facts in peers.items()} == {
            "osora": False,
            "pissa": True,
            "pissa_niter_16": False,
        }
        assert {name: len(facts["seconds"]["all"]) for name, facts in peers.items()} == {
            "osora": 3,
            "pissa": 1,
            "pissa_niter_16": 3,
        }
        alone = peers["pissa"]["osora_seconds_beside"] / peers["pissa"]["seconds"]["median"]
        assert peers["pissa"]["osora_over_this"] == pytest.approx({"median": alone, "min": alone, "max": alone})
        for name in ("osora", "pissa"):  # both are exact, and so is what was known
            assert peers[name]["largest_error"]["sigma"] < 1e-5
            assert peers[name]["largest_error"]["angle_sine"] < 1e-2
    total = part["lines"][-1]["peers"]["pissa"]["seconds"]["median"]
    assert total == pytest.approx(sum(line["peers"]["pissa"]["seconds"]["median"] for line in part["lines"][:-1]))
    assert capsys.readouterr().out.count(", once") == 5


def test_init_runs_nothing_once_unless_it_is_slow(bench, tmp_path, capsys, small_llama):
    assert bench("init").main(llama(tmp_path / "known", "--repetitions", "1")) == 0
    assert bench("init").main(quick(tmp_path / "tiny", "--dtype", "float32")) == 0
    for folder, slow, truth in (("known", 5, "known"), ("tiny", None, "float64 SVD")):
        result = only_result(tmp_path / folder)
        assert result["settings"]["slow"] == slow and result["results"][0]["truth"] == truth
        for line in result["results"][0]["lines"]:
            assert not any(facts["once"] for facts in line["peers"].values())
    assert "once" not in capsys.readouterr().out


def test_a_sum_with_a_peer_that_ran_once_is_of_first_runs(bench):
    init, Timing = bench("init"), bench("measure").Timing
    errors = {peer: init.Errors() for peer in init.PEERS}
    groups, times = [], []
    for pissa, shape in ((9.0, (8, 8)), (1.0, (4, 8))):
        first = dict(zip(init.PEERS, (Timing((2.0,)), Timing((pissa,)), Timing((3.0,))), strict=True))
        groups.append(init.Group([], shape, errors, [4], 0, first))
        usual = dict(zip(init.PEERS, (Timing((1.0, 1.5)), Timing((0.5, 0.5)), Timing((2.0, 2.0))), strict=True))
        times.append({peer: t for peer, t in usual.items() if peer not in groups[-1].once(5.0)})
    assert [len(t) for t in times] == [2, 3] and groups[0].once(None) == set()
    peers = init.summarise("all", groups, times)["peers"]
    assert peers["osora"]["seconds"]["all"] == [2.0, 3.0]
    assert peers["pissa"]["seconds"]["all"] == [10.0] and peers["pissa"]["once"]
    assert peers["pissa"]["osora_over_this"]["median"] == 0.4 and peers["pissa"]["osora_seconds_beside"] == 4.0
    assert peers["pissa_niter_16"]["seconds"]["all"] == [4.0, 4.0]
    assert peers["pissa_niter_16"]["osora_over_this"] == {"median": 0.625, "min": 0.5, "max": 0.75}
    alone = init.summarise("4×8", groups[1:], times[1:])["peers"]["pissa"]
    assert alone["seconds"]["all"] == [0.5, 0.5] and not alone["once"]


def refused_by_known_truth(bench, tmp_path, capsys, monkeypatch):
    init = bench("init")
    monkeypatch.setattr(init, "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert init.main(llama(tmp_path, "--slow", "0")) == 1
    shown = capsys.readouterr()
    assert "osora / this" not in shown.out and list(tmp_path.iterdir()) == []
    return shown.err


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (spoil_sigma, "singular value is off by 3.0e-05"),
        (spoil_vectors, "orthonormal only to"),
        (spoil_residuals, "is reported"),
        (spoil_converged, "reported as converged to 0.001 with a residual of"),
        (spoil_with_nan, "not finite"),
    ],
)
def test_init_refuses_an_answer_that_is_not_the_known_one(
    bench, tmp_path, capsys, monkeypatch, small_llama, spoil, complaint
):
    right, pissa, given = patch.decompose, bench("init").PissaLayers, []

    def wrong(weights, rank, *, names, **options):
        found = right(weights, rank, names=names, **options)
        return [spoil(item) if item.name.endswith("0.self_attn.q_proj") else item for item in found]

    class Watched(pissa):
        def __init__(self, *arguments):
            given.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(patch, "decompose", wrong)
    monkeypatch.setattr(bench("init"), "PissaLayers", Watched)
    shown = refused_by_known_truth(bench, tmp_path, capsys, monkeypatch)
    assert re.search(rf"layers\.0\.self_attn\.q_proj: .*{re.escape(complaint)}", shown)
    assert given == []  # nobody waits for full SVDs after that


def test_init_refuses_where_what_was_known_is_wrong(bench, tmp_path, capsys, monkeypatch, small_llama):
    loading = bench("loading")
    right = loading.load_known

    def wrong(*arguments):
        model, truth = right(*arguments)
        name = "model.layers.1.mlp.down_proj"
        truth[name] = dataclasses.replace(truth[name], S=truth[name].S * (1 + 2e-5))
        return model, truth

    monkeypatch.setattr(loading, "load_known", wrong)
    shown = refused_by_known_truth(bench, tmp_path, capsys, monkeypatch)
    assert "model.layers.1.mlp.down_proj: a singular value is off by 2.0e-05" in shown


@pytest.mark.parametrize("slow", ["-1", "nan", "inf"])
def test_init_refuses_a_limit_that_is_none(bench, tmp_path, capsys, slow):
    with pytest.raises(SystemExit) as stopped:
        bench("init").main(quick(tmp_path, "--slow", slow))
    assert stopped.value.code == 2 and "--slow must be seconds, 0 or more" in capsys.readouterr().err


# -- svd.py ----------------------------------------------------------------------------------------------------------


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
    bench("svd").place_labels(figure, axes, [(0.02, 1e-4, f"number {i} of six", "red") for i in range(6)])
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
    right = svd.decompose
    monkeypatch.setattr(svd, "decompose", lambda *a, **k: [spoil(item) for item in right(*a, **k)])
    monkeypatch.setattr(svd, "time_rows", lambda *a, **k: pytest.fail("it was timed"))
    assert svd.main(svd_quick(tmp_path, *ONE)) == 1
    shown = capsys.readouterr()
    assert re.search(rf"gate, 96×64, r = 4, osora 1e-3, matrix 0: .*{re.escape(complaint)}", shown.err)
    assert "lowrank" not in shown.out and list(tmp_path.iterdir()) == []


def test_svd_refuses_a_truth_that_lapack_does_not_confirm(bench, tmp_path, capsys, monkeypatch):
    svd = bench("svd")
    right = svd.full
    monkeypatch.setattr(svd, "full", lambda *a: [(U, S * 1.001, V) for U, S, V in right(*a)])
    assert svd.main(svd_quick(tmp_path, *ONE)) == 1
    assert "torch.linalg.svd is off by 1.0e-03" in capsys.readouterr().err


def test_svd_names_what_is_absent(bench, tmp_path, capsys, monkeypatch):
    svd = bench("svd")
    there = svd.installed
    monkeypatch.setattr(svd, "installed", lambda module: module != "sklearn" and there(module))
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
    assert svd.ratio(rows[2], rows[1]) == (alone,) * 3


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


# -- step.py ---------------------------------------------------------------------------------------------------------


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


# -- what they share -------------------------------------------------------------------------------------------------


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


# -- gpu_check.sh ----------------------------------------------------------------------------------------------------


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
