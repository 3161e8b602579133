# SPDX-License-Identifier: Apache-2.0
"""`osora train`: settings, data, what it writes, and that an interrupted run ends with the bits of a whole one."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import osora_json, osora_says
from conftest import TEMPLATE
from helpers import run_python, tiny_llama
from root import ROOT
from safetensors.torch import load_file
from training_stacks import tokenizer

import osora

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
for package in ("accelerate", "yaml", "huggingface_hub", "typer"):
    pytest.importorskip(package)

from osora.finetuning import TrainSettings, read_settings  # noqa: E402
from osora.finetuning import data as data_module  # noqa: E402
from osora.finetuning import loop as loop_module  # noqa: E402
from osora.finetuning.listener import heeding_sigterm  # noqa: E402

DOCUMENT = ROOT / "docs/cli.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """base/, data.jsonl with a row of every kind, eval.jsonl."""
    folder = tmp_path_factory.mktemp("train")
    tiny_llama().save_pretrained(folder / "base")
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder / "base")
    rows = []
    for i in range(3, 15):
        asked, said = f"w{i} w{i + 1}", " ".join(f"w{i + j}" for j in range(2, 3 + i % 3))
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows += [[{"prompt": asked, "completion": said}, {"messages": chat}, {"text": f"{asked} {said}"}][i % 3]]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    questions = [row for row in rows if "prompt" in row]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, rows[:5])), encoding="utf-8")
    return folder


@pytest.fixture
def here(folders, tmp_path, monkeypatch) -> Path:
    """A working folder with the base and the data."""
    for path in folders.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ["--model", "base", "--data", "data.jsonl", "--device", "cpu", "--rank", "4", "--batch-size", "2"]


def settings(**changes) -> dict:
    """Dropout, accumulation, unequal rows, evaluation and a schedule: whatever a resumption may get wrong."""
    return {
        "model": "base",
        "data": "data.jsonl",
        "eval_data": "eval.jsonl",
        "output": "run",
        "rank": 4,
        "adapter": {"dropout": 0.1},
        "batch_size": 2,
        "gradient_accumulation": 2,
        "steps": 6,
        "eval_steps": 2,
        "log_steps": 1,
        "save_steps": 2,
        "device": "cpu",
        **changes,
    }


def write(name: str, values: dict) -> str:
    Path(name).write_text(json.dumps(values), encoding="utf-8")
    return name


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/adapter/adapter_model.safetensors")


def interrupt(monkeypatch, step: int) -> None:
    def on_step_end(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop_module.Told, "on_step_end", on_step_end)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "sorsa", "bf16": True, "gradient_checkpointing": True, "save_basis": False}],
    ids=["osora", "sorsa"],
)
def test_interrupted_and_resumed_is_as_uninterrupted(changes, here, monkeypatch):
    whole = osora_json("train", write("run.json", settings(**changes)))
    assert whole["steps"] == 6 and [step for step, _ in whole["losses"]["training"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in whole["losses"]["evaluation"]] == [0, 2, 4, 6]
    with monkeypatch.context() as change:
        interrupt(change, 5)  # the step after a checkpoint, whose work is lost
        osora_json("train", "run.json", "--output", "cut", code=130)
    assert not Path("cut/adapter").exists() and not Path("cut/report.json").exists()
    half = Path("cut/checkpoints/checkpoint-5")  # as when it ended in the middle of a checkpoint
    shutil.copytree("cut/checkpoints/checkpoint-4", half)
    (half / "trainer_state.json").unlink()
    resumed = osora_json("train", "run.json", "--output", "cut", "--resume", "--save-steps", "3")
    assert resumed["resumed_from"] == "cut/checkpoints/checkpoint-4" and "not complete" in resumed["warnings"][0]
    assert resumed["losses"] == whole["losses"]
    ours, theirs = adapter("cut"), adapter("run")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(value.abs().max() > 0 for name, value in ours.items() if name.endswith("_s.weight"))
    assert "the run is finished" in osora_json("train", "run.json", "--resume", code=2)["error"]


def test_sigterm_ends_with_a_checkpoint_from_which_it_goes_on(here):
    """As a scheduler sends it; the run that goes on ends with the bits of a whole one."""
    whole = osora_json("train", write("run.json", settings(save_steps=100)))
    program = """
import os, signal, sys
from osora.cli import main
from osora.finetuning import loop
step = loop.Told.on_step_end
def on_step_end(self, args, state, control, **more):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    step(self, args, state, control, **more)
loop.Told.on_step_end = on_step_end
print(main(["train", "run.json", "--output", "cut", "--json"]))
"""
    said = run_python(program)
    assert said.split()[-1] == "143" and "stopped by SIGTERM after step 3 of 6" in said and "--resume" in said
    assert not Path("cut/report.json").exists() and Path("cut/checkpoints/checkpoint-3/trainer_state.json").exists()
    resumed = osora_json("train", "run.json", "--output", "cut", "--resume")
    assert resumed["losses"] == whole["losses"]
    ours, theirs = adapter("cut"), adapter("run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_sigterm_is_not_heeded_and_the_handler_goes():
    before = signal.getsignal(signal.SIGTERM)
    with heeding_sigterm() as request:
        assert not request.made and signal.getsignal(signal.SIGTERM) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made and signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_says_what_to_do(here, monkeypatch):
    interrupt(monkeypatch, 1)
    error = osora_json("train", write("run.json", settings()), code=130)["error"]
    assert error == "interrupted: --resume goes on from the last checkpoint"


def test_a_run_is_made_longer(here, monkeypatch):
    """With a constant schedule to the bits of a run that was as long from the start; finished or interrupted."""
    usual = {"schedule": "constant", "warmup": 0, "eval_data": None, "eval_steps": None}
    whole = osora_json("train", write("long.json", settings(**usual, output="long")))
    osora_json("train", write("short.json", settings(**usual, output="short", steps=2)))
    longer = osora_json("train", "short.json", "--resume", "--steps", 4)
    assert longer["steps"] == 4 and longer["losses"]["training"] == whole["losses"]["training"][:4]
    with monkeypatch.context() as change:
        interrupt(change, 5)
        osora_json("train", "short.json", "--resume", "--steps", 6, code=130)
    assert not Path("short/report.json").exists()
    assert "steps was 6, is 4" in osora_json("train", "short.json", "--resume", "--steps", 4, code=2)["error"]
    done = osora_json("train", "short.json", "--resume", "--steps", 6)
    assert done["steps"] == 6 and done["losses"] == whole["losses"]
    ours, theirs = adapter("short"), adapter("long")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = osora_json("train", "short.json", "--resume", "--steps", 6, code=2)["error"]
    assert "the run is finished" in again and "lengthen it" in again
    unit = osora_json("train", "short.json", "--resume", "--epochs", 9, code=2)["error"]
    assert "was to have 6 steps: say its new length as steps too" in unit


def test_a_run_of_epochs_is_made_longer(here):
    osora_json("train", *SMALL, "--output", "run")  # one epoch, unsaid
    longer = osora_json("train", *SMALL, "--output", "run", "--resume", "--epochs", "1.5")
    assert longer["steps"] == 9 and longer["resumed_from"] == "run/checkpoints/checkpoint-6"
    error = osora_json("train", *SMALL, "--output", "run", "--resume", "--steps", "20", code=2)["error"]
    assert "was to have 1.5 epochs" in error


@pytest.mark.parametrize("changes", [{"adapter": {"dropout": 0.1}}, {"method": "sorsa", "save_basis": False}])
def test_a_run_begins_with_an_adapter(changes, here):
    """With its method, rank and options, and with what it has learnt."""
    osora_json("train", write("run.json", settings(**changes)))
    more = ["--data", "data.jsonl", "--eval-data", "eval.jsonl", "--steps", 1, "--device", "cpu"]
    report = osora_json("train", "--model", "base", *more, "--start", "run/adapter", "--output", "more", "--lr", "1e-9")
    first = json.loads(Path("run/report.json").read_text())
    assert report["settings"]["rank"] == 4 and report["settings"]["method"] == first["settings"]["method"]
    assert report["settings"]["save_basis"] == first["settings"]["save_basis"]
    assert report["losses"]["evaluation"][0][1] == pytest.approx(first["losses"]["evaluation"][-1][1], abs=1e-5)
    assert osora.adapter_info("more/adapter").config == osora.adapter_info("run/adapter").config
    for given, words in ((["--rank", "8"], "r is 4 there, 8 here"), (["--start", "nowhere"], "no adapter here")):
        command = ["train", "--model", "base", *more, "--start", "run/adapter", "--output", "x", *given]
        assert words in osora_json(*command, code=2)["error"]
        assert not Path("x").exists()


def test_it_learns_and_writes_what_loads(here):
    before = {path.name: path.read_bytes() for path in Path("base").iterdir()}
    text = osora_says("train", *SMALL, "--eval-data", "eval.jsonl", "--steps", 20, "--lr", 0.05, "--output", "run")
    assert "adapter" in text and "evaluation loss" in text
    assert {path.name for path in Path("run").iterdir()} == {"adapter", "checkpoints", "report.json", "settings.json"}
    report = json.loads(Path("run/report.json").read_text())
    first, last = (loss for _, loss in report["losses"]["evaluation"])
    assert last < first - 0.3
    assert report["adapter_bytes"] == sum(path.stat().st_size for path in Path("run/adapter").iterdir())
    assert report["rows"] == {"training": 12, "training_too_long": 0, "evaluation": 5, "evaluation_too_long": 0}
    card = Path("run/adapter/README.md").read_text()
    assert "OSoRA" in card and "certificate" in card
    assert osora_json("verify", "run/adapter", "base")["ok"]
    assert {path.name: path.read_bytes() for path in Path("base").iterdir()} == before
    info = osora.adapter_info("run/checkpoints/checkpoint-20")
    assert info.trainable == report["trainable"] == osora.adapter_info("run/adapter").trainable

    # The last evaluation, by another way: one row after the other, without padding.
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    words, total, count = transformers.AutoTokenizer.from_pretrained("base"), 0.0, 0
    osora.load_adapter(model, "run/adapter").eval()
    for example in data_module.encode_all(words, data_module.read_jsonl(Path("eval.jsonl")), 64, "")[0]:
        ids = torch.tensor([example.prompt + example.answer])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        answer = logits[max(len(example.prompt), 1) - 1 :]
        total, count = total - answer.sum().item(), count + len(answer)
    assert last == pytest.approx(total / count, rel=1e-5)  # float32 sums in another order


def test_the_seed_decides(here):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        osora_json("train", *SMALL, "--steps", 2, "--seed", seed, "--output", name)
    assert all(torch.equal(adapter("a")[name], value) for name, value in adapter("b").items())
    changed = [name for name, value in adapter("c").items() if name.endswith("osora_o.weight")]
    assert changed and not all(torch.equal(adapter("a")[name], adapter("c")[name]) for name in changed)


def test_the_gradient_is_that_of_all_answer_tokens(here):
    """Of one step over all rows, in one batch or accumulated from unequal ones: the mean over tokens, not batches."""
    for name, batch, parts in (("one", 12, 1), ("many", 2, 6)):
        values = settings(output=name, batch_size=batch, gradient_accumulation=parts, steps=1, adapter={}, warmup=0)
        osora_json("train", write("run.json", values | {"schedule": "constant", "eval_steps": None}))
    # Adam's first step is the gradient's sign times lr, so equal signs make equal values; float32 sums differ.
    scales = {name: value for name, value in adapter("one").items() if name.endswith("osora_o.weight")}
    assert len(scales) == 14 and all(value.abs().max() > 1e-3 for value in scales.values())
    for name, value in scales.items():
        close = (value - adapter("many")[name]).abs() <= 1e-4
        assert close.float().mean() > 0.97, name
    one, many = (json.loads(Path(f"{name}/report.json").read_text())["losses"] for name in ("one", "many"))
    assert one["training"][0][1] == pytest.approx(many["training"][0][1], rel=1e-5)
    assert one["evaluation"][0][1] == pytest.approx(many["evaluation"][0][1], rel=1e-5)


FORMS = {
    "run.yaml": "model: base\ndata: data.jsonl\noutput: run\nlr: 5e-3\nweight_decay: 1\nadapter: {dropout: 0.1}\n",
    "run.toml": "model='base'\ndata='data.jsonl'\noutput='run'\nlr=5e-3\nweight_decay=1\n[adapter]\ndropout=0.1\n",
    "run.json": '{"model": "base", "data": "data.jsonl", "output": "run", "lr": 5e-3, "weight_decay": 1,'
    ' "adapter": {"dropout": 0.1}}',
}


@pytest.mark.parametrize("name", FORMS)
def test_files_of_settings(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    found = TrainSettings.from_dict(read_settings(tmp_path / name))
    assert found.lr == 0.005 and found.weight_decay == 1.0 and found.config == osora.OsoraConfig(r=64, dropout=0.1)
    assert TrainSettings.from_dict(found.to_dict()) == found


def test_settings_that_follow_from_others():
    def made(**changes):
        return TrainSettings(model="m", data="d", output="o", **changes)

    assert made().rates["relative_s"] and made().rates["lr"] == 1e-2 and made().config.tol == 1e-3
    sorsa = made(method="sorsa", adapter={"gamma": 0.5}, save_basis=False)
    assert sorsa.config == osora.SorsaConfig(r=64, gamma=0.5, tol=1e-4) and not sorsa.rates["relative_s"]
    assert not made(adapter={"train": "o"}).rates["relative_s"]


# Changes of the settings, and words of the error. None of them may load the model or write anything.
REFUSED = {
    "unknown": ({"learning_rate": 1}, "there is no setting 'learning_rate'.*The settings are model, data"),
    "a near one": ({"epoch": 1}, "did you mean epochs"),
    "missing": ({"model": None}, r"the setting model is missing \(--model\)"),
    "no model": ({"model": "nowhere"}, "there is no nowhere/config.json"),
    "no data": ({"data": "nowhere"}, "there is no file nowhere"),
    "text for a number": ({"lr": "fast"}, "lr must be a number, got 'fast'"),
    "nan": ({"lr": math.nan}, "lr must be a finite number above 0"),
    "true for a number": ({"rank": True}, "rank must be a whole number"),
    "method": ({"method": "lora"}, "method must be one of osora, sorsa, got 'lora'"),
    "another method's option": ({"adapter": {"gamma": 1}}, "adapter: OsoraConfig has no field gamma"),
    "rank twice": ({"adapter": {"r": 4}}, "adapter.r is set by rank"),
    "rate of nothing": ({"lr_u": 0.1}, "lr_u is given, but what is trained is o, s"),
    "both": ({"epochs": 1}, "steps .6. and epochs .1. are both given"),
    "evaluation of nothing": ({"eval_data": None}, "eval_steps is given, but no eval_data"),
    "tol": ({"save_basis": False, "adapter": {"tol": 1e-3}}, "needs at most 1e-4"),
    "no such layer": ({"adapter": {"target_modules": ["nothing"]}}, "nothing"),
    "too short": ({"data": "questions.jsonl", "max_length": 2}, "longer than --max-length 2"),
    "output in use": ({"output": "."}, "exists and is not empty.*--resume"),
    "nothing to resume": ({"resume": True}, "nothing to resume: there is no run/settings.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_the_model_is_loaded(case, here, monkeypatch):
    changes, words = REFUSED[case]
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    name = write("run.json", settings(**changes))
    before = sorted(path.name for path in here.iterdir())
    error = osora_json("train", name, code=2)["error"]
    assert re.search(words, error), error
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "w3", "completion": "w4"}\n{"prompt": "w3"}\n', "line 2: the field 'completion' is missing"),
        ('{"text": "w3 w4"}\n\n{"text": \n', "line 3: not JSON"),
        ('{"instruction": "w3"}', "line 1: needs .*the fields found are: 'instruction'"),
        ('{"messages": [{"role": "user", "content": "w3"}]}', "line 1: 'messages' must be a list of at least two"),
        (
            r'{"text": "w3 w4"}' + "\n" + r'{"text": "w3 \ud83d"}',
            r"line 2: 'text' has half a character, \\ud83d at position 3",
        ),
        (r'{"prompt": "\udca9 w3", "completion": "w4"}', r"line 1: 'prompt' has half a character, \\udca9 .*whole or"),
        (
            r'{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "\ud83d"}]}',
            "line 1, message 2: 'content' has half a character",
        ),
        ('{"text": "w3 w4"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: nested too deeply"),
        ('{"text": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", "line 1: nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "line 1: .*digits"),
    ],
)
def test_bad_data_is_refused_with_its_line(content, words, here):
    Path("bad.jsonl").write_text(content)
    for key in ("data", "eval_data"):
        error = osora_json("train", write("run.json", settings(**{key: "bad.jsonl"})), code=2)["error"]
        assert re.search(words, error) and "bad.jsonl" in error
    assert not Path("run").exists()


MARKED = (
    "{% for m in messages %}{{ m['role'] }} w9 {{ m['content'] | trim }}MARK{% endfor %}"
    "{% if add_generation_prompt %}assistant w9 {% endif %}"
)


@pytest.mark.parametrize(
    ("mark", "kept"),
    [("\n", "\n"), ("", ""), (" \n\n", " \n\n"), (" w96 \n", " w96"), (" </s>\n", " </s>")],
    ids=["newline", "nothing", "blanks", "a word", "an end token"],
)
@pytest.mark.parametrize("answer", ["w5 w6", " w5 w6\n", "w96"])
def test_answers_end_in_a_mark_or_an_end_token(mark, kept, answer):
    """Without one a model never learns to stop, and the line break that the template puts there was cut."""
    words = tokenizer()
    words.add_tokens(["\n"])
    words.chat_template = MARKED.replace("MARK", mark.replace("\n", "\\n").join(("{{ '", "' }}")) if mark else "")
    row = data_module.parse_row({"prompt": "w3", "completion": answer}, "here")
    example = data_module.encode(words, row, 64)
    wish = words(answer.strip() + kept, add_special_tokens=False).input_ids
    assert example.answer == wish + ([] if kept.strip() else [words.eos_token_id])
    assert example.prompt == words("user w9 w3" + mark + "assistant w9 ", add_special_tokens=False).input_ids


def test_an_answer_that_the_template_rewrites_has_its_end_too():
    words = tokenizer()
    words.chat_template = MARKED.replace("m['content'] | trim", "m['content'] | upper").replace("MARK", "\n")
    row = data_module.parse_row({"prompt": "w3", "completion": "w5"}, "here")
    assert data_module.encode(words, row, 64).answer[-1] == words.eos_token_id


@pytest.mark.parametrize("template", [MARKED.replace("MARK", "\n"), None])
def test_no_mark_and_no_end_token_is_an_error_that_names_the_template(template, here):
    Path("base").unlink()
    tiny_llama().save_pretrained("base")
    words = tokenizer()
    words.chat_template, words.eos_token = template, None
    words.save_pretrained("base")
    error = osora_json("train", write("run.json", settings(data="questions.jsonl")), code=2)["error"]
    assert "questions.jsonl, line 1" in error and "no end token" in error and "chat_template" in error
    assert ("chat template ends an answer with '\\n', which is no mark" if template else "no chat template") in error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("run.txt", "", "ends in .yaml, .yml, .toml, .json"),
        ("run.yaml", "a: [1", "not YAML"),
        ("run.yaml", "lr: 1\nlr: 2\n", "'lr' is given twice"),
        ("run.json", '{"lr": 1, "lr": 2}', "'lr' is given twice"),
        ("run.toml", "lr = ", "run.toml: "),
        ("run.json", '{"lr": ' + "[" * 100_000, "run.json: nested too deeply"),
        ("run.yaml", "- lr\n", "must map settings to values"),
    ],
)
def test_bad_files_of_settings(name, content, words, here):
    Path(name).write_text(content)
    assert words in osora_json("train", name, code=2)["error"]


def test_another_run_is_not_resumed(here, monkeypatch):
    with monkeypatch.context() as change:
        interrupt(change, 1)
        osora_json("train", write("run.json", settings()), code=130)
    assert "lr was None, is 0.5" in osora_json("train", "run.json", "--resume", "--lr", 0.5, code=2)["error"]
    Path("other.jsonl").write_text(Path("data.jsonl").read_text() + '\n{"text": "w3 w4"}\n')
    error = osora_json("train", "run.json", "--resume", "--data", "other.jsonl", code=2)["error"]
    assert "sha256 of data was" in error
    started = osora_json("train", "run.json", "--resume")  # interrupted before any checkpoint
    assert started["resumed_from"] is None and started["steps"] == 6


def test_a_loss_that_is_no_number_stops_the_run(here):
    error = osora_json("train", write("run.json", settings(lr=1e30, max_grad_norm=0, warmup=0)), code=2)["error"]
    assert re.search(r"loss is (nan|inf) at step \d: try a smaller lr", error)
    assert not Path("run/adapter").exists()


def test_packages_are_asked_for_and_imported_late(tmp_path):
    program = """
import sys
from osora.cli import main
assert main(["--version"]) == 0
import osora.finetuning
assert not {"transformers", "accelerate", "yaml"} & set(sys.modules)
sys.modules["yaml"] = None
name = sys.argv[1] + "/run.yaml"
open(name, "w").write("lr: 1")
print(main(["train", name]))
"""
    assert run_python(program, tmp_path).splitlines()[-1] == "3"


def test_the_document_names_every_setting():
    text = DOCUMENT.read_text(encoding="utf-8")
    for setting in fields(TrainSettings):
        assert re.search(rf"^\| (`\w+`, )*`{setting.name}`", text, flags=re.MULTILINE), setting.name
