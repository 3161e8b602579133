# SPDX-License-Identifier: Apache-2.0
"""What is saved natively loads again, or nothing is replaced; and names that no file can have."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from saved_adapters import both

import osora
from osora import AdapterError

every_config = pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig], ids=["osora", "sorsa"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@both
@every_config
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])
def test_a_file_that_would_not_load_replaces_nothing(make, config, save_basis, tmp_path, monkeypatch):
    import osora.files.format as writer

    model = move_adapter(osora.attach(make(), config(r=4, tol=1e-4)))
    osora.save_adapter(model, tmp_path, save_basis=save_basis)
    before, save_file = contents(tmp_path), writer.save_file
    damages = {
        "are damaged": lambda t: {key: value.bfloat16() for key, value in t.items()},
        "lacks 1 tensors": lambda t: dict(list(t.items())[1:]),
        "does not name": lambda t: t | {"more": torch.ones(1)},
    }
    for words, damage in damages.items():
        monkeypatch.setattr(writer, "save_file", lambda t, p, d=damage, **o: save_file(d(dict(t)), p, **o))
        with pytest.raises(AdapterError, match=rf"cannot be loaded again, and nothing was replaced: .*{words}"):
            osora.save_adapter(move_adapter(model), tmp_path, save_basis=save_basis)
        assert contents(tmp_path) == before
    monkeypatch.undo()
    osora.save_adapter(model, tmp_path, save_basis=save_basis)
    wish = logits(model, ids := token_ids())
    assert torch.equal(logits(osora.load_adapter(make(), tmp_path), ids), wish)


@every_config
def test_values_whose_change_overflows(config, tmp_path):
    """Each is finite, but not their products: the words of NaN, before anything is written."""
    model = osora.attach(tiny_llama(), config(r=4))
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.fill_(3e38)
    with pytest.raises(ValueError, match=r"_proj: its change of the weight overflows: the adapter is not saved"):
        osora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_diverged(tmp_path):
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    with torch.no_grad():
        next(iter(osora.adapted_layers(model).values())).base_layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"q_proj: its base weight has NaN or infinite values"):
        osora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


NOT_UTF8 = os.fsdecode(b"a\xff")


@pytest.mark.skipif(os.fsencode(NOT_UTF8) != b"a\xff", reason="this file system takes UTF-8 alone")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_folder_whose_name_is_not_utf8(tmp_path):
    model, words = osora.attach(tiny_llama(), osora.OsoraConfig(r=4)), r"is no name in UTF-8.*choose another folder"
    with pytest.raises(ValueError, match=words):
        osora.save_adapter(model, tmp_path / NOT_UTF8)
    assert not list(tmp_path.iterdir())
    osora.save_adapter(model, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / NOT_UTF8)
    for call in (osora.adapter_info, lambda folder: osora.load_adapter(tiny_llama(), folder)):
        with pytest.raises(AdapterError, match=words):
            call(tmp_path / NOT_UTF8)
    peft = pytest.importorskip("peft")
    from osora.peft import OsoraConfig

    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(tiny_llama(), OsoraConfig(r=4)).save_pretrained(tmp_path / NOT_UTF8 / "new")
    assert not (tmp_path / NOT_UTF8 / "new").exists()
    with pytest.raises(AdapterError, match=words):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / NOT_UTF8)
