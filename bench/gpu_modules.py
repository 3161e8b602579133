# SPDX-License-Identifier: Apache-2.0
"""Adapted layers and blocks on a device, for gpu_smoke.py: layers that work together, W_eff on two streams, graphs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import osora

WIDTH, WIDER, RANK = 256, 384, 16


def relative(found: Tensor, true: Tensor) -> float:
    found, true = found.double(), true.double()
    assert found.shape == true.shape, f"shape {tuple(found.shape)}, not {tuple(true.shape)}"
    return float((found - true).norm() / true.norm().clamp_min(1e-300)) if found.numel() else 0.0


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The call captured in a graph: what replays it, and its results, which the replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is made at a first call is no part of a graph
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


class Block(nn.Module):
    """Attention without softmax and a gated part: every kind of sibling that a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.gate = nn.Linear(WIDTH, WIDER), nn.Linear(WIDTH, WIDER)
        self.down = nn.Linear(WIDER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.tanh(self.q(x)) * self.k(x) * self.v(x))
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


def adapted(dtype: torch.dtype, device: str) -> nn.Module:
    """A block with an adapter that does something."""
    model = osora.attach(Block().to(device, dtype), osora.OsoraConfig(r=RANK), progress=False)
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.normal_(std=0.05)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of x, o and s."""
    wanted = [x, *osora.adapter_parameters(model)]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]


def errors(found: list[Tensor], true: list[Tensor]) -> dict[str, Any]:
    """The largest: of y, and of all gradients in one piece, because a small one is made of larger ones."""
    gradients = [torch.cat([tensor.double().flatten() for tensor in each[1:]]) for each in (found, true)]
    y, gradient = relative(found[0], true[0]), relative(*gradients)
    same = all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
    return {"error": max(y, gradient), "y": y, "gradient": gradient, "same_bits": same}


def together(device: str, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """A block whose layers work together, against float64, and against the same one whose layers do not."""
    alone = adapted(dtype, device)
    model = osora.set_execution(copy.deepcopy(alone), "split", together=True)
    x = torch.randn(rows, WIDTH, device=device).to(dtype).requires_grad_()
    for _ in range(2):  # the first finds out who reads one x
        found = step(model, x)
    true = step(copy.deepcopy(alone).double(), x.detach().double().requires_grad_())
    plain = step(alone, x)
    return errors(found, true) | {"alone": errors(plain, true)["error"], "same_bits": errors(found, plain)["same_bits"]}


def effective_on_two_streams(device: str) -> dict[str, Any]:
    """W_eff is used on a stream that does not wait for the one it is made on, and made again on that one meanwhile."""
    base = nn.Linear(4096, 2048, bias=False).to(device)
    model = osora.attach(nn.Sequential(base), osora.OsoraConfig(r=RANK), progress=False)
    layer = next(iter(osora.adapted_layers(model).values()))
    x, worst = torch.randn(4096, 4096, device=device), 0.0
    busy = torch.randn(4096, 4096, device=device)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    for number in range(6):
        with torch.no_grad():
            layer.o.normal_(std=0.3)
        truth = osora.set_execution(copy.deepcopy(model), "split")(x).detach()
        osora.set_execution(model, "materialised")
        torch.cuda.synchronize()
        first, second = (one, other) if number % 2 else (other, one)
        with torch.cuda.stream(first), torch.no_grad():
            for _ in range(20):  # so that what is made on this stream is not there yet when the other begins
                busy = torch.tanh(busy @ busy)
            early = model(x)
        with torch.cuda.stream(second), torch.no_grad():
            late = model(x)
            layer.o.mul_(1.0)  # counted: the next one makes it again, in place
        with torch.cuda.stream(first), torch.no_grad():
            again = model(x)
        torch.cuda.synchronize()
        worst = max(worst, *(relative(y, truth) for y in (early, late, again)))
    return {"error": worst}


def decode(device: str, dtype: torch.dtype, rows: int, together: bool) -> dict[str, Any]:
    """A few rows through a block: as they come, and on a card replayed from a graph with other numbers."""
    model = osora.set_execution(adapted(dtype, device), "split", together=together)
    x = torch.randn(rows, WIDTH, device=device).to(dtype)
    facts: dict[str, Any] = {}
    with torch.no_grad():
        true = copy.deepcopy(model).double()(x.double())
        facts["error"] = relative(model(x), true)
        if device == "cuda":
            replay, y = captured(lambda: model(x))
            x.normal_()
            for parameter in osora.adapter_parameters(model):
                parameter.data.mul_(-1)  # as a replayed optimiser does it: uncounted
            replay()
            facts["replayed"] = relative(y, copy.deepcopy(model).double()(x.double()))
            facts["error"] = max(facts["error"], facts["replayed"])
    return facts


def graphed(dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """torch.cuda.make_graphed_callables of a block, forward and backward, against the same one without a graph."""
    model = nn.Sequential(adapted(dtype, "cuda"), nn.Tanh())
    plain = copy.deepcopy(model)
    sample = torch.randn(rows, WIDTH, device="cuda").to(dtype).requires_grad_()
    model[0] = torch.cuda.make_graphed_callables(model[0], (sample,))
    found = []
    for each in (model, plain):
        torch.manual_seed(1)
        x = torch.randn(rows, WIDTH, device="cuda").to(dtype).requires_grad_()
        wanted = [x, *(p for p in each.parameters() if p.requires_grad)]
        y = each(x)
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)])
    return errors(*found)
