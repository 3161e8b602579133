# SPDX-License-Identifier: Apache-2.0
"""The comparison through its command line, on tiny random models and a few rows: cells, search, table, figure."""

import json
import math
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
for package in ("matplotlib", "peft", "rich", "tokenizers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for it
KINDS = ("a kind of animal", "a sort of number", "some piece of land")


@pytest.fixture(scope="module")
def tiny_encoder(tiny_model, tmp_path_factory):
    """Folder of a random BERT with the byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-bert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def compare(example, tiny_model, tiny_encoder, monkeypatch):
    """The module, with tiny models and rows in the places of the real ones."""
    assets, demo, tasks = example("compare_assets"), example("demo_assets"), example("compare_tasks")
    rows = [assets.Gloss(f"{KINDS[i % 3]} of size {i}", i % 3) for i in range(60)]
    asked = [assets.Question(f"Question: {i}?\nAnswer:", (f" {i}", f" {i + 1}, perhaps"), i % 2) for i in range(6)]
    monkeypatch.setattr(assets, "minilm_folder", lambda: tiny_encoder)
    monkeypatch.setattr(assets, "glosses", lambda folder: list(rows))
    monkeypatch.setattr(assets, "questions", lambda which: list(asked))
    monkeypatch.setattr(demo, "smollm2_folder", lambda: tiny_model)
    monkeypatch.setattr(
        demo, "gsm8k_rows", lambda: [{"question": f"{i} + 1?", "answer": f"It is {i + 1}."} for i in range(30)]
    )
    size = tasks.Size(steps=3, batch=4, max_length=64, validation=6, test=8, seeds=2, rates=1, questions=3)
    for task in tasks.TASKS.values():
        monkeypatch.setattr(task, "sizes", {"default": size})
    # of a layer of 32 the last triplets may be none to speak of, and their residuals large
    monkeypatch.setattr(example("compare_methods"), "VECTORS", 16)
    monkeypatch.setattr(example("compare_plan"), "MOST_EXTENSIONS", 1)
    return example("compare")


def run(compare, output, *more):
    return compare.main(["--jobs", "1", "--output", str(output), *map(str, more)])


def lines(output):
    """Of the results, by task, method, stage, rate and seed."""
    texts = (output / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    results = {text: json.loads(text).get("result") for text in texts}
    names = ("task", "method", "stage", "rate", "seed")
    return {" ".join(str(found[name]) for name in names): text for text, found in results.items() if found}


def test_everything_is_run_and_shown(compare, example, tmp_path):
    assert run(compare, tmp_path) == 0
    methods, tasks = example("compare_methods").METHODS, example("compare_tasks").TASKS
    report = json.loads((tmp_path / "comparison.json").read_text())["tasks"]
    table = (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert [row["method"] for row in report["encoder"]] == [*methods]
    assert {row["method"] for row in report["smollm2"]} == {*example("compare_methods").MAIN} < {*methods}
    for task, rows in report.items():
        assert tasks[task].title in table
        for row in rows:
            known = {float(rate): loss for rate, loss in row["search"].items()}
            untrained = (task, row["method"]) == ("smollm2", "base")
            assert row["seeds"] == ([0] if untrained else [0, 1]) and not row["diverged"]
            assert untrained or row["rate"] == min(known, key=known.__getitem__)
            assert row["loss"]["mean"] == pytest.approx(sum(row["loss"]["values"]) / len(row["seeds"]))
            assert ("accuracy" in row) == (task == "encoder") and ("benchmarks" in row) == (task == "smollm2")
            assert (row["method"] == "base") == (row["trainable"] == 0) != ("adapter_bytes" in row)
            assert f"| {row['label']} | {row['trainable']:,} |" in table
    # d + r numbers of vector methods, r (d + k) of pairs, over the layers [32, 32] x 4, [48, 32] and [32, 48]
    shapes = [(32, 32)] * 4 + [(48, 32), (32, 48)]
    counts = {row["method"]: row["trainable"] for row in report["encoder"]}
    assert counts["osora"] == sum(d + 16 for d, _ in shapes)
    assert counts["osora-s"] == 16 * len(shapes)
    assert counts["osora-o"] == sum(d for d, _ in shapes)
    assert counts["vera"] == counts["osora"]
    assert counts["lora"] == counts["pissa"] == sum(8 * (d + k) for d, k in shapes)
    assert counts["lora1"] == sum(d + k for d, k in shapes)
    assert counts["osora-in"] == sum(k + 16 for _, k in shapes)
    assert counts["sorsa"] == sum(8 * (d + k + 1) for d, k in shapes)
    assert counts["dora"] == counts["lora"] + sum(d for d, _ in shapes)


def test_what_is_there_is_not_run_again(compare, example, tmp_path, monkeypatch):
    some = ("--tasks", "encoder", "--methods", "base", "osora")
    assert run(compare, tmp_path, *some, "--minutes", 0) == compare.UNFINISHED and not lines(tmp_path)
    assert run(compare, tmp_path, *some) == 0
    first = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    assert run(compare, tmp_path, *some, "--minutes", 0) == 0  # nothing is left to start
    assert (tmp_path / "cells.jsonl").read_text(encoding="utf-8") == first

    lost = next(name for name in lines(tmp_path) if "osora final" in name)
    before = json.loads(lines(tmp_path)[lost])
    (tmp_path / "cells.jsonl").write_text(first.replace(lines(tmp_path)[lost], ""), encoding="utf-8")
    assert run(compare, tmp_path, *some) == 0
    *others, again = (tmp_path / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert json.loads(again)["result"] == before["result"]  # the same to the last digit
    assert others == first.replace(next(t for t in first.splitlines(True) if json.loads(t) == before), "").splitlines(
        True
    )

    task = example("compare_tasks").EncoderTask
    monkeypatch.setattr(task, "head_rate", 0.5)  # other settings: other results
    assert run(compare, tmp_path, *some, "--minutes", 0) == compare.UNFINISHED
    assert run(compare, tmp_path, "--tasks", "encoder", "--methods", "base") == 2  # osora's are of the old ones
    assert run(compare, tmp_path, *some) == 0


def test_an_adapter_is_all_that_moves(compare, example):
    """Beside the classifier; and with frozen adapters the methods begin as the same function."""
    cells, methods = example("compare_cells"), example("compare_methods").METHODS
    task = example("compare_tasks").EncoderTask("default", None)
    rows = task.parts["test"][:4]
    wish = None
    for method in methods.values():
        model = task.fresh(5)
        untouched = {name: p.detach().clone() for name, p in model.named_parameters()}
        attached = cells.attach(task, method, 5, model)
        loss = task.loss(model, rows)
        wish = loss if wish is None else wish
        # PiSSA's residual and its pair are each rounded to float32; the sum of 6 layers' differences stays below 1e-4
        torch.testing.assert_close(loss, wish, rtol=1e-4, atol=1e-4)
        step = cells.step_of(task, model, attached, cells.optimizer_of(task, model, attached, 1e-2))
        before = {id(p): p.detach().clone() for group in attached.groups for p in group["params"]}
        for _ in range(2):  # a factor that starts at zero keeps the other from moving in the first step
            step(rows)
        assert all(not torch.equal(p, before[id(p)]) for group in attached.groups for p in group["params"])
        if method.name != "pissa":  # which writes over the base
            for name, parameter in model.named_parameters():
                if name in untouched and not name.startswith("head"):
                    assert torch.equal(parameter, untouched[name]), (method.name, name)


@pytest.mark.parametrize(
    ("function", "best", "asked"),
    [
        (lambda place: abs(place + 5), -5, [-6, -5, -7, -4]),
        (lambda place: abs(place + 9), -9, [-6, -5, -7, -4, -8, -9, -10]),
        (lambda place: abs(place + 2), -2, [-6, -5, -7, -4, -3, -2, -1]),
        (lambda place: -place, 0, [-6, -5, -7, -4, -3, -2, -1, 0]),  # no end: stopped
        (lambda place: None if place > -6 else -place, -6, [-6, -5, -7, -4]),
    ],
)
def test_the_search_goes_on_while_the_best_is_at_an_edge(example, function, best, asked):
    plan, methods = example("compare_plan"), example("compare_methods").METHODS
    size = example("compare_tasks").Size(1, 1, 8, validation=1, test=1, seeds=2, rates=4)
    task, found, places, seeds = plan.Outline("encoder", size, 0.1, {}), {}, [], []
    while cells := plan.in_order([task], {"encoder": ["lora"]}, lambda cell: found.get(cell.which())):
        place = round(2 * math.log10(cells[0].rate))
        (places if cells[0].stage == "search" else seeds).append(place)
        loss = function(place)
        found[cells[0].which()] = {"diverged": True} if loss is None else {"validation": {"loss": loss}}
    assert places == asked and seeds == [best, best]
    assert methods["lora"].rates == (-7, -6, -5, -4)


def test_a_run_that_diverges_is_no_end(compare, example, tmp_path, monkeypatch):
    task = example("compare_tasks").EncoderTask
    loss = task.loss
    monkeypatch.setattr(task, "loss", lambda self, model, rows: loss(self, model, rows) * math.nan)
    assert run(compare, tmp_path, "--tasks", "encoder", "--methods", "lora") == 0
    row = json.loads((tmp_path / "comparison.json").read_text())["tasks"]["encoder"][0]
    assert row["diverged"] == 0 and set(row["search"].values()) == {None} and "loss" not in row


def test_timings(compare, example, tmp_path, monkeypatch, capsys):
    """One process for real, in this one; the turns with a stand-in for the process."""
    timings, methods = example("compare_timings"), example("compare_methods").METHODS
    task = example("compare_tasks").EncoderTask("default", None)
    timings.print_one(task, methods["osora"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["init_seconds"] > 0 and found["step_seconds"] > 0 and found["step_peak_bytes"] > 10**7
    line = json.dumps(found)
    monkeypatch.setattr(
        compare,
        "command_for",
        lambda arguments, *more: [sys.executable, "-S", "-c", f"print('a warning\\n' + {line!r})"],
    )
    some = ("--tasks", "encoder", "--methods", "osora")
    assert run(compare, tmp_path, *some) == 0
    assert "| – | – | – |" in (tmp_path / "comparison.md").read_text()
    assert run(compare, tmp_path, *some, "--timings") == 0
    assert len(json.loads((tmp_path / "timings/encoder/osora.json").read_text())["turns"]) == timings.TURNS
    row = json.loads((tmp_path / "comparison.json").read_text())["tasks"]["encoder"][0]
    assert row["step_seconds"] == found["step_seconds"]
    assert "| – | – | – |" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--jobs", 0), "--jobs must be at least 1"),
        (("--gsm8k", "nowhere"), "no file nowhere"),
        (("--resume", "nowhere"), "no file nowhere"),
        (("--tasks", "x"), "x"),
    ],
)
def test_wrong_requests_say_what_is_wrong(compare, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        run(compare, tmp_path, *more)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_missing_data_is_named(example, tmp_path, monkeypatch, capsys):
    assets = example("compare_assets")
    with pytest.raises(assets.DemoAssetError, match="apt install wordnet-base"):
        assets.glosses(tmp_path)
    (tmp_path / "data.noun").write_text("  licence\n")
    with pytest.raises(assets.DemoAssetError, match="has sha256"):
        assets.glosses(tmp_path)
    line = '00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is; "an example; here"  \n'
    (tmp_path / "data.noun").write_text("  licence\n" + line + line.replace(" 03 ", " 28 ", 1))
    monkeypatch.setattr(assets, "WORDNET_SHA256", assets.sha256_of(tmp_path / "data.noun"))
    assert assets.glosses(tmp_path) == [assets.Gloss("that which is", 0), assets.Gloss("that which is", 25)]
