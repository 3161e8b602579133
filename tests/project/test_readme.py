# SPDX-License-Identifier: Apache-2.0
"""What the README and the documents promise: their Python runs, their commands exist, their links lead somewhere.

Python blocks of a document in RUN run in order, in one namespace, as a reader would type them. An HTML comment that
starts with `<!-- python` runs as well and is not shown: it makes the tiny model, and checks what the text around it
says.
"""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from documents import blocks, text_of
from helpers import VOCABULARY, tiny_llama, token_ids
from quantise import quantised_llama
from root import ROOT
from training_stacks import rows, settings, tokenizer

README = ROOT / "README.md"
RUN = {
    README: 1,
    ROOT / "docs/use.md": 4,
    ROOT / "docs/whole_modules.md": 2,
    ROOT / "docs/initialise.md": 4,
    ROOT / "docs/many_adapters.md": 2,
    ROOT / "docs/export.md": 3,
    ROOT / "docs/merge.md": 2,
    ROOT / "docs/analysis.md": 4,
    ROOT / "docs/ablations.md": 1,
    ROOT / "docs/peft.md": 7,
    ROOT / "docs/sorsa.md": 3,
    ROOT / "docs/quantised.md": 3,
    ROOT / "docs/train.md": 4,
    ROOT / "docs/resume.md": 2,
}  # document -> how many blocks it shows at least
NEEDS = {
    "quantised.md": ["bitsandbytes"],
    "train.md": ["trl", "datasets", "accelerate"],
    "resume.md": ["accelerate"],
}  # packages beyond those that every test has
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands(path: Path) -> list[str]:
    lines = "".join(code for _, code in blocks(path, "sh")).splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def anchor(heading: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(path: Path) -> list[str]:
    without_code = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)


def table_of(path: Path) -> list[str]:
    """The lines of the front page's table: what `print(osora.summary(model))` gives of SmolLM2."""
    ((_, text),) = blocks(path, "text")
    return text.splitlines()


def check_table(summary: object) -> None:
    """What is printed has the columns that the front page shows."""
    shown, printed = table_of(README), str(summary).splitlines()
    assert shown[0] == printed[0]
    totals = [next(line for line in lines if line.startswith("trainable")) for lines in (shown, printed)]
    assert len({re.sub(r"[\d.,]+(e-\d+)?", "#", line) for line in totals}) == 1


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.name)
def test_the_python_of_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(blocks(document, "python"))
    assert text_of(document).count("```python") >= RUN[document]
    for package in NEEDS.get(document.name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    names = {
        "tiny_llama": tiny_llama,
        "quantised_llama": quantised_llama,
        "token_ids": token_ids,
        "rows": rows,
        "settings": settings,
        "tokenizer": tokenizer,
        "torch": torch,
        "Path": Path,
        "VOCABULARY": VOCABULARY,
        "check_table": check_table,
    }
    with warnings.catch_warnings():
        if document.name == "train.md":  # TRL's own are many
            warnings.simplefilter("ignore")
        else:
            warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft is told
        for line, code in found:
            exec(compile("\n" * (line - 1) + code, str(document), "exec"), names)  # errors name its own line


def test_the_front_page_is_short():
    shown = re.sub(r"^<!-- python.*?^-->$", "", text_of(README), flags=re.MULTILINE | re.DOTALL)
    assert len([word for word in shown.split() if re.search(r"\w", word)]) <= 900


def test_every_block_says_its_language():
    """So that no block escapes the tests: python and sh are run or checked, text is text."""
    for document in (*RUN, ROOT / "CONTRIBUTING.md"):
        fences = re.findall(r"^```(\w*)$", text_of(document), flags=re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh", "text"}, document.name
        assert not any(fences[1::2]), f"{document.name}: a fence is not closed"


@pytest.mark.parametrize("command", commands(README))
def test_the_commands_of_the_readme_are_run_by_ci(command):
    ci = text_of(ROOT / ".ci/run")
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"\b{re.escape(command)}\b", ci), f".ci/run does not run {command}"
    elif words[:2] == ["pip", "install"]:
        install = re.search(r"^INSTALL = .*\n.*$", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
        assert words[2:] == ["."] and install and install[0].endswith(" .") and " -m pip " in install[0]
        assert " ISOLATED=1" in ci, f".ci/run does not run {command}"
    else:  # tests/project/test_examples.py runs it; here: are these its options?
        assert words[:2] == ["python", "examples/finetune.py"], f"nothing tests {command}"
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text_of(ROOT / "examples/finetune.py"), f"finetune.py has no {option}"


def test_the_commands_of_contributing_exist():
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    wanted = [shlex.split(command) for command in commands(ROOT / "CONTRIBUTING.md")]
    assert wanted
    for words in wanted:
        assert words[0] == "make" and words[1] in targets, words


def test_the_commands_for_large_models_exist():
    """Of models that no test has: their options are those of osora init."""
    pytest.importorskip("typer")
    from typer.main import get_command

    from osora.cli.app import app

    known = {option for each in get_command(app).commands["init"].params for option in each.opts}
    wanted = [shlex.split(command) for command in commands(ROOT / "docs/initialise.md")]
    assert len(wanted) >= 5
    for words in wanted:
        place = words.index("init")
        assert words[:place] in (["osora"], ["torchrun", "--nproc-per-node", "8", "-m", "osora"]), words
        assert {word for word in words[place:] if word.startswith("--")} <= known, words


@every_document
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, part = link.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{link}: no such file"
        if part:
            assert part in {anchor(heading) for heading in headings(path)}, f"{link}: no such heading"


def test_sources_refer_to_documents_and_headings_that_exist():
    """Comments say `docs/method.md, "Order of the products"`."""
    for folder in ("csrc", "python", "examples", "tests", "bench"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in {".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".sh"} or path == Path(__file__):
                continue
            for name, heading in re.findall(r'(docs/[\w/-]+\.md)(?:,\s+(?:(?://|#)\s*)?"([^"]+)")?', text_of(path)):
                where = path.relative_to(ROOT)
                heading = re.sub(r"\s*\n\s*(//|#)?\s*", " ", heading)  # a comment may break its line there
                assert (ROOT / name).exists(), f"{where} refers to {name}"
                assert not heading or heading in headings(ROOT / name), f"{where}: {name} has no heading {heading!r}"


@every_document
def test_documents_have_no_machine_in_them(document):
    """No absolute path of the machine they were written on."""
    assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|opt)/\w", text_of(document))


def test_the_picture_is_plain_svg():
    picture = text_of(ROOT / "docs/images/method.svg")
    assert picture.startswith("<svg ") and "<script" not in picture and "href" not in picture
