# SPDX-License-Identifier: Apache-2.0
"""Layers and models to compose with what torch does to functions."""

from collections.abc import Callable

import pytest
import torch
from helpers import Linear, move_adapter, tiny_llama
from torch import Tensor, nn

import osora
from osora import ops

halves = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
from_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def adapted(make: Callable[..., nn.Module] = tiny_llama, **options: object) -> nn.Module:
    return move_adapter(osora.attach(make(**options), osora.OsoraConfig(r=4)))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in osora.adapter_parameters(model)]


def dense(case: Linear) -> Callable[..., Tensor]:
    """The layer as one matrix, in plain torch."""

    def function(x: Tensor, s: Tensor, o: Tensor) -> Tensor:
        D = case.U * ((1 + o)[:, None] * (case.S0 + s) - case.S0)
        return x @ (case.weight + D @ case.V.t()).t() + case.bias

    return function


def fused(case: Linear) -> Callable[..., Tensor]:
    return lambda x, s, o: ops.linear(x, case.weight, case.bias, case.U, case.V, case.S0, s, o)


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: function(*arguments).square().sum()
