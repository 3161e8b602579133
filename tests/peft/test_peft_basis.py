# SPDX-License-Identifier: Apache-2.0
"""A kept basis through PEFT: read instead of computed, found again by what was saved, refused where it does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_basis
from helpers import token_ids

import osora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
import osora.peft  # noqa: E402
from osora.files.basis import BasisFolder  # noqa: E402
from osora.peft import filling  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, through PEFT


class Tiny(transformers.LlamaForCausalLM):
    def __init__(self) -> None:
        torch.manual_seed(4)
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        super().__init__(transformers.LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2))


CONFIGS = [osora.peft.OsoraConfig, osora.peft.SorsaConfig]
IDS = token_ids() % 64


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Path:
    return make_basis(Tiny(), tmp_path_factory.mktemp("basis"), osora.OsoraConfig(r=8))


def moved(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "decompose_targets", lambda *_, **__: pytest.fail("nothing is to be computed"))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank", [3, 8])
def test_what_is_read_is_what_would_be_computed(config, rank, basis, monkeypatch):
    computed = peft.get_peft_model(Tiny(), config(r=8))
    no_computing(monkeypatch)
    model = peft.get_peft_model(Tiny(), config(r=rank, basis=basis))
    wide, found = computed.state_dict(), model.state_dict()
    for name, tensor in found.items():
        if name.endswith((".osora_U.default", ".osora_V.default", ".sorsa_U.default", ".sorsa_V.default")):
            assert torch.equal(tensor, wide[name][:, :rank]), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, Tiny()(IDS).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_adapter_finds_its_basis(config, basis, tmp_path, monkeypatch):
    own = Path(shutil.copytree(basis, tmp_path / "own"))
    model = moved(peft.get_peft_model(Tiny(), config(r=5, basis=str(own), save_basis=False)))
    wish = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    contents = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert contents["osora"]["basis"]["fingerprint"] == BasisFolder(own).fingerprint
    assert "basis" not in contents and "missing" not in contents, "where it was made is no part of what it is"
    computing = filling.decompose_targets
    no_computing(monkeypatch)
    again = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, wish)
    assert torch.equal(osora.load_adapter(Tiny(), tmp_path / "adapter")(IDS).logits, wish)
    again.save_pretrained(tmp_path / "second")
    assert (
        json.loads((tmp_path / "second/adapter_config.json").read_text())["osora"]["basis"]
        == (contents["osora"]["basis"])
    )
    own.rename(tmp_path / "elsewhere")
    named = config.from_pretrained(tmp_path / "adapter")
    named.basis = str(tmp_path / "elsewhere")
    there = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "adapter", config=named)
    assert torch.equal(there(IDS).logits, wish)
    monkeypatch.setattr(filling, "decompose_targets", computing)
    computed = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "adapter")
    torch.testing.assert_close(computed(IDS).logits, wish, rtol=0, atol=1e-3)


def test_what_does_not_fit_leaves_the_model_as_it_was(basis, tmp_path):
    def refused(match: str, model: torch.nn.Module, error: type[Exception] = osora.BasisError, **options: object):
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(error, match=match):
            peft.get_peft_model(model, osora.peft.OsoraConfig(**options))
        assert before == [name for name, _ in model.named_modules()]

    refused("has rank 8 for .* and 9 is asked for", Tiny(), r=9, basis=basis)
    other = Tiny()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1
    refused("up_proj is not the one that", other, r=4, basis=basis)
    refused("no basis here", Tiny(), FileNotFoundError, r=4, basis=tmp_path)
    small = make_basis(Tiny(), tmp_path / "small", osora.OsoraConfig(r=4, target_modules=["q_proj"]))
    refused('has no layer .*missing="compute"', Tiny(), r=4, basis=small)
    model = peft.get_peft_model(Tiny(), osora.peft.OsoraConfig(r=4, basis=small, missing="compute"))
    assert torch.equal(model(IDS).logits, Tiny()(IDS).logits)
    for option, wrong in (("basis", 3), ("missing", "perhaps")):
        with pytest.raises((TypeError, ValueError), match=option):
            osora.peft.OsoraConfig(**{option: wrong})


def test_a_second_adapter_reads_its_own(basis, monkeypatch):
    no_computing(monkeypatch)
    model = peft.get_peft_model(Tiny(), osora.peft.OsoraConfig(r=3, basis=basis))
    model.add_adapter("wider", osora.peft.OsoraConfig(r=7, basis=basis))
    model.set_adapter("wider")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, Tiny()(IDS).logits)
