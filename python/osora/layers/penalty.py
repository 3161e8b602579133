# SPDX-License-Identifier: Apache-2.0
"""SORSA's orthonormality penalty: its value, its gradient, and its place in a training step.

The penalty is a function of the parameters alone. Put into the loss, its strength would follow whatever the loss is
divided by: micro-batches, processes, tokens. So its gradient is added once, in closed form, right before an optimiser
takes its step (docs/decisions/0007-penalty.md).
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from osora.config import REGULARIZERS
from osora.layers.sharded import with_gradient

Factor = tuple[nn.Parameter, Tensor]  # its trained change and its frozen start, both [m, r]


class PenalisedLayer(Protocol):
    """A layer with factors under penalty: ours, or a PEFT tuner's."""

    @property
    def active_adapters(self) -> Sequence[str]:
        """Names of the adapters that the layer runs."""

    def penalised(self, adapter: str) -> list[Factor]:
        """The adapter's factors in this layer."""


# -- one factor ------------------------------------------------------------------------------------------------------


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded; differentiable."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _excess(change: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Q [m, r] and ``QᵀQ − I`` [r, r], in the change's dtype."""
    if change.shape != start.shape:
        raise RuntimeError(
            f"a SORSA factor has shape {list(change.shape)} and its start {list(start.shape)}: something has flattened "
            "the model's parameters (FSDP1, or ZeRO 3 without its DeepSpeed); osora knows FSDP2 and DDP, and DeepSpeed "
            "with osora.orthonormality(model) in the loss"
        )
    change = _whole(change)
    Q = _whole(start).to(change.dtype) + change
    return Q, Q.t() @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)


def deviation(change: Tensor, start: Tensor, regularizer: str) -> Tensor:
    """``‖QᵀQ − I‖_F`` for "paper", its square for "squared", of ``Q = start + change`` [m, r]. Differentiable.

    Of a parameter that ZeRO 3 has partitioned it is collective, and differentiable once.
    """
    if hasattr(change, "ds_id"):
        return with_gradient(_PartitionedDeviation.apply, change, start, regularizer)  # type: ignore[arg-type]
    _, excess = _excess(change, start)
    return torch.linalg.vector_norm(excess) if regularizer == "paper" else excess.square().sum()


@torch.no_grad()
def deviation_gradient(change: Tensor, start: Tensor, regularizer: str) -> Tensor:
    """The gradient of :func:`deviation` by the change [m, r]: ``4 Q (QᵀQ − I)``, or ``2 Q (QᵀQ − I) / ‖QᵀQ − I‖_F``.

    Where ``QᵀQ = I`` to the last bit the paper's has no gradient, and is given that of its square: 0.
    """
    Q, excess = _excess(change, start)
    if regularizer == "squared":
        return 4 * Q @ excess
    norm = torch.linalg.vector_norm(excess)
    return 2 * Q @ (excess / torch.where(norm > 0, norm, 1))


class _PartitionedDeviation(torch.autograd.Function):
    """:func:`deviation` of a parameter that is whole now and will not be in the backward: its gradient is kept."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, start: Tensor, regularizer: str) -> Tensor:
        _, excess = _excess(change, start)
        ctx.save_for_backward(deviation_gradient(change, start, regularizer))
        return torch.linalg.vector_norm(excess) if regularizer == "paper" else excess.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def _placed_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The shard of a gradient that every process has all of, where the parameter is sharded. Nothing is sent."""
    if not hasattr(parameter, "full_tensor"):
        return gradient
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, placements)


# -- an adapter's penalty --------------------------------------------------------------------------------------------

registered: "weakref.WeakSet[Penalty]" = weakref.WeakSet()
_numbers = itertools.count()
_hooked = False


class Penalty:
    """``gamma`` times the mean of :func:`deviation` over all factors of an adapter.

    As long as it lives, each step of an optimiser that holds some of the factors gets its gradient. Its owner keeps it:
    the model's state, or a PEFT tuner.

    Args:
        layers: those that the adapter is in.
        adapter: its name.
        gamma: the weight in the loss.
        regularizer: "squared" or "paper".
    """

    def __init__(self, layers: Sequence[PenalisedLayer], adapter: str, gamma: float, regularizer: str) -> None:
        if regularizer not in REGULARIZERS:
            raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}, got {regularizer!r}")
        self.__setstate__(
            {"layers": list(layers), "adapter": adapter, "gamma": float(gamma), "regularizer": regularizer}
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: nothing of the step that is being taken."""
        return {name: getattr(self, name) for name in ("layers", "adapter", "gamma", "regularizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Count here too: copy and pickle make an object without __init__."""
        self.layers: list[PenalisedLayer] = state["layers"]
        self.adapter: str = state["adapter"]
        self.gamma: float = state["gamma"]
        self.regularizer: str = state["regularizer"]
        self.number = next(_numbers)  # an order that is the same on every process
        self.in_loss: set[int] = set()  # factors whose gradient has the penalty by way of the loss
        self.added: dict[int, tuple[weakref.ref, int]] = {}  # factor -> the gradient that has it, and its version
        _hook_optimisers()
        registered.add(self)

    def factors(self) -> list[Factor]:
        """Every factor, layer by layer."""
        return [pair for layer in self.layers for pair in layer.penalised(self.adapter)]

    def value(self, gamma: float | None = None) -> Tensor:
        """The penalty, a differentiable scalar. Once it went backward, the next step adds nothing."""
        factors = self.factors()
        total = (self.gamma if gamma is None else gamma) * self.share_of(factors)
        if total.requires_grad:
            total.register_hook(lambda _: self.in_loss.update(id(change) for change, _ in factors))
        return total

    def share_of(self, some: Sequence[Factor]) -> Tensor:
        """What some of the factors, one at least, add to the mean over all of them."""
        values = [deviation(change, start, self.regularizer) for change, start in some]
        return torch.stack([value.to(values[0].device) for value in values]).sum() / len(self.factors())

    def add_gradient(
        self, held: set[int], scale: Tensor | float, nested: bool, optimizer: Optimizer | None = None
    ) -> list[Factor]:
        """Add the gradient to ``.grad`` of the factors that an optimiser holds, unless it is there already.

        Returns the factors that got it.
        """
        factors: list[Factor] = self.factors()
        added: list[Factor] = []
        copies = [_steps_a_copy(change, optimizer) for change, _ in factors]
        known = any(copy is not None for copy in copies)  # by which steps are told from those of other models
        for (change, start), copy in zip(factors, copies, strict=True):
            if id(change) not in held and _is_deepspeeds(change) and (copy or not known):
                self._refuse_deepspeed(change)
            if id(change) not in held or change.grad is None:
                continue
            if id(change) in self.in_loss:
                self.in_loss.discard(id(change))
            elif self.gamma and not (nested and self._has_it(change)):
                gradient = deviation_gradient(change, start, self.regularizer)
                weighted = gradient * (self.gamma / len(factors)) * scale
                change.grad.add_(_placed_like(weighted, change).to(change.grad.dtype))
                self.added[id(change)] = weakref.ref(change.grad), change.grad._version
                added.append((change, start))
        return added

    def _refuse_deepspeed(self, change: nn.Parameter) -> None:
        if id(change) in self.in_loss or not self.gamma or not change.requires_grad:
            self.in_loss.discard(id(change))
            return
        raise RuntimeError(
            f"DeepSpeed's ZeRO steps copies of the parameters that SORSA's penalty of {self.adapter!r} is for, and "
            "would drop it: add osora.orthonormality(model) to the loss, train by FSDP2 or DDP, or set "
            "gamma=0"
        )

    def _has_it(self, change: nn.Parameter) -> bool:
        gradient, version = self.added.get(id(change), (None, -1))
        return gradient is not None and gradient() is change.grad and version == change.grad._version  # type: ignore[union-attr]


def _is_deepspeeds(parameter: nn.Parameter) -> bool:
    """Whether ZeRO (1 and 2, or 3) has made a partition of it that its optimiser steps instead."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _steps_a_copy(parameter: nn.Parameter, optimizer: Optimizer | None) -> bool | None:
    """Whether an optimiser steps DeepSpeed's copy of a parameter, None where this process has no part of that copy."""
    if (outer := getattr(parameter, "_z3_optimizer", None)) is not None:
        return outer.optimizer is optimizer
    if optimizer is None or (mapping := getattr(parameter, "_hp_mapping", None)) is None:
        return None
    where = mapping.hp_fragment.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == where for group in optimizer.param_groups for p in group["params"])


def penalties_in(model: nn.Module) -> list[Penalty]:
    """The penalties of the adapters that are active in a model."""
    inside = {id(module) for module in model.modules()}
    return [
        each
        for each in _in_order()
        if any(id(layer) in inside and each.adapter in layer.active_adapters for layer in each.layers)
    ]


def _in_order() -> list[Penalty]:
    return sorted(registered, key=lambda each: each.number)


def orthonormality(model: nn.Module, gamma: float | None = None) -> Tensor:
    """SORSA's penalty, ``gamma`` times the mean over all factors U and V of how far they are from orthonormal.

    Every step of an optimiser from ``torch.optim`` adds its gradient by itself, so that a training loop needs nothing
    (docs/sorsa.md). Call it to look at it, or to add it to a loss: when it has gone backward, the next step adds
    nothing more.

    Args:
        model: one with a SORSA adapter that is active, of this package or in PEFT.
        gamma: instead of the config's; 1 gives the mean itself.

    Returns:
        A scalar in float32 (float64), differentiable in the factors.

    Raises:
        ValueError: no SORSA adapter is active.
    """
    penalties = penalties_in(model)
    if not penalties:
        raise ValueError("no SORSA adapter is active in this model: there is nothing to penalise")
    values = [penalty.value(gamma) for penalty in penalties]
    return sum(values[1:], values[0])


# -- steps of optimisers ---------------------------------------------------------------------------------------------

_stepping: list[weakref.ref] = []  # optimisers within their steps, the outermost first


def _hook_optimisers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        # not traced into a compiled step, which would see the factors of the first trace alone
        register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
        register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _add_gradients(optimizer: Optimizer, nested: bool) -> list[tuple[Penalty, list[Factor]]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # a fused optimiser under GradScaler gets gradients that are still scaled, and this number to divide them by
    scale = getattr(optimizer, "grad_scale", None)
    return [(each, each.add_gradient(held, 1.0 if scale is None else scale, nested, optimizer)) for each in _in_order()]


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if not registered:
        return None
    # An optimiser whose step is another's step (ZeroRedundancyOptimizer) comes here twice; a step that raised stays.
    _stepping[:] = [each for each in _stepping if each() not in (None, optimizer)]
    nested = bool(_stepping)
    _stepping.append(weakref.ref(optimizer))
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        _add_gradients(optimizer, nested)
        return None
    if nested:
        return None  # it was wrapped on the way in

    def with_penalty() -> Any:
        loss = closure()
        added = _add_gradients(optimizer, nested=False)
        with torch.no_grad():  # a line search compares losses: they must have the penalty if their gradients do
            return loss if loss is None else loss + sum(each.gamma * float(each.share_of(f)) for each, f in added if f)

    if len(args) > 1:
        return (args[0], with_penalty, *args[2:]), kwargs
    return args, kwargs | {"closure": with_penalty}


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    _stepping[:] = [each for each in _stepping if each() not in (None, optimizer)]
