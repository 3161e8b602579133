# SPDX-License-Identifier: Apache-2.0
"""SORSA models and what a step adds for their penalty."""

from collections.abc import Callable

import pytest
import torch
from helpers import move_adapter, tiny_llama, token_ids
from torch import Tensor, nn

import osora
from osora import SorsaConfig, adapted_layers

both_kinds = pytest.mark.parametrize("kind", ["squared", "paper"])
GAMMA = 0.3
# Gradients in float64, of numbers of order one, summed over some hundred terms.
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def orthonormal(m: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]


def norm_of(Q: Tensor, kind: str) -> Tensor:
    """The penalty of a factor, as the paper writes it."""
    value = torch.linalg.matrix_norm(Q.t() @ Q - torch.eye(Q.shape[1], dtype=Q.dtype))
    return value if kind == "paper" else value**2


def adapted(gamma: float = GAMMA, kind: str = "squared", dtype=torch.float64, **config) -> nn.Module:
    torch.manual_seed(3)
    config = SorsaConfig(**({"r": 4, "gamma": gamma, "regularizer": kind} | config))
    return move_adapter(osora.attach(tiny_llama(dtype=dtype), config), 0.1)


def factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = adapted_layers(model).values()
    return [pair for layer in layers for pair in ((layer.u, layer.U), (layer.v, layer.V))]


def penalty_gradients(model: nn.Module, kind: str = "squared", gamma: float = GAMMA) -> list[Tensor]:
    """By autograd of gamma times the paper's mean; zero for every s."""
    leaves = [(p.detach().double().requires_grad_(), start.double()) for p, start in factors(model)]
    total = gamma * torch.stack([norm_of(start + change, kind) for change, start in leaves]).mean()
    found = iter(torch.autograd.grad(total, [change for change, _ in leaves]))
    penalised = {id(p) for p, _ in factors(model)}
    zero = lambda p: torch.zeros_like(p, dtype=torch.float64)  # noqa: E731
    return [next(found) if id(p) in penalised else zero(p) for p in osora.adapter_parameters(model)]


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in osora.adapter_parameters(model)]


def batch(rows: int = 64) -> Tensor:
    torch.manual_seed(4)
    return token_ids(rows, 5)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def change_by(step: Callable[[nn.Module], None], model: nn.Module) -> list[Tensor]:
    before = parameters(model)
    step(model)
    return [now - old for now, old in zip(parameters(model), before, strict=True)]


def check_penalty_once(step: Callable[[nn.Module], None], kind: str = "squared", times: int = 1, **tolerance) -> None:
    """What a plain SGD step of rate 1 does with gamma, less what it does without, is minus the penalty's gradient."""
    model = adapted(kind=kind)
    wish = penalty_gradients(model, kind)
    found = zip(change_by(step, model), change_by(step, adapted(0.0, kind)), wish, strict=True)
    for with_it, without, gradient in found:
        torch.testing.assert_close(without - with_it, times * gradient, **(EXACT | tolerance))
    assert sum(float(gradient.abs().sum()) for gradient in wish) > 0.1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(osora.adapter_parameters(model), lr=1.0)
