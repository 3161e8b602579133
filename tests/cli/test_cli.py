# SPDX-License-Identifier: Apache-2.0
"""The command line: what it says, what it writes, and its exit codes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import osora_json, osora_says
from helpers import move_adapter, run_python, tiny_gpt2, tiny_llama
from root import ROOT
from safetensors.torch import load_file
from training_stacks import tokenizer

import osora

typer_testing = pytest.importorskip("typer.testing")
from osora.cli.app import run  # noqa: E402  (it needs typer)

DOCUMENT = ROOT / "docs/cli.md"


@pytest.fixture
def folders(tmp_path) -> Path:
    """base/, adapter/ with its basis and small/ without; the working directory."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=5, tol=1e-4, rank_pattern={"v_proj": 3}))
    move_adapter(model)
    osora.save_adapter(model, tmp_path / "adapter")
    osora.save_adapter(model, tmp_path / "small", save_basis=False)
    return tmp_path


def test_help_teaches():
    top = osora_says("--help")
    for command in ("info", "verify", "merge", "export-lora", "init", "train", "card"):
        assert command in top
        text = osora_says(command, "--help")
        assert "Examples" in text and f"osora {command}" in text, command
    assert "Exit codes" in top
    assert osora_says("--version").strip() == osora.__version__


def test_info(folders):
    text = osora_says("info", folders / "adapter", "--modules")
    for words in (
        "osora",
        "14, their weights in float32",
        "3 to 5",
        "largest residual",
        "in the file",
        "q_proj  32 x 32",
    ):
        assert words in text
    found = osora_json("info", folders / "small")
    info = osora.adapter_info(folders / "small")
    model = osora.load_adapter(tiny_llama(), folders / "small")
    assert found["trainable"] == info.trainable == osora.summary(model).trainable
    assert found["method"] == "osora" and found["ranks"] == [3, 5] and not found["has_basis"]
    assert found["bytes"] == sum(path.stat().st_size for path in (folders / "small").iterdir() if path.suffix != ".md")
    assert found["max_residual"] == osora.summary(model).max_residual <= 1e-4 and found["warnings"] == []
    assert [m["name"] for m in found["modules"]] == [m.name for m in osora.summary(model).modules]
    assert found["config"]["rank_pattern"] == {"v_proj": 3}


@pytest.mark.parametrize("name", ["adapter", "small"])
def test_verify(name, folders):
    text = osora_says("verify", folders / name, folders / "base")
    assert "14 of 14 are the adapter's, to the last bit" in text and "as it claims to be" in text
    found = osora_json("verify", folders / name, folders / "base")
    assert found["ok"] and len(found["modules"]) == 14
    assert all(m["residual"] <= 1e-4 and m["same_bits"] and m["orthonormal"] < 1e-5 for m in found["modules"])


def test_verify_finds_what_loading_believes(folders):
    """A basis that is not the weight's, saved with fingerprints that fit it."""
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=5, tol=1e-4))
    model.model.layers[1].mlp.up_proj.U.add_(0.01 * torch.randn(56, 5))
    osora.save_adapter(model, folders / "adapter")
    osora.load_adapter(tiny_llama(), folders / "adapter")
    text = osora_says("verify", folders / "adapter", folders / "base", code=1)
    assert "layers.1.mlp.up_proj: residual" in text and "1 LAYERS ARE LESS EXACT" in text
    found = osora_json("verify", folders / "adapter", folders / "base", code=1)
    assert [m["name"] for m in found["modules"] if not m["ok"]] == ["model.layers.1.mlp.up_proj"]


def test_verify_a_weight_of_zeros(tmp_path):
    """It has no singular value to divide a residual by."""
    base = tiny_llama()
    torch.nn.init.zeros_(base.model.layers[0].mlp.up_proj.weight)
    base.save_pretrained(tmp_path / "base")
    osora.save_adapter(move_adapter(osora.attach(base, osora.OsoraConfig(r=5))), tmp_path / "adapter")
    found = osora_json("verify", tmp_path / "adapter", tmp_path / "base")
    residuals = {module["name"]: module["residual"] for module in found["modules"]}
    assert found["ok"] and residuals["model.layers.0.mlp.up_proj"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_verify_in_16_bits(dtype, tmp_path):
    """The vectors' rounding is no error, and another dtype is told."""
    model = osora.attach(tiny_llama(dtype=dtype), osora.OsoraConfig(r=5))
    osora.save_adapter(move_adapter(model), tmp_path / "adapter")
    tiny_llama(dtype=dtype).save_pretrained(tmp_path / "base")
    assert osora_json("verify", tmp_path / "adapter", tmp_path / "base")["ok"]
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path / "other")
    found = osora_json("verify", tmp_path / "adapter", tmp_path / "other")
    assert found["ok"] and not any(m["same_bits"] for m in found["modules"])
    assert "rounded to another dtype" in found["warnings"][0]


def test_merge(folders):
    text = osora_says("merge", folders / "base", folders / "small", folders / "out")
    assert "14 weights merged" in text
    found = osora_json("merge", folders / "base", folders / "adapter", folders / "out2")
    assert len(found["merged"]) == 14 and found["left_out"] == []
    model = osora.load_adapter(tiny_llama(), folders / "adapter")
    wish = osora.detach(model, merged=True).state_dict()
    for out in ("out", "out2"):
        merged = load_file(folders / out / "model.safetensors")
        assert all(torch.equal(tensor, wish[name]) for name, tensor in merged.items())


def test_export_lora(folders):
    text = osora_says("export-lora", folders / "adapter", folders / "lora")
    assert "PeftModel.from_pretrained" in text
    osora_says("export-lora", folders / "small", folders / "lora2", "--base", folders / "base", "--equal-ranks")
    shapes = [
        {k: t.shape for k, t in load_file(folders / name / "adapter_model.safetensors").items()}
        for name in ("lora", "lora2")
    ]
    v_proj = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    assert shapes[0].keys() == shapes[1].keys() and shapes[0][v_proj] == (3, 32) and shapes[1][v_proj] == (5, 32)
    found = osora_json("export-lora", folders / "adapter", folders / "lora")
    assert found["bytes"] > 0 and "layers have ranks from 3 to 5" in found["warnings"][0]
    assert osora_json("export-lora", folders / "adapter", folders / "lora", "--own-ranks")["warnings"] == []


@pytest.mark.parametrize("order", ["adapter base", "base adapter"])
def test_adapter_and_base_in_either_order(order, folders):
    """verify wanted one, merge the other; which is which can be seen."""
    both = [folders / name for name in order.split()]
    assert osora_json("verify", *both)["ok"]
    out = folders / "merged"
    assert len(osora_json("merge", *both, out)["merged"]) == 14
    wish = osora.merge_saved(folders / "base", folders / "adapter", folders / "wish").folder
    assert (out / "model.safetensors").read_bytes() == (wish / "model.safetensors").read_bytes()


def test_a_bar_is_closed_before_a_line_is_said(folders):
    """On a terminal the bar's last line ended in the result's first."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "osora", "merge", "adapter", "base", "merged"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(words, cwd=folders, stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # how a terminal ends
        pass
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"14/14[^\n]*\n(\s*\n)*14 weights merged, ", plain.replace("\r", "")), plain


# Command, exit code, words on stderr.
FAILURES = {
    "no adapter": (("info", "nowhere"), 2, "no adapter here"),
    "no basis, no base": (("export-lora", "small", "lora"), 1, "without its basis"),
    "another base": (("verify", "adapter", "other"), 1, "has no weight of that name"),
    "another base to merge": (("merge", "other", "adapter", "out"), 1, "has no weight of that name"),
    "no base": (("merge", "nowhere", "adapter", "out"), 2, "is no folder"),
    "output is there": (("merge", "base", "adapter", "small"), 2, "exists and is not empty"),
    "too little memory": (("verify", "small", "base", "--max-memory", "10"), 2, "max_memory is 10"),
    "option missing": (("merge", "base"), 2, "Missing argument"),
    "wrong option": (("info", "adapter", "--modulse"), 2, "--modulse"),
    "wrong number": (("verify", "small", "base", "--max-memory", "many"), 2, "Invalid value"),
    "no such command": (("explain", "adapter"), 2, "explain"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_one_line_and_a_code(failure, folders, monkeypatch):
    monkeypatch.chdir(folders)
    tiny_gpt2().save_pretrained("other")
    before = sorted(os.listdir())
    arguments, code, words = FAILURES[failure]
    text = osora_says(*arguments, code=code)
    assert words in text and "Traceback" not in text
    assert sorted(os.listdir()) == before
    if code == 1:
        found = osora_json(*arguments, code=code)
        assert words in found["error"] and found["exit_code"] == code


@pytest.mark.parametrize(
    "words, error",
    [
        (["info"], "Missing argument"),
        (["info", "x", "--modulse"], "--modulse"),
        (["nowhere"], "nowhere"),
        (["verify", "x", "y", "--max-memory", "many"], "max-memory"),
        (["info", "x", "--modules=3"], "modules"),
    ],
)
def test_wrong_words_are_json_too(words, error, capsys):
    assert run([*words, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert error in found["error"] and found["exit_code"] == 2 and found["warnings"] == []
    assert run(words) == 2 and capsys.readouterr().out == ""


def test_a_fault_is_no_refusal(folders, monkeypatch, capfd):
    """Out of memory, say: JSON, a code of its own, and the traceback for a person."""

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(osora, "adapter_info", fails)
    assert run(["info", str(folders / "adapter"), "--json"]) == 4
    out, err = capfd.readouterr()
    assert json.loads(out)["error"] == "out of memory" and "Traceback" in err


@pytest.mark.parametrize("words", [["--json"], []])
def test_a_closed_pipe(words, folders):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "osora", "info", str(folders / "adapter"), *words],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_letters_that_stdout_does_not_have(folders, monkeypatch, tmp_path):
    (folders / "adapter").rename(folders / "Größe\n[red]")
    for encoding in ("ascii", "utf-8"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(["info", str(folders / "Größe\n[red]"), "--json"]) == 0
        assert json.loads(stdout.buffer.getvalue())["folder"] == str(folders / "Größe\n[red]")
        assert run(["info", str(folders / "Größe\n[red]")]) == 0


def test_a_damaged_adapter_is_refused(folders):
    path = folders / "adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert "damaged" in osora_json("info", folders / "adapter", code=1)["error"]


def test_an_interrupt_has_its_own_code(folders, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(osora, "merge_saved", interrupted)
    said = osora_says("merge", folders / "base", folders / "adapter", folders / "out", code=130)
    assert "error: interrupted" in said and "KeyboardInterrupt" not in said


def test_in_a_process(folders):
    """`python -m osora`: stdout is the JSON alone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "osora", "info", str(folders / "adapter"), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0 and json.loads(done.stdout)["method"] == "osora" and done.stderr == ""
    entry = (ROOT / "pyproject.toml").read_text()
    assert 'osora = "osora.cli:main"' in entry


def test_typer_is_asked_for_when_it_is_missing_and_never_imported_with_osora():
    program = """
import sys
import osora
assert not {"typer", "click", "yaml", "huggingface_hub", "osora.cli"} & set(sys.modules)
sys.modules["typer"] = None
from osora.cli import main
print(main(["info", "x"]))
"""
    assert run_python(program) == "3\n"


def document_commands() -> list[list[str]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)).splitlines()
    return [shlex.split(line) for line in lines]


def test_the_commands_of_the_document_run(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "adapter").rename("my-adapter")
    (folders / "base").rename("base-model")
    for package in ("transformers", "accelerate", "yaml"):
        pytest.importorskip(package)
    tokenizer().save_pretrained("base-model")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(3, 11)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)
    Path("run.yaml").write_text(settings)
    commands = document_commands()
    assert len(commands) >= 5
    for words in commands:
        assert words[0] == "osora"
        osora_says(*words[1:])


def test_init(folders):
    plan = osora_json("init", folders / "base", folders / "basis", "--r", "6", "--dry-run")
    assert len(plan["layers"]) == 14 and plan["seconds"] > 0 and not (folders / "basis").exists()
    assert "14 layers" in osora_says("init", folders / "base", folders / "basis", "--dry-run")
    said = osora_says("init", folders / "base", folders / "basis", "--r", "6", "--rank-pattern", "v_proj=3")
    assert "14 layers decomposed, 0 that were there checked, of 14" in said
    again = osora_json("init", folders / "base", folders / "basis", "--r", "6", "--rank-pattern", "v_proj=3")
    assert again["kept"] == 14 and again["computed"] == []
    checked = osora_json("init", folders / "base", folders / "basis", "--check", "--sample", "3")
    assert checked["ok"] and len(checked["measured"]) == 3 and checked["fingerprint"] == again["fingerprint"]
    config = osora.OsoraConfig(r=6, rank_pattern={"v_proj": 3})
    model = osora.attach(tiny_llama(), config, basis=folders / "basis")
    assert {layer.rank for layer in osora.adapted_layers(model).values()} == {3, 6}
    some = osora_json("init", folders / "base", folders / "some", "--target-modules", r".*\.0\.mlp\..*proj", "--r", "2")
    assert some["layers"] == 3


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["--r", "5"], 1, "rank 6 there, 5 asked for"),
        (["--r", "6", "--part", "9/8"], 2, 'part must be as "3/8"'),
        (["--r", "6", "--dtype", "int8"], 2, "dtype must be"),
        (["--rank-pattern", "v_proj"], 2, "NAME=RANK"),
        (["--r", "6", "--target-modules", "nothing"], 2, "no module matches"),
    ],
)
def test_init_refuses(folders, words, code, match, capsys):
    assert run(["init", str(folders / "base"), str(folders / "basis"), "--r", "6"]) == 0
    assert run(["init", str(folders / "base"), str(folders / "basis"), *words]) == code
    assert match in " ".join(capsys.readouterr().err.split())


def test_init_of_what_is_no_checkpoint(folders, capsys):
    assert run(["init", str(folders / "none"), str(folders / "basis")]) == 2
    assert run(["init", str(folders / "adapter"), str(folders / "basis")]) == 2
    assert run(["init", str(folders / "base"), str(folders / "basis"), "--check"]) == 2
    assert "no basis here" in " ".join(capsys.readouterr().err.split())


def test_init_under_torchrun(folders):
    """Its parser takes shortened options of its own wherever they stand, --r among them: --rank is none."""
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "osora", "init"]
    words += [str(folders / "base"), str(folders / "two"), "--rank", "5", "--threads", "1", "--json"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
    osora_json("init", folders / "base", folders / "one", "--r", "5", "--threads", "1")
    files = sorted(path.name for path in (folders / "one").iterdir())
    assert files == sorted(path.name for path in (folders / "two").iterdir())
    for name in files:
        assert (folders / "one" / name).read_bytes() == (folders / "two" / name).read_bytes()
