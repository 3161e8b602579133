# SPDX-License-Identifier: Apache-2.0
"""Models whose layers work together, beside the same models whose layers do not."""

import copy
from collections import Counter

import torch
from composed import gradients
from helpers import move_adapter, tiny_llama
from torch import Tensor, nn

import osora

FEW = (1, 7)  # tokens with which no two layers share a product, which may have other bits than x V of one layer alone
MANY = (3, 23)


class Attention(nn.Module):
    """q of x, k and v of another, and an output of the same width."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(other), self.v(other)
        return self.o(torch.softmax(q @ k.mT, -1) @ v)


class Pair(nn.Module):
    """Two layers of one x, a third of another width; `between` may do something to x."""

    def __init__(self, width: int = 12, between=lambda pair, x: None) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        self.between(self, x)
        return self.down(up * torch.tanh(self.gate(x)))


def adapt(model: nn.Module, r: int = 4, **options) -> nn.Module:
    return move_adapter(osora.attach(model, osora.OsoraConfig(r=r, **options)))


def both(make=tiny_llama, **options) -> tuple[nn.Module, nn.Module]:
    """The same model twice: alone, and together."""
    model = adapt(make(), **options)
    return model, osora.set_execution(copy.deepcopy(model), "split", together=True)


def called(call) -> Counter:
    """How often each operator of osora was called, and the widths of V in the products x V."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    found = Counter(event.name.removeprefix("osora::") for event in seen.events() if event.name.startswith("osora::"))
    widths = [e.input_shapes[1][1] for e in seen.events() if e.name == "osora::down"]
    return found | Counter({("down", width): n for width, n in Counter(widths).items()})


def step(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *gradients(model)]


def assert_same(got: list[Tensor], wish: list[Tensor]) -> None:
    assert len(got) == len(wish) > 0
    for a, b in zip(got, wish, strict=True):
        assert torch.equal(a, b)


def hooks_of(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + len(model._forward_hooks_always_called)
