# SPDX-License-Identifier: Apache-2.0
"""Models by name, and what attaching made of them."""

import pytest
from helpers import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from osora import OsoraConfig, adapted_layers, attach

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def names(model: nn.Module) -> list[str]:
    return list(adapted_layers(model))


def endings(model: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names(model)})


def attached(model: nn.Module, **config) -> nn.Module:
    return attach(model, OsoraConfig(**({"r": 4} | config)))
