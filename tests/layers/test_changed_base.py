# SPDX-License-Identifier: Apache-2.0
"""A base layer that is changed after the adapter has come: it works, or words say what was done and how to undo it."""

import copy

import pytest
import torch
from layer_makers import make_layer
from torch import nn
from torch.nn.utils import parametrize, prune

import osora
from osora.layers.formulas import OsoraFormula

every_config = pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig], ids=["osora", "sorsa"])


def attached(config) -> nn.Module:
    torch.manual_seed(0)
    model = osora.attach(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), config(r=3))
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.normal_(std=0.1)
    return model


def of_peft(config) -> nn.Module:
    peft = pytest.importorskip("peft")
    import osora.peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    return peft.get_peft_model(model, getattr(osora.peft, config.__name__)(r=3, init_weights=False))


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def bases(model: nn.Module) -> list[nn.Linear]:
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


COMPUTED = {
    "prune": lambda base: prune.l1_unstructured(base, "weight", 0.5),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrize": lambda base: parametrize.register_parametrization(base, "weight", Scaled()),
}


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
@every_config
@pytest.mark.parametrize("door", [attached, of_peft], ids=["native", "peft"])
@pytest.mark.parametrize("change", COMPUTED)
def test_a_weight_that_is_computed_anew(change, door, config, tmp_path):
    """The forward has it, saving fingerprints it; nothing is merged into it, in any layer."""
    model, x = door(config), torch.randn(5, 8)
    COMPUTED[change](bases(model)[-1])
    wish = model(x).detach()
    assert wish.isfinite().all()
    merge = model.merge_adapter if door is of_peft else lambda: osora.merge(model)
    with pytest.raises(ValueError, match="is computed anew in each forward"):
        merge()
    assert torch.equal(model(x), wish)
    model.save_pretrained(tmp_path) if door is of_peft else osora.save_adapter(model, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated.*:UserWarning")
@every_config
@pytest.mark.parametrize("door", [attached, of_peft], ids=["native", "peft"])
def test_a_layer_that_was_exchanged(door, config, tmp_path):
    """As quantize_dynamic does it: a layer whose weight is a method."""
    model = door(config)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer = copy.deepcopy(module.base_layer)
            module.base_layer.__class__ = type("Packed", (nn.Linear,), {})
            del module.base_layer.weight
            module.base_layer.weight = lambda: None
    merge = model.merge_adapter if door is of_peft else lambda: osora.merge(model)
    save = model.save_pretrained if door is of_peft else lambda folder: osora.save_adapter(model, folder)
    for call in (lambda: model(torch.randn(5, 8)), merge, lambda: save(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"Packed, whose weight is no tensor: it was exchanged after the adapter"):
            call()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_a_layer_is_asked_for_wrongly():
    layer = make_layer(r=4)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        layer.add_adapter("default", OsoraFormula(), 2)
    with pytest.raises(ValueError, match="rank 5 needs a basis of as many columns: this one has 4"):
        layer.add_adapter("more", OsoraFormula(), 5)
    with pytest.raises(ValueError, match=r"o must have shape \[10\], got \[9\]"):
        layer.add_adapter("more", OsoraFormula(), {"o": torch.zeros(9), "s": torch.zeros(2)})
    layer.select_adapter(None)
    with pytest.raises(ValueError, match="no adapter is active in this layer; it has 'default'"):
        layer.delta_weight()
