# SPDX-License-Identifier: Apache-2.0
"""The model card: what a new one says, and that nothing of a person's own is ever lost."""

from pathlib import Path

import pytest
from helpers import tiny_llama
from processes import run_program
from saved_adapters import adapted

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
    """Which saving the adapter has written."""
    path = saved / "README.md"
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
    assert write_card(saved) == path and path.read_text() == text  # again: the same
    path.unlink()
    assert write_card(saved).read_text() == text
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    osora.load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./models/my-llama", "a folder named my-llama; loading checks"),
        ("/home/someone/x", "a folder named x; loading checks"),
        (None, "not named in the file; loading checks"),
    ],
)
def test_a_base_that_is_a_folder_is_not_said_to_have_no_name(name, words, tmp_path):
    model = adapted()
    model.name_or_path = name
    osora.save_adapter(model, tmp_path)
    assert f"| base model | {words}" in (tmp_path / "README.md").read_text()


def test_a_path_of_this_machine_is_not_told(tmp_path):
    path = tmp_path / "adapter/README.md"
    for name in (str(tmp_path), "./models/x", "models/a/b", "a|b\n# c"):
        model = adapted()
        model.name_or_path = name
        path.unlink(missing_ok=True)
        osora.save_adapter(model, path.parent)
        assert "base_model" not in metadata(path) and name not in path.read_text()


def test_a_persons_words_stay_and_the_section_is_renewed(saved):
    path = write_card(saved)
    text = path.read_text()
    path.write_text(text.replace("# An adapter of some-org/tiny-llama", "# Mine") + "\nTrained on *my* data.\n")
    osora.save_adapter(adapted(r=3), saved)
    now = path.read_text()
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
        with pytest.warns(RuntimeWarning, match="cannot be read, and is left as it is"):
            osora.save_adapter(adapted(r=2), saved)
        assert path.read_text() == text and osora.adapter_info(saved).ranks == (2, 2)
    (saved / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError):
        write_card(saved)


def test_a_missing_huggingface_hub_is_named(saved, tmp_path):
    """By write_card; an adapter is saved without a card then."""
    program = """
import os
import sys
import osora
from torch import nn
sys.modules["huggingface_hub"] = None
try:
    osora.write_card(sys.argv[1])
except ModuleNotFoundError as error:
    print(error)
new = os.path.join(sys.argv[1], "new")
osora.save_adapter(osora.attach(nn.Sequential(nn.Linear(4, 4)), osora.OsoraConfig(r=1, target_modules=["0"])), new)
print(sorted(os.listdir(new)))
"""
    out = run_program(tmp_path, program, saved)
    assert "pip install huggingface_hub" in out and "['adapter_config.json', 'adapter_model.safetensors']" in out


def test_the_description_counts_what_the_tensors_have(tmp_path):
    """Trained numbers and bytes, which are told without reading the tensors."""
    for config in (
        osora.OsoraConfig(r=3, train="s"),
        osora.OsoraConfig(r=3, side="input"),
        osora.OsoraConfig(r=3, rank_pattern={"up_proj": 2}),
        osora.SorsaConfig(r=3),
    ):
        model = osora.attach(tiny_llama(), config)
        osora.save_adapter(model, tmp_path)
        info = osora.adapter_info(tmp_path)
        assert info.trainable == sum(p.numel() for p in osora.adapter_parameters(model))
        assert info.bytes == sum(path.stat().st_size for path in tmp_path.glob("adapter_*"))
        assert f"| trained numbers | {info.trainable:,} |" in (tmp_path / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")  # of PEFT, about the vocabulary of a base that is not there
def test_pefts_card_gets_the_section_too(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import osora.peft

    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "some-org/tiny-llama"
    model = peft.get_peft_model(base, osora.peft.OsoraConfig(r=4))
    model.add_adapter("two", osora.peft.OsoraConfig(r=3))
    model.save_pretrained(tmp_path)
    path, other = tmp_path / "README.md", tmp_path / "two/README.md"
    text = path.read_text()
    for words in (
        "# Model Card for Model ID",
        "- PEFT ",
        "| rank | 4 |",
        "largest residual",
        "PeftModel.from_pretrained",
    ):
        assert text.count(words) == 1, words
    assert metadata(path)["library_name"] == "peft" and {"osora", "adapter"} < set(metadata(path)["tags"])
    assert "| rank | 3 |" in other.read_text()

    model.save_pretrained(tmp_path)
    assert path.read_text() == text
    assert write_card(tmp_path).read_text() == text
    path.write_text(text.replace("[More Information Needed]", "Mine", 1))
    other.write_text("---\nlicense: mit\n---\n\n# Two\n")
    model.save_pretrained(tmp_path)
    assert "Mine" in path.read_text() and path.read_text().count("| rank | 4 |") == 1
    assert other.read_text().endswith("# Two\n") and metadata(other)["license"] == "mit"
    native = osora.attach(tiny_llama(), osora.OsoraConfig(r=2))
    osora.save_adapter(native, tmp_path)
    assert "Mine" in path.read_text() and path.read_text().count("| rank | 2 |") == 1
