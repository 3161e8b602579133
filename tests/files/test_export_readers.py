# SPDX-License-Identifier: Apache-2.0
"""No LoRA is written for layers whose weights the model reads: in plain PEFT it would do nothing there."""

import json
import re
import warnings

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import osora
import osora.peft
from osora import OsoraConfig, SorsaConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of these models' own

READ = {  # what a LoRA is dead in, and what PEFT refuses for reasons of its own
    "Bloom, slow but exact": (r"transformer\.h\.0\.self_attention\.dense", None),
    "WavLM": (r"encoder\.layers\.0\.attention\.(\w)_proj", None),
    "Mamba": (r"backbone\.layers\.0\.mixer\.dt_proj", ["out_proj"]),
    "FalconMamba": (r"backbone\.layers\.0\.mixer\.dt_proj", ["out_proj"]),
    "Jamba": (r"model\.layers\.0\.mamba\.dt_proj", None),
}


def attached(family: str, exclude: list[str] | None = None, config=OsoraConfig) -> nn.Module:
    model = osora.attach(FAMILIES[family].model(), config(r=4, exclude_modules=exclude))
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("config", [OsoraConfig, SorsaConfig])
@pytest.mark.parametrize("family", READ)
def test_models_are_refused_by_the_names_of_their_layers(family, config, ran, tmp_path):
    name, exclude = READ[family]
    model = attached(family, exclude, config)
    if ran:
        FAMILIES[family].run(model)
    with pytest.raises(ValueError, match=rf"reads the weights of {name}.*a LoRA of PEFT does nothing there"):
        osora.export_lora(model, tmp_path / "lora", equal_ranks=True)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("api", ["native", "peft"])
@pytest.mark.parametrize("recorded", [True, False], ids=["by the file", "by the kind"])
@pytest.mark.parametrize("family", READ)
def test_folders_are_refused_too(family, recorded, api, tmp_path):
    name, exclude = READ[family]
    base = FAMILIES[family].model()
    base.save_pretrained(tmp_path / "base")
    if api == "native":
        osora.save_adapter(attached(family, exclude), tmp_path / "adapter")
    else:
        options = osora.peft.OsoraConfig(r=4, target_modules="all-linear", exclude_modules=exclude)
        peft.get_peft_model(base, options).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    assert any(re.fullmatch(name, each) for each in written["osora"]["read"])
    if not recorded:
        del written["osora"]["read"]
        path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=rf"reads the weights of {name}"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora", None if recorded else tmp_path / "base")
    if recorded or (api == "native" and "Bloom" not in family):  # a class is named, which says no more of BLOOM
        with pytest.raises(ValueError, match=rf"reads the weights of {name}"):
            osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("family", "exclude"),
    [("Mamba", ["out_proj", "dt_proj"]), ("Jamba", ["dt_proj"]), ("Bloom", None), ("T5", None), ("Llama", None)],
)
def test_without_these_layers_the_lora_is_the_adapter(family, exclude, tmp_path):
    run, model = FAMILIES[family].run, attached(family, exclude)
    wish = run(model).detach()
    osora.export_lora(model, tmp_path, equal_ranks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(FAMILIES[family].model(), tmp_path).eval()
    torch.testing.assert_close(run(there), wish, rtol=1e-4, atol=1e-4)
    osora.save_adapter(model, tmp_path / "adapter")
    assert "read" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["osora"]


class Own(nn.Module):
    """A class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"read": nn.Linear(9, 7), "called": nn.Linear(7, 5)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["called"](x @ self.inner["read"].weight.t())


def test_of_other_models_a_forward_tells(tmp_path):
    model = osora.attach(Own(), OsoraConfig(r=3))
    assert model.inner["read"].weight.sum().isfinite(), "a look from outside is no reader's"
    osora.export_lora(model, tmp_path / "before any forward")
    model(torch.randn(2, 9))
    with pytest.raises(ValueError, match=r"reads the weights of inner\.read itself"):
        osora.export_lora(model, tmp_path / "lora")
    osora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"reads the weights of inner\.read itself"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("value", ["inner.read", [3], {"a": 1}, None])
def test_a_damaged_list_is_refused(value, tmp_path):
    osora.save_adapter(osora.attach(Own(), OsoraConfig(r=3)), tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    written["osora"]["read"] = value
    path.write_text(json.dumps(written))
    with pytest.raises(osora.AdapterError, match="read is no list of modules' names"):
        osora.load_adapter(Own(), tmp_path)
