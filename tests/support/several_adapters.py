# SPDX-License-Identifier: Apache-2.0
"""A model with three adapters, and what each gives alone."""

import copy

import pytest
import torch
from helpers import logits, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import osora
from osora import OsoraConfig, adapted_layers

every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
# Row by row against the adapter alone: float32 models of two layers, whose rounding is of another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def config(r: int = 6, **options) -> OsoraConfig:
    return OsoraConfig(**({"r": r, "tol": 1e-4} | options))


def move(model: nn.Module, name: str, step: float = 0.1) -> nn.Module:
    """Deltas as training would leave them, of that adapter alone."""
    with torch.no_grad():
        for layer in adapted_layers(model, name).values():
            for parameter in layer.deltas(name):
                parameter.normal_(std=step)
    return model


def three(make=tiny_llama, **options) -> nn.Module:
    """a in every layer; b of smaller rank; c in some layers, of ranks of its own. a is active."""
    model = move(osora.attach(make(**options), config(), name="a"), "a")
    move(osora.add_adapter(model, "b", config(3)), "b")
    some = config(5, layers_to_transform=[1], rank_pattern={"o_proj|c_proj": 2})
    return move(osora.add_adapter(model, "c", some), "c")


def alone(model: nn.Module, name: str | None, ids: Tensor) -> Tensor:
    """The logits with that adapter active, by a copy."""
    model = copy.deepcopy(model)
    if name is None:
        with osora.disabled(model):
            return logits(model, ids)
    return logits(osora.set_adapter(model, name), ids)


def in_batch(model: nn.Module, names: list, ids: Tensor) -> Tensor:
    with osora.adapters_in_batch(model, names) as inside:
        assert inside is model
        return logits(model, ids)


def deltas_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    layers = adapted_layers(model, name).items()
    return {f"{n}.{k}": t for n, layer in layers for k, t in zip("os", layer.deltas(name), strict=True)}


def same_deltas(model: nn.Module, name: str, other: nn.Module, other_name: str) -> bool:
    first, second = deltas_of(model, name), deltas_of(other, other_name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
