# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' code for a card, run without one: a stand-in gives events and graphs (tests/support/cards.py).

Nothing here looks at how long anything took.
"""

import argparse
import dataclasses
import json

import pytest
import torch
from benches import only_result
from cards import Card, pretend

for package in ("peft", "rich", "transformers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT, our peer
QUICK = ("--preset", "quick", "--threads", "1", "--shapes", "96x64", "--rows", "24", "--ranks", "4")


def test_events_stand_around_all_of_a_call(bench, monkeypatch):
    card, order = pretend(monkeypatch, bench, Card()), []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = bench("measure").interleaved(calls, 2, warm_up=1, each=4)
    assert "".join(order) == "cababcbca" and card.waits == 2 * len(order)
    assert all(len(times[name].seconds) == 2 for name in "abc")


def test_what_each_call_does_several_times_is_divided(bench):
    clock, measure = bench("clock"), bench("measure")

    class Slow(Card):
        def event(self):
            event = super().event()
            event.elapsed_time = lambda end: 12_000.0
            return event

    assert clock.seconds_of(lambda: None, Slow()) == 12
    with pytest.MonkeyPatch.context() as change:
        change.setattr(clock, "card_of", lambda device: Slow())
        assert measure.interleaved({"a": lambda: None}, 1, each=4)["a"].seconds == (3,)


def test_sets_are_larger_than_the_cache(bench):
    sets = bench("clock").sets_for
    assert sets(None, 10) == 1
    card = Card(cache=50 * 10**6)
    assert sets(card, 2 * 4096 * 4096) == 3 and sets(card, 10**9) == 1 and sets(card, 0) == sets(card, 1) == 16


def test_what_cannot_be_captured_is_said_and_the_rest_goes_on(bench):
    refused = lambda: None  # noqa: E731
    card = Card(refuses=lambda call: call is refused)
    replays, reasons = bench("clock").graphs({"a": lambda: 1, "b": refused, "c": lambda: 2}, card)
    assert list(replays) == ["a", "c"] and card.replays == 2
    assert reasons == {"b": "RuntimeError: operation not permitted when stream is capturing"}


def test_linear_on_a_card(bench, tmp_path, monkeypatch, capsys):
    card = pretend(monkeypatch, bench, Card(cache=30_000))
    seen = []
    step = bench("linear_cases").Step.__call__
    monkeypatch.setattr(
        bench("linear_cases").Step, "__call__", lambda self: seen.append((self.layer, self.x)) or step(self)
    )
    monkeypatch.setenv("OSORA_RESULTS_JSONL", str(tmp_path / "lines"))
    peers = ("frozen", "osora", "lora")
    words = [*QUICK, "--dtypes", "float32", "bfloat16", "--no-multi", "--output", str(tmp_path / "json")]
    assert bench("linear").main([*words, "--peers", *peers]) == 0
    result = only_result(tmp_path / "json")
    wide, narrow = result["results"]
    # Twice the cache over W, x and dy of one: 60,000 over 4 (or 2) bytes of 96·64 + 24·160 numbers.
    assert (wide["sets"], narrow["sets"]) == (2, 4)
    for case in (wide, narrow):
        for row in case["peers"]:
            assert row["graph"]["median"] > 0 and row["graph_forward"]["median"] > 0
            assert ("graph_over_frozen" in row) == (row["peer"] != "frozen")
            assert ("graph_osora_over_this" in row) == (row["peer"] == "lora")
            assert len(row["graph"]["all"]) == len(row["step"]["all"])
    assert card.captures == 2 * 2 * len(peers)
    layers = {id(layer) for layer, _ in seen}
    assert len(layers) == (2 + 4) * len(peers)
    for layer in layers:  # each layer has an x of its own, and never meets another's
        assert len({id(x) for other, x in seen if id(other) == layer}) == 1
    weights = {layer.weight.data_ptr() for layer, _ in seen if type(layer) is torch.nn.Linear}
    assert len(weights) == 2 + 4
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text(encoding="utf-8").splitlines()]
    assert [line["case"]["dtype"] for line in lines if "case" in line] == ["float32", "bfloat16"]
    assert "graph " in capsys.readouterr().out


def test_a_layer_that_cannot_be_captured_has_its_other_times(bench, tmp_path, monkeypatch):
    pretend(monkeypatch, bench, Card(refuses=lambda call: True))
    words = [*QUICK, "--dtypes", "float32", "--no-multi", "--peers", "frozen", "osora", "--output", str(tmp_path)]
    assert bench("linear").main(words) == 0
    (case,) = only_result(tmp_path)["results"]
    for row in case["peers"]:
        assert "graph" not in row and "stream is capturing" in row["no_graph"] and row["step"]["median"] > 0


def test_many_adapters_on_a_card(bench, tmp_path, monkeypatch):
    card = pretend(monkeypatch, bench, Card(cache=60_000))
    words = [*QUICK[:-4], "--rows", "3", "--ranks", "4", "--dtypes", "float32", "--peers", "frozen", "osora", "lora"]
    assert bench("linear").main([*words, "--output", str(tmp_path)]) == 0
    (part,) = only_result(tmp_path)["multi"]
    assert part["sets"] > 1 and card.replays
    for peer in part["peers"]:
        assert peer["seconds"]["median"] > 0 and peer["graph"]["median"] > 0
        assert peer["graph_over_one"]["median"] > 0


def test_the_linears_of_a_model_on_a_card(bench, tmp_path, monkeypatch, capsys):
    card = pretend(monkeypatch, bench, Card())
    words = ["--device", "cpu", "--scale", "64", "--blocks", "2", "--rows", "4", "--rank", "8", "--repetitions", "2"]
    assert bench("llama").main([*words, "--output", str(tmp_path)]) == 0
    results = only_result(tmp_path)["results"]
    found = results["attach"]
    assert found["matrices"] == 14 and found["unconverged"] == 0 and found["worst_residual"] <= 1e-3
    assert sum(count for *_, count in found["batches"]) == 14 and results["lowrank"]["measured"] == 8
    assert f"measured on 8 of {found['matrices']}" in capsys.readouterr().out
    assert list(results["block"]["peers"]) == ["frozen", "osora", "lora"] and results["block"]["floor"] > 1
    assert results["decode"]["linears"] == 14 and list(results["decode"]["peers"]) == ["frozen", "osora"]
    for part in ("block", "decode"):
        assert results[part]["peers"]["osora"]["graph_over_frozen"]["median"] > 0
        assert results[part]["peers"]["osora"]["queued_over_frozen"]["median"] > 0
    assert "queued_over_lora" in results["block"]["peers"]["osora"] and card.captures == 5


def test_the_linears_of_a_model_are_many(bench):
    """Memory of its own for each, other numbers, the same singular values; 224 of the model's shapes."""
    llama = bench("llama")
    assert 32 * len(llama.LINEARS) == 224 and llama.BLOCKS == 32
    options = argparse.Namespace(device="cpu", dtype="bfloat16", rank=4, scale=128, blocks=9, seed=0)
    model = llama.make_model(options)
    weights = [linear.weight for block in model.module for linear in block.values()]
    assert len({weight.data_ptr() for weight in weights}) == len(weights) == 63 == len(model.origin)
    same = [weight for weight in weights if weight.shape == (32, 32)]
    assert not any(torch.equal(a, b) for place, a in enumerate(same) for b in same[:place])
    first, turned = same[0], same[8]
    torch.testing.assert_close(torch.linalg.svdvals(first.double()), torch.linalg.svdvals(turned.double()))
    assert model.origin["0.q_proj"] == model.origin["2.q_proj"] == 0  # four of this shape in a block, eight are made


@pytest.mark.parametrize("spoil, complaint", [("residuals", "is reported"), ("S", "a singular value is off by")])
def test_wrong_factors_are_refused(bench, tmp_path, monkeypatch, capsys, spoil, complaint):
    llama, right = bench("llama"), bench("llama").decompose_targets

    def wrong(*arguments, **options):
        for target, factors in right(*arguments, **options):
            value = getattr(factors, spoil)
            spoilt = value + 1e-2 if spoil == "residuals" else value * (1 + 3e-4)
            yield target, dataclasses.replace(factors, **{spoil: spoilt})

    monkeypatch.setattr(llama, "decompose_targets", wrong)
    words = ["attach", "--device", "cpu", "--scale", "64", "--blocks", "1", "--rank", "8", "--output", str(tmp_path)]
    assert llama.main(words) == 1
    assert complaint in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_step_of_training_on_a_card(bench, tmp_path, monkeypatch, capsys):
    card = pretend(monkeypatch, bench, Card())
    words = ["--quick", "--threads", "1", "--no-memory", "--dtype", "float32", "--output", str(tmp_path)]
    assert bench("step").main(words) == 0
    (part,) = only_result(tmp_path)["results"]
    assert card.captures == len(part["peers"])
    for name, facts in part["peers"].items():
        assert ("graph_over_frozen" in facts) == (name != "frozen") and facts["graph"]["median"] > 0
    assert "osora / frozen in a graph" in capsys.readouterr().out


def test_init_and_svd_on_a_card(bench, tmp_path, monkeypatch):
    card = pretend(monkeypatch, bench, Card())
    assert bench("init").main(["--quick", "--threads", "1", "--dtype", "float32", "--output", str(tmp_path / "a")]) == 0
    assert card.waits
    waits = card.waits
    words = ["--preset", "quick", "--threads", "1", "--shapes", "96x64", "--batch", "1", "--peers", "lowrank-4"]
    assert bench("svd").main([*words, "--output", str(tmp_path / "b")]) == 0
    assert card.waits > waits
