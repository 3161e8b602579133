# SPDX-License-Identifier: Apache-2.0
"""The adapted linear layer: its base layer untouched, a frozen basis, and two trained vectors an adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osora import ops, ops_effective, reference
from osora.factors import Decomposition
from osora.materialised import Materialised

DEFAULT = "default"  # the name of an adapter that was given none


@dataclass(frozen=True)
class RowAdapters:
    """One batch, row by row: what :func:`osora.adapters_in_batch` gives to a layer."""

    s: Tensor  # [A, r of the basis], zero beyond an adapter's rank
    o: Tensor  # [A, d]
    ranks: Tensor | None  # [A]; None where all have the rank of the basis
    index: Tensor  # [rows]: the adapter of a row; -1 for the base, and for adapters that leave the layer alone
    dropout: bool  # whether one of the batch's adapters is to be trained with dropout
    trainable: bool  # whether a parameter behind s and o requires a gradient


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

    Several adapters share base and basis, each with an o and an s of its own; one of smaller rank uses the leading
    columns of the basis. ``o`` and ``s`` are those of the active one, or None where that has none in this layer, which
    then is its base. The others wait as parameters ``o@NAME`` and ``s@NAME``.

    Args:
        base_layer: ``torch.nn.Linear`` or transformers' ``Conv1D``.
        factors: the top singular triplets of its weight.
        dropout: probability on the adapter branch's x while training.
        adapter: name of the adapter that o and s belong to.
    """

    o: nn.Parameter
    s: nn.Parameter

    U: Tensor
    V: Tensor
    S0: Tensor
    _plan: str = "split"
    _materialised: Materialised | None = None

    def __init__(
        self, base_layer: nn.Module, factors: Decomposition, dropout: float = 0.0, adapter: str = DEFAULT
    ) -> None:
        """Take the frozen basis from ``factors``, on the base weight's device and in its dtype."""
        super().__init__()
        weight = oriented_weight(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = weight.shape
        self.method, self.passes, self.converged = factors.method, factors.passes, factors.converged
        self.max_residual = factors.max_residual
        self.dropout = dropout
        self.enabled = True
        self.adapter: str | None = adapter
        self.batch: RowAdapters | None = None  # within osora.adapters_in_batch
        exact, device = reference.accumulate_dtype(weight.dtype), weight.device
        # contiguous: the operator reads both row by row, and safetensors stores nothing else
        self.register_buffer("U", factors.U.detach().to(weight).contiguous())
        self.register_buffer("V", factors.V.detach().to(weight).contiguous())
        self.register_buffer("S0", factors.S.detach().to(device, exact))
        self.o = nn.Parameter(torch.zeros(self.out_features, dtype=exact, device=device))
        self.s = nn.Parameter(torch.zeros(factors.S.numel(), dtype=exact, device=device))
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
    def rank(self) -> int:
        """The active adapter's rank; without one, the basis's."""
        return int(self.S0.numel() if self.adapter is None else self.s.numel())

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the merged weight now."""
        return bool(self._kept)

    def basis(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U, V and S0 of the active adapter, or of one of that rank: the leading columns, as views."""
        rank = self.rank if rank is None else rank
        if rank == self.S0.numel():
            return self.U, self.V, self.S0
        return self.U[:, :rank], self.V[:, :rank], self.S0[:rank]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if self.merged or not self.enabled:
            return self.base_layer(x)
        if self.batch is not None:
            return self._row_by_row(x, self.batch)
        if self.adapter is None:
            return self.base_layer(x)
        U, V, S0 = self.basis()
        hooked = _has_hooks(self.base_layer)
        if hooked or (self.training and self.dropout > 0):
            branch, y = nn.functional.dropout(x, self.dropout, self.training), self.base_layer(x)
            if hooked or _has_global_hooks():  # which may keep y
                return y + ops.linear(branch, None, None, U, V, S0, self.s, self.o)
            return ops.linear_add_(y, branch, U, V, S0, self.s, self.o)
        weight = oriented_weight(self.base_layer)
        if self._materialised is None:
            return ops.linear(x, weight, self.bias, U, V, S0, self.s, self.o)
        self._materialised.check(self.base_layer.weight, self.o, self.s)
        return ops_effective.linear_effective(x, weight, self.bias, U, V, S0, self.s, self.o)

    def _row_by_row(self, x: Tensor, batch: RowAdapters) -> Tensor:
        if x.dim() < 2 or x.shape[0] != batch.index.numel():
            raise ValueError(
                f"adapters_in_batch has {batch.index.numel()} names, and a layer got x of shape {list(x.shape)}: the "
                "first dimension must be the batch, with a name for each of its rows (each beam counts as one)"
            )
        if self.training and batch.dropout:
            raise ValueError("adapters_in_batch is for inference, and an adapter has dropout: call model.eval() first")
        if batch.trainable and torch.is_grad_enabled():
            raise RuntimeError(
                "adapters_in_batch is for inference, and an adapter requires a gradient: run it under torch.no_grad()"
            )
        if not len(batch.s):
            return self.base_layer(x)
        rest = (self.U, self.V, self.S0, batch.s, batch.o, batch.index, batch.ranks)
        if _has_hooks(self.base_layer):
            return self.base_layer(x) + ops.linear_multi(x, None, None, *rest)
        return ops.linear_multi(x, oriented_weight(self.base_layer), self.bias, *rest)

    # -- several adapters --

    def adapters(self) -> list[str]:
        """The names of those that this layer has, the active one first."""
        waiting = [name.removeprefix("o@") for name in self._parameters if name.startswith("o@")]
        return waiting if self.adapter is None else [self.adapter, *waiting]

    def deltas(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """o and s of one of :meth:`adapters`."""
        if name == self.adapter:
            return self.o, self.s
        return getattr(self, f"o@{name}"), getattr(self, f"s@{name}")

    def add_adapter(self, name: str, o: Tensor, s: Tensor) -> None:
        """Take one more, which waits: copies of o [d] and of s [at most the basis's rank], in S0's dtype and place."""
        assert name not in self.adapters() and o.numel() == self.out_features and s.numel() <= self.S0.numel()
        for kind, value in (("o", o), ("s", s)):
            value = value.detach().to(self.S0, copy=True)
            self.register_parameter(f"{kind}@{name}", nn.Parameter(value, requires_grad=False))

    def remove_adapter(self, name: str) -> None:
        """Forget one of :meth:`adapters` that is not the active one."""
        for kind in "os":
            del self._parameters[f"{kind}@{name}"]

    def select_adapter(self, name: str | None) -> None:
        """Make o and s those of the adapter ``name``, or None where the layer has no such adapter."""
        if name is not None and name not in self.adapters():
            name = None
        for kind in "os":
            if self.adapter is not None:
                self.register_parameter(f"{kind}@{self.adapter}", getattr(self, kind))
            self.register_parameter(kind, None if name is None else self._parameters.pop(f"{kind}@{name}"))
        self.adapter = name
        self._materialised = self._watch(self._plan)

    def widened(self, factors: Decomposition) -> tuple[Tensor, Tensor, Tensor]:
        """U, V and S0, and behind them the triplets of ``factors`` that the basis does not have."""
        rank = self.S0.numel()
        U, V, S = (t.detach() for t in (factors.U[:, rank:], factors.V[:, rank:], factors.S[rank:]))
        return (
            torch.cat([self.U, U.to(self.U)], 1),
            torch.cat([self.V, V.to(self.V)], 1),
            torch.cat([self.S0, S.to(self.S0)]),
        )

    def widen(self, factors: Decomposition) -> None:
        """Make :meth:`widened` the basis; the adapters that are there go on using its leading columns."""
        self.U, self.V, self.S0 = self.widened(factors)
        self.max_residual = max(self.max_residual, factors.max_residual)
        self.converged = self.converged and factors.converged

    # -- execution plans --

    @property
    def execution(self) -> str:
        """The plan: "split" or "materialised"; see :func:`osora.set_execution`."""
        return self._plan

    def set_execution(self, plan: str) -> None:
        """Choose the plan. Raises ValueError for an unknown one, TypeError if parameters are not plain ones."""
        if plan not in ("split", "materialised"):
            raise ValueError(f'an execution plan is "split" or "materialised", got {plan!r}')
        self._materialised = self._watch(plan)
        self._plan = plan

    def _watch(self, plan: str) -> Materialised | None:
        if plan == "split" or self.adapter is None:
            return None
        base = self._kept[0] if self.merged else self.base_layer.weight
        assert isinstance(base, nn.Parameter)
        return Materialised(base, self.o, self.s)

    def refresh(self) -> None:
        """Make the materialised weight again, at the address it has; nothing to do under the split plan."""
        if self._materialised is not None and not self.merged:
            self._materialised.check(self.base_layer.weight, self.o, self.s)
            ops_effective.refresh(oriented_weight(self.base_layer), *self.basis(), self.s, self.o)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``ΔW = D Vᵀ`` [out_features, in_features], in float32 (float64 for a float64 base)."""
        D, V = self.delta_factors(self.o, self.s)
        return D @ V.to(D.dtype).t()

    @torch.no_grad()
    def delta_factors(self, o: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """D [out_features, r] and V [in_features, r] of an adapter in this basis, D in float32 (float64)."""
        U, V, S0 = self.basis(s.numel())
        return fold_exactly(U, S0, o, s), V

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W0 + ΔW``, summed in float32 and rounded once, in the base weight's place; the base weight is kept.

        Raises:
            ValueError: already merged, or the sum has NaN or infinite entries; nothing is changed then.
        """
        if self.merged:
            raise ValueError("the adapter is merged already")
        if self.batch is not None:
            raise ValueError("merging is not possible within adapters_in_batch")
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
        if self.batch is not None:
            raise RuntimeError("a model cannot be moved or cast within adapters_in_batch")
        self._materialised = None  # what it made of the old tensors goes before they do
        exact_before = {name: p.detach() for name, p in self._parameters.items() if p is not None} | {"S0": self.S0}
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
        self._materialised = self._watch(self._plan)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are of the layer outside of any batch."""
        return self.__dict__ | {"batch": None}

    def extra_repr(self) -> str:
        """Sizes and state, for ``print(model)``."""
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"rank={self.rank}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        parts.append(f"max_residual={self.max_residual:.1e}")
        if self.adapters() != [DEFAULT]:
            parts.append(f"adapters={self.adapters()}, active={self.adapter!r}")
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        if self._materialised is not None:
            parts.append("execution=materialised")
        return ", ".join(parts)


def fold_exactly(U: Tensor, S0: Tensor, o: Tensor, s: Tensor) -> Tensor:
    """D [d, r] of 16-bit factors too in float32: what merges and fingerprints start from."""
    return ops.fold(U.to(S0.dtype), S0, s.to(S0), o.to(S0))


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of a user, or of accelerate."""
    hooked: Any = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return bool(hooked) or "forward" in module.__dict__


def _has_global_hooks() -> bool:
    """Whether hooks on the calls of every module are registered; they see the base layer only where it is called."""
    return bool(torch.nn.modules.module._has_any_global_hook())
