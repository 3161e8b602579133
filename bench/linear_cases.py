# SPDX-License-Identifier: Apache-2.0
"""The sizes of bench/linear.py, and whether a peer computes the layer there."""

import math
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import layers
import torch
from layers import ABOUT, OSORA, PEERS, Basis, Shape
from measure import Refused, Timing
from torch import Tensor, nn

FAMILIES = {
    "llama3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "gpt2": [(768, 768), (2304, 768), (3072, 768), (768, 3072)],  # with biases
    "square": [(2048, 2048)],
    "tiny": [(96, 64), (64, 96)],
}
ALL = ("llama3-8b", "smollm2", "gpt2", "square")
PRESETS: dict[str, dict[str, Any]] = {
    # to see that it works: no figures
    "quick": {
        "groups": [(("tiny",), (1, 24), (4, 8))],
        "repetitions": 1,
        "spend": 0.0,
        "multi_shapes": [(96, 64)],
        "multi_ranks": [4],
    },
    # what the project promises: shapes of every model at the numbers of rows of a training step
    "goals": {
        "groups": [(ALL, (512,), (8, 64, 256)), (ALL, (2048,), (64,))],
        "peers": ["frozen", "op-by-op", "vera", "lora", "osora"],
        "repetitions": 3,
        "spend": 0.4,
    },
    "full": {"groups": [(ALL, (1, 8, 128, 512, 2048), (8, 64, 256))]},
}
DEFAULTS: dict[str, Any] = {"peers": list(PEERS), "repetitions": 5, "spend": 1.0}
DEFAULTS |= {"multi_shapes": [(2048, 2048), (4096, 4096)], "multi_ranks": [64]}
MOST_REPETITIONS = 25

# Largest relative error: of a row of y or dx over the size of a row, of ds and of do as a whole. float32: sums of up to
# 14336 terms. 16 bits: x, W, U and V are exact, but h, D and the result are rounded once each, and a row is judged by
# 16 numbers. Plain torch rounds more often, to 16 bits, and may be off by five times as much before this is called
# a mistake of the benchmark.
TOLERANCE = {"float32": 3e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
OF_PLAIN_TORCH = 5
NAMES = ("y", "dx", "do", "ds")
DIRECTIONS = 16


@dataclass(frozen=True)
class Case:
    """What one table is about."""

    shape: Shape
    n: int
    dtype: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape.family}, {self.shape}, n = {self.n}, {self.dtype}"


@dataclass
class Row:
    """One peer at one rank (0: none)."""

    peer: str
    rank: int
    layer: nn.Module
    floors: tuple[float, float]
    saved: int = 0
    peak: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    forward: Timing = field(default_factory=lambda: Timing(()))
    backward: Timing = field(default_factory=lambda: Timing(()))
    step: Timing = field(default_factory=lambda: Timing(()))
    # On a card alone: further layers that take turns with the first; times of a graph, or why there are none.
    others: list[nn.Module] = field(default_factory=list)
    graph: Timing | None = None
    graph_forward: Timing | None = None
    no_graph: str | None = None

    @property
    def layers(self) -> list[nn.Module]:
        return [self.layer, *self.others]


class Step:
    """Forward and backward of a layer as a function without arguments. Notes when the forward was done, on a CPU."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self.wanted = [x, *layers.trained(layer)]
        self.forward: list[float] = []

    def __call__(self) -> tuple[Tensor, ...]:
        """y and the gradients of x and of what is trained. As in a model, nobody adds them to others."""
        began = perf_counter()
        y = self.layer(self.x)
        self.forward.append(perf_counter() - began)
        return (y, *torch.autograd.grad(y, self.wanted, self.dy))


class Turns:
    """Layers with inputs of their own, one after the other: on a card a call finds none of its numbers in the cache."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def forward(self) -> None:
        """With what autograd keeps, as in training. What it returns is gone at once."""
        for step in self.steps:
            step.layer(step.x)

    def both(self) -> None:
        for step in self.steps:
            step()


# -- correctness -------------------------------------------------------------------------------------------------------


class Truth:
    """OSoRA in float64. y and dx are compared row by row through 16 random directions: n (k + d) numbers, not n k d.

    For directions of ±1 the mean square of an error's projections is that of the error.
    """

    def __init__(self, basis: Basis, x: Tensor, dy: Tensor, seed: int) -> None:
        self.x, self.dy = x.detach().double(), dy.double()
        weight = basis.linear.weight.double()
        generator = torch.Generator().manual_seed(seed)

        def signs(size: int) -> Tensor:
            return (torch.randint(2, (size, DIRECTIONS), generator=generator) * 2.0 - 1).to(x.device, torch.float64)

        self.of_y, self.of_dx = signs(weight.shape[0]), signs(weight.shape[1])
        self.y, self.dx = self.x @ (weight.t() @ self.of_y), self.dy @ (weight @ self.of_dx)
        if basis.linear.bias is not None:
            self.y += basis.linear.bias.double() @ self.of_y

    def errors(self, layer: nn.Module, found: tuple[Tensor, ...]) -> dict[str, float]:
        """Of y, dx, do and ds, as a peer with the numbers of osora's `layer` gave them."""
        U, V, S0, s, o = (getattr(layer, name).detach().double() for name in ("U", "V", "S0", "s", "o"))
        h, D = self.x @ V, U * (o[:, None] * (S0 + s) + s)
        UP = U * (self.dy.t() @ h)
        y, dx, do, ds = (tensor.detach().double() for tensor in found)
        rows = ((y @ self.of_y, self.y + h @ (D.t() @ self.of_y)),)
        rows += ((dx @ self.of_dx, self.dx + (self.dy @ D) @ (V.t() @ self.of_dx)),)
        whole = ((do, (UP * (S0 + s)).sum(1)), (ds, ((1 + o)[:, None] * UP).sum(0)))
        errors = [(got - true).norm(dim=1).max() / true.norm() * math.sqrt(len(true)) for got, true in rows]
        errors += [(got - true).norm() / true.norm() for got, true in whole]
        return {name: float(error) for name, error in zip(NAMES, errors, strict=True)}


def check(case: Case, rows: list[Row], truth: Truth, x: Tensor, dy: Tensor) -> None:
    """Run every peer once; Refused if one that computes OSoRA is wrong, osora itself first of all."""
    ours = {row.rank: row.layer for row in rows if row.peer == "osora"}
    for row in sorted(rows, key=lambda row: row.peer != "osora"):
        found = Step(row.layer, x, dy)()
        if row.peer not in OSORA:
            continue
        row.errors = truth.errors(ours[row.rank], found)
        limit = TOLERANCE[case.dtype] * (1 if row.peer == "osora" else OF_PLAIN_TORCH)
        for name, error in row.errors.items():
            if not error <= limit:  # NaN too
                who = "osora's" if row.peer == "osora" else f"this benchmark's own peer ({ABOUT[row.peer]}):"
                raise Refused(
                    f"{case}, r = {row.rank}: {who} {name} is off by {error:.1e}, relative "
                    f"(limit {limit:.1e}): nothing is timed"
                )
