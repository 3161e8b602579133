# SPDX-License-Identifier: Apache-2.0
"""The model card: what a new one says, and that nothing of a person's own is ever lost."""

from pathlib import Path

import pytest
from adapters import adapted
from helpers import run_python, tiny_llama

import osora
from osora import AdapterError, write_card

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def saved(tmp_path) -> Path:
    model = adapted()
    model.name_or_path = "some-org/tiny-llama"
    osora.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def metadata(path: Path) -> dict:
    return hub.ModelCard(path.read_text(encoding="utf-8")).data.to_dict()


def test_a_new_card(saved):
    path = write_card(saved)
    assert path == saved / "README.md"
    assert metadata(path) == {
        "base_model": "some-org/tiny-llama",
        "library_name": "osora",
        "tags": ["osora", "adapter"],
    }
    text, info = path.read_text(), osora.adapter_info(saved)
    for words in (
        f"{info.trainable:,}",
        f"{info.max_residual:.1e}",
        "| rank | 5 |",
        "2505.14350",
        "some-org/tiny-llama",
    ):
        assert words in text
    assert write_card(saved).read_text() == text  # again: the same
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    osora.load_adapter(tiny_llama(), saved)


def test_a_path_of_this_machine_is_not_told(tmp_path):
    for name in (str(tmp_path), "./models/x", "models/a/b", "a|b\n# c"):
        model = adapted()
        model.name_or_path = name
        osora.save_adapter(model, tmp_path / "adapter")
        (tmp_path / "adapter/README.md").unlink(missing_ok=True)
        path = write_card(tmp_path / "adapter")
        assert "base_model" not in metadata(path) and name not in path.read_text()


def test_a_persons_words_stay_and_the_section_is_renewed(saved):
    path = write_card(saved)
    text = path.read_text()
    path.write_text(text.replace("# An adapter of some-org/tiny-llama", "# Mine") + "\nTrained on *my* data.\n")
    osora.save_adapter(adapted(r=3), saved)
    now = write_card(saved).read_text()
    assert "# Mine" in now and now.endswith("\nTrained on *my* data.\n")
    assert "| rank | 3 |" in now and "| rank | 5 |" not in now


def test_an_edited_section_stays(saved):
    path = write_card(saved)
    path.write_text(path.read_text().replace("| rank | 5 |", "| rank | five |"))
    osora.save_adapter(adapted(r=3), saved)
    before = path.read_text()
    assert "| rank | five |" in before and write_card(saved).read_text() == before


def test_of_a_persons_card_only_missing_metadata_are_added(saved):
    path = saved / "README.md"
    body = "\n# My model\n\nSee --- below.\n\n---\n\nend"
    path.write_text(f"---\nlicense: mit\nlibrary_name: peft\nbase_model: other/base\ntags:\n- law\n---\n{body}")
    write_card(saved)
    assert metadata(path) == {
        "license": "mit",
        "library_name": "peft",
        "base_model": "other/base",
        "tags": ["law", "osora", "adapter"],
    }
    assert path.read_text().endswith(body)


def test_a_card_that_cannot_be_read_is_left_as_it_is(saved):
    path = saved / "README.md"
    for text in ("---\n: [\n---\nmine", "---\n- a\n- b\n---\nmine"):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read, and is left as it is"):
            write_card(saved)
        assert path.read_text() == text
    (saved / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError):
        write_card(saved)


def test_a_missing_huggingface_hub_is_named(saved):
    program = """
import sys
import osora
sys.modules["huggingface_hub"] = None
try:
    osora.write_card(sys.argv[1])
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install huggingface_hub" in run_python(program, saved)
