# SPDX-License-Identifier: Apache-2.0
"""bench/init.py checks every layer before it times, and refuses a wrong answer."""

import dataclasses
import re

import pytest
import torch
from benches import (
    assert_complete,
    only_result,
    quick,
    spoil_converged,
    spoil_residuals,
    spoil_sigma,
    spoil_vectors,
    spoil_with_nan,
)

import osora
from osora.model import decompose
from osora.model.targets import find_targets

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT and transformers, our peers

# -- init.py -----------------------------------------------------------------------------------------------------------


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
    right = decompose.decompose

    def wrong(weights, rank, *, names, **options):
        found = right(weights, rank, names=names, **options)
        return [spoil(item) if item.name.endswith("1.mlp.up_proj") else item for item in found]

    monkeypatch.setattr(decompose, "decompose", wrong)
    monkeypatch.setattr(bench("init"), "interleaved", lambda *a, **k: pytest.fail("it was timed"))
    assert bench("init").main(quick(tmp_path, "--dtype", "float32")) == 1
    shown = capsys.readouterr()
    assert re.search(rf"layers\.1\.mlp\.up_proj: .*{re.escape(complaint)}", shown.err)
    assert "osora / this" not in shown.out
    assert list(tmp_path.iterdir()) == []


# -- init.py on the model whose truth is known -------------------------------------------------------------------------


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
    right, pissa, given = decompose.decompose, bench("init").PissaLayers, []

    def wrong(weights, rank, *, names, **options):
        found = right(weights, rank, names=names, **options)
        return [spoil(item) if item.name.endswith("0.self_attn.q_proj") else item for item in found]

    class Watched(pissa):
        def __init__(self, *arguments):
            given.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(decompose, "decompose", wrong)
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
