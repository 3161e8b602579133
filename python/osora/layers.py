# SPDX-License-Identifier: Apache-2.0
"""The adapted linear layer: its base layer untouched, a frozen basis, and two trained vectors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from osora import ops, ops_effective, reference
from osora.factors import Decomposition
from osora.materialised import Materialised


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D`` of transformers: a linear layer that stores its weight as [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def oriented_weight(module: nn.Module) -> Tensor:
    """The weight as [out_features, in_features], a view for ``Conv1D``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


class OsoraLinear(nn.Module):
    """``y = base_layer(x) + (x V) Dᵀ`` with ``D = U ⊙ (o (S0 + s) + s)``; see docs/method.md.

    ``o`` [d] and ``s`` [r] are the trained changes of the output scales and of the singular values, in float32
    (float64 for a float64 base) and zero at the start, where the layer is its base exactly. ``U`` [d, r] and ``V``
    [k, r] have the base weight's dtype, ``S0`` [r] that of o and s. The base weight is never written.

    Args:
        base_layer: ``torch.nn.Linear`` or transformers' ``Conv1D``.
        factors: the top singular triplets of its weight.
        dropout: probability on the adapter branch's x while training.
    """

    U: Tensor
    V: Tensor
    S0: Tensor
    _materialised: Materialised | None = None

    def __init__(self, base_layer: nn.Module, factors: Decomposition, dropout: float = 0.0) -> None:
        """Take the frozen basis from ``factors``, on the base weight's device and in its dtype."""
        super().__init__()
        weight = oriented_weight(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = weight.shape
        self.rank = factors.S.numel()
        self.method, self.passes, self.converged = factors.method, factors.passes, factors.converged
        self.max_residual = factors.max_residual
        self.dropout = dropout
        self.enabled = True
        exact, device = reference.accumulate_dtype(weight.dtype), weight.device
        # contiguous: the operator reads both row by row, and safetensors stores nothing else
        self.register_buffer("U", factors.U.detach().to(weight).contiguous())
        self.register_buffer("V", factors.V.detach().to(weight).contiguous())
        self.register_buffer("S0", factors.S.detach().to(device, exact))
        self.o = nn.Parameter(torch.zeros(self.out_features, dtype=exact, device=device))
        self.s = nn.Parameter(torch.zeros(self.rank, dtype=exact, device=device))
        self._kept: list[nn.Parameter] = []  # the base weight while a merged one stands in its place
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as models that look at ``layer.weight`` expect."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the merged weight now."""
        return bool(self._kept)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if self.merged or not self.enabled:
            return self.base_layer(x)
        hooked = _has_hooks(self.base_layer)
        if hooked or (self.training and self.dropout > 0):
            branch, y = nn.functional.dropout(x, self.dropout, self.training), self.base_layer(x)
            if hooked or _has_global_hooks():  # which may keep y
                return y + ops.linear(branch, None, None, self.U, self.V, self.S0, self.s, self.o)
            return ops.linear_add_(y, branch, self.U, self.V, self.S0, self.s, self.o)
        weight = oriented_weight(self.base_layer)
        if self._materialised is None:
            return ops.linear(x, weight, self.bias, self.U, self.V, self.S0, self.s, self.o)
        self._materialised.check(self.base_layer.weight, self.o, self.s)
        return ops_effective.linear_effective(x, weight, self.bias, self.U, self.V, self.S0, self.s, self.o)

    @property
    def execution(self) -> str:
        """The plan: "split" or "materialised"; see :func:`osora.set_execution`."""
        return "split" if self._materialised is None else "materialised"

    def set_execution(self, plan: str) -> None:
        """Choose the plan. Raises ValueError for an unknown one, TypeError if parameters are not plain ones."""
        if plan not in ("split", "materialised"):
            raise ValueError(f'an execution plan is "split" or "materialised", got {plan!r}')
        base = self._kept[0] if self.merged else self.base_layer.weight
        assert isinstance(base, nn.Parameter)
        self._materialised = None if plan == "split" else Materialised(base, self.o, self.s)

    def refresh(self) -> None:
        """Make the materialised weight again, at the address it has; nothing to do under the split plan."""
        if self._materialised is not None and not self.merged:
            self._materialised.check(self.base_layer.weight, self.o, self.s)
            ops_effective.refresh(oriented_weight(self.base_layer), self.U, self.V, self.S0, self.s, self.o)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``ΔW = D Vᵀ`` [out_features, in_features], in float32 (float64 for a float64 base)."""
        exact = self.S0.dtype
        return ops.fold(self.U.to(exact), self.S0, self.s.to(exact), self.o.to(exact)) @ self.V.to(exact).t()

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W0 + ΔW``, summed in float32 and rounded once, in the base weight's place; the base weight is kept.

        Raises:
            ValueError: already merged, or the sum has NaN or infinite entries; nothing is changed then.
        """
        if self.merged:
            raise ValueError("the adapter is merged already")
        base = self.base_layer.weight
        assert isinstance(base, nn.Parameter)
        total = oriented_weight(self.base_layer).to(self.S0.dtype) + self.delta_weight()
        merged = total.to(base.dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"merging gives NaN or infinite weights in {base.dtype}")
        if is_conv1d(self.base_layer):
            merged = merged.t().contiguous()
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self._kept.append(base)
        if self._materialised is not None:  # nobody asks for it while the layer is merged
            self._materialised.drop()

    def unmerge(self) -> None:
        """Put the kept base weight back: the same tensor, bit for bit. Raises ValueError if it is not merged."""
        if not self.merged:
            raise ValueError("the adapter is not merged")
        self.base_layer.weight = self._kept.pop()

    def kept_weight(self) -> Tensor:
        """The base weight [out_features, in_features] behind a merged one."""
        return self._kept[0].t() if is_conv1d(self.base_layer) else self._kept[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OsoraLinear":
        """Moves and casts as any module, with two rules: the kept base follows, and o, s and S0 lose no digit.

        ``model.to(torch.bfloat16)`` would round S0, and so move the starting point; it casts U and V alone.
        """
        plan, self._materialised = self.execution, None  # what it made of the old tensors goes before they do
        exact_before = {name: getattr(self, name).detach() for name in ("o", "s", "S0")}
        for kept in self._kept:
            kept.data = fn(kept.data)
        super()._apply(fn, recurse)
        dtype = reference.accumulate_dtype(self.U.dtype)
        for name, before in exact_before.items():
            now = getattr(self, name)
            if now.dtype == before.dtype == dtype:
                continue
            restored = before.to(device=now.device, dtype=dtype)
            if name == "S0":
                self.S0 = restored
            else:
                grad, now.grad = now.grad, None  # a gradient of another dtype would refuse the assignment
                now.data = restored
                now.grad = None if grad is None else grad.to(dtype)
        self.set_execution(plan)
        return self

    def extra_repr(self) -> str:
        """Sizes and state, for ``print(model)``."""
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"rank={self.rank}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        parts.append(f"max_residual={self.max_residual:.1e}")
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        if self._materialised is not None:
            parts.append("execution=materialised")
        return ", ".join(parts)


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of a user, or of accelerate."""
    hooked: Any = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return bool(hooked) or "forward" in module.__dict__


def _has_global_hooks() -> bool:
    """Whether hooks on the calls of every module are registered; they see the base layer only where it is called."""
    return bool(torch.nn.modules.module._has_any_global_hook())
