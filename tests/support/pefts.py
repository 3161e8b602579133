# SPDX-License-Identifier: Apache-2.0
"""PEFT models for the tests, and what every test of osora.peft needs."""

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from helpers import tiny_llama  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from osora.peft import OsoraConfig  # noqa: E402
from osora.peft.layer import AdapterLayer  # noqa: E402

quiet = [
    # transformers' own, of its own renaming
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's before 0.21, of a base model that has no name
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


def adapted(make=tiny_llama, name: str = "default", **config) -> nn.Module:
    """A PEFT model with an OSoRA adapter that was moved as training would."""
    options = {"r": 5, "tol": 1e-4} | config
    return move(peft.get_peft_model(make(), OsoraConfig(**options), adapter_name=name), name)


def move(model: nn.Module, name: str = "default", step: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for layer in layers(model):
            if name in layer.adapters:
                for parameter in layer.deltas(name):
                    parameter.normal_(std=step)
    return model


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Everything of an adapter, by layer and kind."""
    found = {}
    for layer in layers(model):
        if name in layer.adapters:
            U, V, _ = layer.basis(name)
            found |= {f"{layer.name}.{kind}": t for kind, t in (layer.values(name) | {"U": U, "V": V}).items()}
    return found
