# SPDX-License-Identifier: Apache-2.0
"""Over many families: what an adapter trains has a gradient and moves the output, or was left out in words."""

import logging
import re

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from torch import nn

import osora
import osora.peft
from osora import adapted_layers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of these models' own


def test_there_are_forty_families():
    assert len(FAMILIES) >= 40


def layers_of(model: nn.Module, api: str) -> dict[str, nn.Module]:
    if api == "native":
        return dict(adapted_layers(model))
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
@pytest.mark.parametrize("api", ["native", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_has_a_gradient_and_moves_the_output(family, api, method, caplog):
    caplog.set_level(logging.WARNING, logger="osora")
    base, model = FAMILIES[family].model(), FAMILIES[family].model()
    run = FAMILIES[family].run
    if api == "native":
        osora.attach(model, getattr(osora, method)(r=2))
    else:
        try:
            model = get_peft_model(model, getattr(osora.peft, method)(r=2, target_modules="all-linear"))
        except ValueError as refusal:
            assert re.search("exclude_modules|another module", str(refusal)), "it names no cure"
            pytest.skip(f"refused in words: {str(refusal)[:90]}")
    for each in (base, model):  # RWKV has no gradient in evaluation, with or without an adapter
        each.train(family == "Rwkv")
    layers = layers_of(model, api)
    linears = {name for name, module in base.named_modules() if type(module) is nn.Linear}
    told = " ".join(record.getMessage() for record in caplog.records)
    head = {name for name, module in base.named_modules() if module is base.get_output_embeddings()}
    missing = linears - {name.removeprefix("base_model.model.") for name in layers} - head
    assert all(name in told for name in missing if name), f"left out without a word: {missing}"
    with torch.no_grad():  # with a gradient, torch's attention depends on who needs one
        assert torch.equal(run(model), run(base)), "untrained"
    run(model).float().square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        before = run(model)
        for name, layer in layers.items():
            kept = [p.clone() for p in trained(layer)]
            for p in trained(layer):
                p.normal_(0, 0.5)
            assert not torch.equal(run(model), before), f"{name} does not move the output"
            for p, value in zip(trained(layer), kept, strict=True):
                p.copy_(value)
