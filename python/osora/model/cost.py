# SPDX-License-Identifier: Apache-2.0
"""What an execution plan costs, by arithmetic alone: operations, bytes, memory, and time on a machine of given rates.

The model is that of docs/performance.md: a step takes as long as its arithmetic or its memory traffic, and a launch.
"""

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn

from osora.layers.base_weight import base_weight
from osora.model.state import adapted_layers, state_of
from osora.reference import accumulate_dtype

Plan: TypeAlias = Literal["frozen", "split", "materialised"]
PLANS = ("frozen", "split", "materialised")


@dataclass(frozen=True)
class Machine:
    """Rates that somebody measured: of products in the dtype in question, of memory, and the cost of one launch."""

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Check that they are rates."""
        if not (self.flops_per_second > 0 and self.bytes_per_second > 0 and self.launch_seconds >= 0):
            raise ValueError(f"rates must be positive, and a launch no less than nothing, got {self}")


@dataclass(frozen=True)
class Work:
    """Operations of products (a multiply-add is two), bytes to and from memory, and launches; they add up."""

    flops: int = 0
    bytes: int = 0
    launches: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.seconds + other.seconds,
        )

    def times(self, count: int) -> "Work":
        """The same again and again."""
        return Work(self.flops * count, self.bytes * count, self.launches * count, self.seconds * count)


@dataclass(frozen=True)
class Cost:
    """One layer or all of them, for one optimiser step of ``micro_batches`` forwards and backwards.

    ``saved`` are the bytes kept for the backward, of one micro-batch; ``memory`` those a plan keeps beside the base
    weight from step to step; ``scratch`` the most it takes for a moment, in one layer.
    """

    forward: Work
    backward: Work
    refresh: Work
    saved: int
    memory: int
    scratch: int

    @property
    def step(self) -> Work:
        """Everything of an optimiser step."""
        return self.forward + self.backward + self.refresh


def linear_cost(
    n: int,
    k: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    plan: Plan,
    *,
    micro_batches: int = 1,
    machine: Machine | None = None,
) -> Cost:
    """The cost of one layer.

    Args:
        n: rows of x, tokens, of one micro-batch.
        k: in_features.
        d: out_features.
        r: rank.
        dtype: of x and the weight.
        plan: "split", "materialised", or "frozen" for the base layer alone.
        micro_batches: forwards and backwards per optimiser step.
        machine: rates to tell seconds by; without them they are 0.

    Returns:
        Counts for one optimiser step, gradients of x, s and o included.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    size, exact = dtype.itemsize, accumulate_dtype(dtype).itemsize

    def work(flops: int, traffic: int) -> Work:
        if machine is None:
            return Work(flops, traffic, 1)
        seconds = max(flops / machine.flops_per_second, traffic / machine.bytes_per_second) + machine.launch_seconds
        return Work(flops, traffic, 1, seconds)

    def product(a: int, b: int, inner: int, *, adds: bool = False, out: int = size) -> Work:
        """[a, inner] times [inner, b]; one that adds to its result reads it as well."""
        return work(2 * a * b * inner, size * inner * (a + b) + out * a * b * (2 if adds else 1))

    fold = work(0, 2 * size * d * r)
    gradients = product(d, r, n, out=exact) + work(0, (size + exact) * d * r)  # P = dyᵀ h, then ds and do
    refresh, memory, scratch = Work(), 0, 0
    if plan == "frozen":
        forward, backward, saved = product(n, d, k), product(n, k, d), 0
    elif plan == "split":
        forward = fold + product(n, r, k) + product(n, d, r) + product(n, d, k, adds=True)
        backward = fold + product(n, r, d) + product(n, k, r) + product(n, k, d, adds=True) + gradients
        saved, scratch = n * r * size, size * d * r
    else:
        forward = product(n, d, k) + product(n, r, k)
        backward = product(n, k, d) + gradients
        saved, memory = n * r * size, size * d * k
        # D = fold, W into a sum of float32 (float64), D Vᵀ onto it, and the sum into W_eff
        if dtype == accumulate_dtype(dtype):  # W_eff is the sum itself
            refresh = fold + work(2 * d * k * r, size * (d + k) * r + 4 * size * d * k)
        else:
            refresh = work(0, (size + exact) * d * r) + work(
                2 * d * k * r, exact * (d + k) * r + (2 * size + 4 * exact) * d * k
            )
            scratch = exact * min(d * k, 2**22 + k)
        scratch += exact * (d + k) * r
    return Cost(forward.times(micro_batches), backward.times(micro_batches), refresh, saved, memory, scratch)


@dataclass(frozen=True)
class LayerEstimate:
    """One adapted layer: its name, sizes (d, k, r), plan, and cost."""

    name: str
    shape: tuple[int, int]
    rank: int
    plan: Plan
    cost: Cost


@dataclass(frozen=True)
class Estimate:
    """The adapted layers of a model for one optimiser step; ``print`` it for a table."""

    layers: tuple[LayerEstimate, ...]
    tokens: int
    micro_batches: int
    machine: Machine | None

    @property
    def total(self) -> Cost:
        """All layers: sums, but the largest scratch."""
        costs = [layer.cost for layer in self.layers]
        return Cost(
            sum((cost.forward for cost in costs), Work()),
            sum((cost.backward for cost in costs), Work()),
            sum((cost.refresh for cost in costs), Work()),
            sum(cost.saved for cost in costs),
            sum(cost.memory for cost in costs),
            max(cost.scratch for cost in costs),
        )

    def __str__(self) -> str:
        """Forward, backward and refresh of all layers, and their memory."""
        total = self.total
        plans = ", ".join(sorted({layer.plan for layer in self.layers}))
        lines = [
            f"{len(self.layers)} adapted layers ({plans}), {self.micro_batches} x {self.tokens} tokens",
            f"{'':>10}  {'TFLOP':>10}  {'GB moved':>10}  {'launches':>10}  {'ms':>10}",
        ]
        parts = {"forward": total.forward, "backward": total.backward, "refresh": total.refresh, "step": total.step}
        for name, work in parts.items():
            milliseconds = "-" if self.machine is None else f"{work.seconds * 1e3:.2f}"
            lines.append(
                f"{name:>10}  {work.flops / 1e12:>10.4g}  {work.bytes / 1e9:>10.4g}  {work.launches:>10}"
                f"  {milliseconds:>10}"
            )
        lines.append(
            f"saved for a backward {total.saved / 1e6:.1f} MB, kept {total.memory / 1e6:.1f} MB, "
            f"for a moment {total.scratch / 1e6:.1f} MB"
        )
        return os.linesep.join(lines)


def estimate(
    model: nn.Module,
    tokens: int,
    plan: Plan | None = None,
    *,
    micro_batches: int = 1,
    machine: Machine | None = None,
) -> Estimate:
    """What an optimiser step of a model's adapted layers costs under an execution plan, by arithmetic alone.

    Nothing is run. The rest of the model (attention, norms, the output head) is left out: it is the same under every
    plan. See docs/performance.md for the formulas and for what they leave out.

    Args:
        model: a model with an adapter.
        tokens: rows of x in one micro-batch.
        plan: "split", "materialised", or "frozen" for the base layers alone, as what to compare with; None for the
            plan that each layer has.
        micro_batches: forwards and backwards per optimiser step.
        machine: rates to tell seconds by, :class:`osora.Machine`; without them they are 0.

    Returns:
        Operations, bytes, launches, saved bytes and memory, per layer and in total.

    Raises:
        ValueError: no adapter, an unknown plan, or numbers below 1.
    """
    state_of(model)
    for name, value in {"tokens": tokens, "micro_batches": micro_batches}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    found = []
    for name, layer in adapted_layers(model).items():
        chosen: Plan = plan or layer.execution  # type: ignore[assignment]
        dtype = base_weight(layer.base_layer).dtype
        cost = linear_cost(
            tokens,
            layer.in_features,
            layer.out_features,
            layer.rank,
            dtype,
            chosen,
            micro_batches=micro_batches,
            machine=machine,
        )
        found.append(LayerEstimate(name, (layer.out_features, layer.in_features), layer.rank, chosen, cost))
    return Estimate(tuple(found), tokens, micro_batches, machine)
