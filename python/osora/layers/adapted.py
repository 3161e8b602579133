# SPDX-License-Identifier: Apache-2.0
"""The adapted linear layer, of any method: its base layer untouched, a frozen basis, and each adapter's tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from osora import reference
from osora.layers.base_weight import (
    base_weight,
    dense_weight,
    has_hooks,
    is_quantised,
    oriented_weight,
)
from osora.layers.batch import RowAdapters, weight_of_rows
from osora.layers.branch import adapted_linear
from osora.layers.formulas import Basis, Formula, leading, owned
from osora.layers.kept import KeepsBase, replace_values, uncast
from osora.layers.materialised import Materialised
from osora.layers.offloaded import is_offloaded
from osora.layers.read_weight import Place, read_weight
from osora.layers.together import linear_together
from osora.ops.materialised import linear_materialised, refresh
from osora.svd.certificate import Decomposition

DEFAULT = "default"  # the name of an adapter that was given none


class AdaptedLinear(KeepsBase):
    """``y = base_layer(x) + x ΔWᵀ`` with the ΔW of the active adapter; see docs/method.md.

    An adapter's tensors are the trained changes that its formula names, in float32 (float64 for a float64 base) and
    zero at the start, where the layer is its base exactly. ``U`` [d, r] and ``V`` [k, r] have the base weight's dtype,
    ``S0`` [r] that of the changes. The base weight is never written.

    Several adapters share base and basis; one of smaller rank uses the leading columns of the basis. The active one's
    tensors are the parameters of the formula's names (``o`` and ``s``, say), or None where no adapter is active in this
    layer, which then is its base. The others wait as ``o@NAME`` and ``s@NAME``.

    Args:
        base_layer: ``torch.nn.Linear``, transformers' ``Conv1D``, or a quantised layer that is known.
        factors: the top singular triplets of its weight.
        formula: of the adapter that comes first.
        dropout: probability on the adapter branch's x while training.
        adapter: its name.
    """

    U: Tensor
    V: Tensor
    S0: Tensor
    s: nn.Parameter  # every method has it
    place: Place = Place()
    together: bool = False  # with the model's other layers, in a call of the model; see osora.set_execution
    _plan: str = "split"
    _materialised: Materialised | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Decomposition,
        formula: Formula,
        dropout: float = 0.0,
        adapter: str = DEFAULT,
    ) -> None:
        """Take the frozen basis from ``factors``, on the base weight's device and in its dtype."""
        super().__init__()
        weight = base_weight(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = weight.shape
        self.certificate = factors.certificate
        self.dropout = dropout
        self.enabled = True
        self.adapter: str | None = adapter
        self.batch: RowAdapters | None = None  # within osora.adapters_in_batch
        exact, device = reference.accumulate_dtype(weight.dtype), weight.device
        self.awaits_basis = device.type == "meta"
        # contiguous: the operator reads both row by row, and safetensors stores nothing else
        self.register_buffer("U", owned(factors.U.detach().to(device, weight.dtype)))
        self.register_buffer("V", owned(factors.V.detach().to(device, weight.dtype)))
        self.register_buffer("S0", owned(factors.S.detach().to(device, exact)))
        self._formulas: dict[str, Formula] = {adapter: formula}
        for kind, shape in formula.shapes(self.out_features, self.in_features, factors.S.numel()).items():
            zeros = torch.zeros(shape, dtype=exact, device=device)
            self.register_parameter(kind, nn.Parameter(zeros, requires_grad=kind in formula.trained))
        self.base_kept = []
        self.of_inference = base_layer.weight.is_inference()  # type: ignore[operator, union-attr]
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """``W0 + ΔW`` for models that read it: the base layer's own where no adapter is on, or where it is merged.

        Within a batch of several adapters it is that of the one that all rows have; its values are refused if they
        have several (:func:`osora.layers.batch.weight_of_rows`).
        """
        if not self.merged and self.enabled and self.batch is not None:
            return weight_of_rows(self.base_layer, [(self.batch, self.basis(self.S0.numel()))], self.place)
        if self.merged or not self.enabled or self.adapter is None:
            return self.base_layer.weight  # type: ignore[return-value]
        part = self.formula(self.adapter), self.basis(), self.deltas(self.adapter)
        return read_weight(self.base_layer, [part], self.place)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """The active adapter's rank; without one, the basis's."""
        return self.S0.numel() if self.adapter is None else self.formula(self.adapter).rank(self.deltas(self.adapter))

    @property
    def merged(self) -> bool:
        """Whether the base layer holds the merged weight now."""
        return bool(self.base_kept)

    def basis(self, rank: int | None = None) -> Basis:
        """U, V and S0 of the active adapter, or of one of that rank: the leading columns, as views."""
        self.refuse_awaiting()
        return leading((self.U, self.V, self.S0), self.rank if rank is None else rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if self.merged or not self.enabled:
            return self.base_layer(x)
        if self.batch is not None:
            return self._row_by_row(x, self.batch)
        if self.adapter is None:
            return self.base_layer(x)
        if self.together and (y := linear_together(self, x)) is not None:
            return y
        formula, deltas, basis = self.formula(self.adapter), self.deltas(self.adapter), self.basis()
        if self.of_inference:
            self.refuse_training(deltas)
        dropout = self.dropout if self.training else 0.0
        if self._materialised is None or dropout > 0 or has_hooks(self.base_layer):
            return adapted_linear(self.base_layer, x, formula, basis, deltas, dropout)
        self._materialised.check(self.base_layer.weight, *deltas)
        o, s = deltas
        return linear_materialised(x, oriented_weight(self.base_layer), self.bias, *basis, s, o)

    def _row_by_row(self, x: Tensor, batch: RowAdapters) -> Tensor:
        batch.check(x, self.training)
        if batch.is_empty:
            return self.base_layer(x)
        if has_hooks(self.base_layer) or is_quantised(self.base_layer):
            return batch.add(self.base_layer(x), x, self.basis(self.S0.numel()))
        return batch.linear(x, oriented_weight(self.base_layer), self.bias, self.basis(self.S0.numel()))

    # -- several adapters --

    def adapters(self) -> list[str]:
        """The names of those that this layer has, the active one first."""
        return sorted(self._formulas, key=lambda name: name != self.adapter)

    @property
    def active_adapters(self) -> list[str]:
        """The active one, if there is one: what PEFT's layers call so."""
        return [] if self.adapter is None else [self.adapter]

    def formula(self, name: str) -> Formula:
        """The method of one of :meth:`adapters`."""
        return self._formulas[name]

    def _tensors(self, name: str, kinds: tuple[str, ...]) -> tuple[nn.Parameter, ...]:
        of = "" if name == self.adapter else f"@{name}"
        return tuple([getattr(self, kind + of) for kind in kinds])

    def deltas(self, name: str) -> tuple[nn.Parameter, ...]:
        """The tensors of one of :meth:`adapters`, in the order of its formula's kinds."""
        return self._tensors(name, self._formulas[name].kinds)

    def trained(self, name: str) -> tuple[nn.Parameter, ...]:
        """Those of :meth:`deltas` that are trained."""
        return self._tensors(name, self._formulas[name].trained)

    def penalised(self, name: str) -> list[tuple[nn.Parameter, Tensor]]:
        """The factors of one of :meth:`adapters` that a penalty keeps orthonormal: change and start, both [m, r]."""
        deltas = self.deltas(name)
        found = self._formulas[name].penalised(self.basis(self._formulas[name].rank(deltas)), deltas)
        return found  # type: ignore[return-value]

    def add_adapter(self, name: str, formula: Formula, deltas: Mapping[str, Tensor] | int) -> None:
        """Take one more, which waits: copies of its tensors in S0's dtype and place, or zeros for a rank."""
        rank = deltas if isinstance(deltas, int) else formula.rank(formula.named(deltas))
        if name in self._formulas:
            raise ValueError(f"this layer has an adapter {name!r} already")
        if rank > self.S0.numel():
            raise ValueError(f"an adapter of rank {rank} needs a basis of as many columns: this one has {len(self.S0)}")
        for kind, shape in formula.shapes(self.out_features, self.in_features, rank).items():
            value = self.S0.new_zeros(shape)
            if not isinstance(deltas, int):
                if deltas[kind].shape != shape:
                    raise ValueError(f"{kind} must have shape {list(shape)}, got {list(deltas[kind].shape)}")
                value.copy_(deltas[kind].detach())
            self.register_parameter(f"{kind}@{name}", nn.Parameter(value, requires_grad=False))
        self._formulas[name] = formula

    def remove_adapter(self, name: str) -> None:
        """Forget one of :meth:`adapters` that is not the active one."""
        for kind in self._formulas.pop(name).kinds:
            del self._parameters[f"{kind}@{name}"]

    def select_adapter(self, name: str | None) -> None:
        """Make the adapter ``name`` the active one, or none where the layer has no such adapter."""
        if name is not None and name not in self._formulas:
            name = None
        if name == self.adapter:
            return
        if self.adapter is not None:
            for kind in self._formulas[self.adapter].kinds:
                self.register_parameter(f"{kind}@{self.adapter}", getattr(self, kind))
                self.register_parameter(kind, None)
        if name is not None:
            for kind in self._formulas[name].kinds:
                self.register_parameter(kind, self._parameters.pop(f"{kind}@{name}"))
        self.adapter = name
        self._materialised = self._watch(self._plan)

    def widened(self, factors: Decomposition) -> Basis:
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
        self.certificate = self.certificate.beside(factors.certificate)

    # -- execution plans --

    @property
    def execution(self) -> str:
        """The plan: "split" or "materialised"; see :func:`osora.set_execution`."""
        return self._plan

    def set_execution(self, plan: str, together: bool = False) -> None:
        """Choose the plan.

        Raises:
            ValueError: no such plan, or the active adapter's method does not have it; together under another than
                "split".
            TypeError: parameters that are not plain ones.
        """
        if plan not in ("split", "materialised"):
            raise ValueError(f'an execution plan is "split" or "materialised", got {plan!r}')
        if together and plan != "split":
            raise ValueError(f"together=True is the split plan's, got {plan!r}")
        if plan == "materialised" and is_quantised(self.base_layer):
            raise ValueError("the materialised plan needs a base that is not quantised: leave it on the split plan")
        if plan == "materialised" and is_offloaded(self.base_layer):
            raise ValueError("the materialised plan needs a base that is not offloaded: leave it on the split plan")
        if plan == "materialised" and self.adapter is not None and not self._can_materialise():
            raise ValueError(
                f"the materialised plan is for OSoRA with O from 1 on the output side, and {self.adapter!r} is "
                f"{self.formula(self.adapter)}: leave it on the split plan"
            )
        self._materialised = self._watch(plan)
        self._plan, self.together = plan, together

    def _can_materialise(self) -> bool:
        return self.adapter is not None and self.formula(self.adapter).standard

    def _watch(self, plan: str) -> Materialised | None:
        if plan == "split" or not self._can_materialise():
            return None
        base = self.base_kept[0].weight if self.merged else self.base_layer.weight
        if not isinstance(base, nn.Parameter):
            raise TypeError("the materialised plan needs a base weight that is a parameter: leave it on the split plan")
        return Materialised(base, *self.deltas(self.adapter or DEFAULT))

    def refresh(self) -> None:
        """Make the materialised weight again, at the address it has; nothing to do under the split plan."""
        if self._materialised is not None and not self.merged:
            assert self.adapter is not None
            o, s = self.deltas(self.adapter)
            self._materialised.check(self.base_layer.weight, o, s)
            refresh(oriented_weight(self.base_layer), *self.basis(), s, o)

    # -- the change of the weight --

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``ΔW`` [out_features, in_features] of the active adapter, in float32. Raises ValueError if there is none."""
        if self.adapter is None:
            raise ValueError(f"no adapter is active in this layer; it has {', '.join(map(repr, self._formulas))}")
        left, right = self.delta_factors(self.adapter)
        return left @ right.to(left.dtype).t()

    def delta_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(left [out_features, q], right [in_features, q])`` of an adapter, ``ΔW = left rightᵀ``; left in float32."""
        formula, deltas = self.formula(name), self.deltas(name)
        return formula.factors(self.basis(formula.rank(deltas)), deltas)

    @torch.no_grad()
    def merge(self, requantize: bool = False) -> None:
        """Put ``W0 + ΔW``, summed in float32 and rounded once, in the base weight's place; the base weight is kept.

        With ``requantize`` the sum is quantised as a quantised base is; without, such a base is refused.

        Raises:
            ValueError: already merged, quantised, or the sum has NaN or infinite entries; nothing is changed then.
        """
        if self.merged:
            raise ValueError("the adapter is merged already: call osora.unmerge(model) before merging another")
        if self.batch is not None:
            raise ValueError("a layer cannot be merged within adapters_in_batch: leave its with block first")
        if not requantize:
            self.refuse_quantised(
                "run it unmerged, dequantise the base before, or call osora.merge(model, requantize=True)"
            )
        self.put_merged(self.base_dense().to(self.S0.dtype) + self.delta_weight())
        if self._materialised is not None:  # nobody asks for it while the layer is merged
            self._materialised.drop()

    def unmerge(self) -> None:
        """Put the kept base weight back: the same tensor, bit for bit. Raises ValueError if it is not merged."""
        if not self.merged:
            raise ValueError("the adapter is not merged: there is nothing to undo")
        self.put_back()

    def kept_weight(self) -> Tensor:
        """The base weight [out_features, in_features] behind a merged one, as it is stored or dequantised."""
        return dense_weight(self.base())

    # -- moves and copies --

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedLinear":
        """Moves and casts as any module, with two rules: the kept base follows, and S0 and deltas lose no digit.

        ``model.to(torch.bfloat16)`` would round S0, and so move the starting point; it casts U and V alone.
        """
        if self.batch is not None:
            raise RuntimeError("a model cannot be moved or cast within adapters_in_batch")
        self._materialised = None  # what it made of the old tensors goes before they do
        exact_before = {name: p.detach() for name, p in self._parameters.items() if p is not None} | {"S0": self.S0}
        self.move_kept(fn)
        super()._apply(fn, recurse)
        dtype = reference.accumulate_dtype(self.U.dtype)
        for name, before in exact_before.items():
            now = getattr(self, name)
            if (values := uncast(now, before, dtype)) is None:
                continue
            if name == "S0":
                self.S0 = values
            else:
                replace_values(now, values)
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
        parts.append(f"max_residual={self.certificate.max_residual:.1e}")
        if self.adapters() != [DEFAULT]:
            parts.append(f"adapters={self.adapters()}, active={self.adapter!r}")
        if self.merged:
            parts.append("merged")
        if not self.enabled:
            parts.append("disabled")
        if self._materialised is not None:
            parts.append("execution=materialised")
        if self.together:
            parts.append("together")
        return ", ".join(parts)
