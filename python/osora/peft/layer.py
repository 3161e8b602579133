# SPDX-License-Identifier: Apache-2.0
"""The adapted linear layer as PEFT wants it; what it computes is :mod:`osora.layers`'."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from osora import reference
from osora.layers.base_weight import (
    base_weight,
    has_hooks,
    is_conv1d,
    is_quantised,
    oriented_weight,
)
from osora.layers.batch import RowAdapters, weight_of_rows
from osora.layers.branch import adapted_linear
from osora.layers.formulas import Basis, owned
from osora.layers.kept import KeepsBase, replace_values, uncast
from osora.layers.read_weight import Place, read_weight
from osora.peft import loading
from osora.peft.parts import Adapter, Delta
from osora.svd.certificate import Decomposition


def _copy_views(layer: Any, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Of a basis that is another one's leading columns: what safetensors and accelerate look at owns its memory."""
    for name in layer.adapters:
        for kind in ("U", "V", "S0"):
            key = f"{prefix}{layer.method}_{kind}.{name}"
            if key in state:
                state[key] = owned(state[key])


class AdapterLayer(KeepsBase, BaseTunerLayer):
    """``y = base_layer(x) + Σ x ΔWᵀ`` over the active adapters.

    An adapter's tensors are in containers by its name, as all of PEFT's are: the trained ones in float32 (float64 for a
    float64 base), U and V in the base weight's dtype, S0 as the trained ones. Adapters that came from one decomposition
    share its memory: one of smaller rank holds views of the leading columns. The base weight is never written.

    Args:
        base_layer: ``torch.nn.Linear``, transformers' ``Conv1D``, or a quantised layer that is known.
        name: its name in the model without PEFT around it.
    """

    method: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        """Without an adapter it is its base."""
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.place = Place(name)
        self.out_features, self.in_features = base_weight(base_layer).shape
        self.adapters: dict[str, Adapter] = {}
        self.batch: Sequence[tuple[RowAdapters, Basis]] | None = None  # within a batch of several adapters
        self.base_kept = []
        self.of_inference = base_layer.weight.is_inference()  # type: ignore[operator, union-attr]
        self._disable_adapters = False
        self.merged_adapters = []
        self.frozen_peft_weight_names = {}
        for kind in self.trained:
            setattr(self, f"{self.method}_{kind}", nn.ModuleDict())
        for kind in ("S0", "U", "V"):
            setattr(self, f"{self.method}_{kind}", BufferDict())
        self.register_state_dict_post_hook(_copy_views)
        self.train(base_layer.training)

    def box(self, kind: str) -> Any:
        """The container of a kind of tensor: adapter's name → tensor, or module with a ``weight``."""
        return getattr(self, f"{self.method}_{kind}")

    # -- the adapters --

    @property
    def exact(self) -> torch.dtype:
        """The dtype of what is trained, and of S0."""
        return reference.accumulate_dtype(base_weight(self.base_layer).dtype)

    def basis(self, name: str) -> Basis:
        """U [d, r], V [k, r] and S0 [r] of an adapter."""
        return self.box("U")[name], self.box("V")[name], self.box("S0")[name]

    def deltas(self, name: str) -> tuple[nn.Parameter, ...]:
        """The trained tensors of an adapter, in the order of its formula's kinds."""
        return tuple(self.box(kind)[name].weight for kind in self.adapters[name].formula.kinds)

    def trained_kinds(self, name: str) -> dict[str, nn.Parameter]:
        """What an adapter trains here, by kind: nothing where it is not in this layer."""
        if name not in self.adapters:
            return {}
        formula = self.adapters[name].formula
        return {k: t for k, t in zip(formula.kinds, self.deltas(name), strict=True) if k in formula.trained}

    def values(self, name: str) -> dict[str, Tensor]:
        """The trained tensors by kind, then S0."""
        kinds = self.adapters[name].formula.kinds
        deltas = {kind: t.detach() for kind, t in zip(kinds, self.deltas(name), strict=True)}
        return deltas | {"S0": self.box("S0")[name]}

    def delta_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``(left [d, q], right [k, q])`` with ``ΔW = left rightᵀ``; left in float32 (float64)."""
        return self.adapters[name].formula.factors(self.basis(name), self.deltas(name))

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """``ΔW`` [out_features, in_features], in float32 (float64 for a float64 base)."""
        left, right = self.delta_factors(name)
        return left @ right.to(left.dtype).t()

    def put_basis(self, name: str, basis: Basis) -> None:
        """Give an adapter its basis: tensors as they are, so that adapters can share them."""
        for kind, value in zip(("U", "V", "S0"), basis, strict=True):
            persistent = kind == "S0" or self.adapters[name].save_basis
            self.box(kind).register_buffer(name, value, persistent=persistent)

    def put_factors(self, name: str, factors: Decomposition) -> None:
        """Give an adapter the basis of a decomposition, in the dtypes and on the device of the base weight."""
        weight = base_weight(self.base_layer)
        U, V = (owned(t.detach().to(weight.device, weight.dtype)) for t in (factors.U, factors.V))
        self.put_basis(name, (U, V, owned(factors.S.detach().to(weight.device, self.exact))))
        self.adapters[name].certificate = factors.certificate

    def add(self, name: str, adapter: Adapter, rank: int, fill: float = 0.0) -> None:
        """Make the trained tensors of a new adapter, all ``fill``; its basis comes with one of the two above."""
        device = base_weight(self.base_layer).device
        self.adapters[name] = adapter
        for kind, shape in adapter.formula.shapes(self.out_features, self.in_features, rank).items():
            self.box(kind)[name] = Delta(torch.full(shape, fill, dtype=self.exact, device=device))

    def widest(self) -> dict[str, list[str]]:
        """Adapters by the memory of their basis; in each group the one of largest rank comes first."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name in self.adapters:
            U, V, _ = self.basis(name)
            if not U.is_meta:
                groups.setdefault((U.data_ptr(), V.data_ptr()), []).append(name)
        ordered = [sorted(names, key=lambda n: -self.box("S0")[n].numel()) for names in groups.values()]
        return {names[0]: names for names in ordered}

    def share(self, name: str) -> None:
        """Let an adapter use the memory of another one's basis where its own is that one's leading columns."""
        mine, rank = self.basis(name), self.box("S0")[name].numel()
        for first in self.widest():
            wide = self.basis(first)
            if first == name or wide[2].numel() < rank or any(t.is_meta for t in (*mine, *wide)):
                continue
            views = wide[0][:, :rank], wide[1][:, :rank], wide[2][:rank]
            if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(views, mine, strict=True)):
                self.put_basis(name, views)
                return

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loading writes in place: an adapter that is to get another basis first gets memory of its own for it."""
        for names in self.widest().values():
            for name in names if len(names) > 1 else ():
                for kind, here in zip(("U", "V", "S0"), self.basis(name), strict=True):
                    value = state_dict.get(f"{prefix}{self.method}_{kind}.{name}")
                    if value is not None and not (value.shape == here.shape and torch.equal(value.to(here), here)):
                        U, V, S0 = self.basis(name)
                        self.put_basis(name, (U.clone(), V.clone(), S0.clone()))
                        break
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def settle(self) -> None:
        """Check what has come from files. Raises osora.AdapterError."""
        for name, adapter in self.adapters.items():
            if adapter.awaited is not None:
                loading.check_arrived(self, name)

    def penalised(self, adapter: str) -> list[tuple[nn.Parameter, Tensor]]:
        """Factors under SORSA's penalty, each with its start; see :mod:`osora.layers.penalty`."""
        return self.adapters[adapter].formula.penalised(self.basis(adapter), self.deltas(adapter))  # type: ignore[return-value]

    # -- what PEFT calls --

    @property
    def weight(self) -> Tensor:
        """``W0 + Σ ΔW`` for models that read it: the base layer's own where no adapter is on, or where it is merged.

        Within a batch of several adapters: that of the one that all rows have, or refused (:func:`weight_of_rows`).
        """
        active = [name for name in self.active_adapters if name in self.adapters]
        if self.batch is not None and not self._disable_adapters and not self.base_kept:
            return weight_of_rows(self.base_layer, self.batch, self.place)
        if self._disable_adapters or self.base_kept or not active:
            return self.base_layer.weight  # type: ignore[return-value]
        self.settle()
        parts = [(self.adapters[name].formula, self.basis(name), self.deltas(name)) for name in active]
        return read_weight(self.base_layer, parts, self.place)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if self._disable_adapters:
            if self.base_kept:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.batch is not None:
            return self._row_by_row(x)
        active = [name for name in self.active_adapters if name in self.adapters]
        if self.base_kept or not active:
            return self.base_layer(x, *args, **kwargs)
        if any(self.adapters[name].awaited is not None for name in active):
            self.settle()
        y: Any = None
        for name in active:
            adapter, basis, deltas = self.adapters[name], self.basis(name), self.deltas(name)
            dropout = adapter.dropout if self.training else 0.0
            if self.of_inference:
                self.refuse_training(deltas)
            if y is None:
                y = adapted_linear(self.base_layer, x, adapter.formula, basis, deltas, dropout)
            else:
                branch = nn.functional.dropout(x, dropout) if dropout else x
                y = y + adapter.formula.linear(branch, None, None, basis, deltas)
        return y

    def _row_by_row(self, x: Tensor) -> Tensor:
        assert self.batch is not None
        if self.base_kept:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first")
        y = None
        for rows, basis in self.batch:
            rows.check(x, self.training)
            if y is None and not has_hooks(self.base_layer) and not is_quantised(self.base_layer):
                y = rows.linear(x, oriented_weight(self.base_layer), self.bias, basis)
            else:
                y = rows.add(self.base_layer(x) if y is None else y, x, basis)
        return self.base_layer(x) if y is None else y

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, trainable unless ``inference_mode``; the others are frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        for name, adapter in self.adapters.items():
            for kind in adapter.formula.kinds:
                on = name in names and not inference_mode and kind in adapter.formula.trained
                self.box(kind)[name].requires_grad_(on)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, active or not; of each what its formula trains."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names & set(self.adapters):
            formula = self.adapters[name].formula
            for kind in formula.kinds:
                self.box(kind)[name].requires_grad_(requires_grad and kind in formula.trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Raises ValueError while it is merged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before deleting it")
        self.adapters.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        for names in self.widest().values():  # the adapter may have been the one that they had views of
            U, V, S0 = (owned(tensor) for tensor in self.basis(names[0]))
            for name in names:
                rank = self.box("S0")[name].numel()
                self.put_basis(name, (U[:, :rank], V[:, :rank], S0[:rank]))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``ΔW`` in the layout of the base weight, in float32 (float64 for a float64 base)."""
        self.settle()
        delta = self.delta_weight(adapter)
        return delta.t() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is of low rank."""
        return True

    # -- merging --

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put ``W0 + Σ ΔW``, summed in float32 and rounded once, in the base weight's place; the base weight is kept.

        ``safe_merge`` changes nothing: the sum is always made apart and looked at.

        Raises:
            ValueError: the sum has NaN or infinite entries; nothing is changed then.
        """
        if self.batch is not None:
            raise ValueError("a layer cannot be merged within a batch of several adapters: wait for its end")
        if not self.adapters:
            return
        new = [name for name in dict.fromkeys(check_adapters_to_merge(self, adapter_names)) if name in self.adapters]
        if not new:
            return
        self.settle()
        self.refuse_quantised(
            f"run {self.name} unmerged, or load the adapter natively (osora.load_adapter) and call "
            "osora.merge(model, requantize=True)"
        )
        self.refuse_computed()
        total = self.base_dense().to(self.exact)
        for name in [*self.merged_adapters, *new]:
            total = total + self.delta_weight(name)
        try:
            self.put_merged(total)
        except ValueError as error:  # in PEFT's words, which programs look for
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken: {self.name}, "
                f"{error}"
            ) from error
        self.merged_adapters = [*self.merged_adapters, *new]

    def unmerge(self) -> None:
        """Put the kept base weight back: the same tensor, bit for bit."""
        if not self.base_kept:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.put_back()
        self.merged_adapters = []

    # -- moves and copies --

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device alone: PEFT's own would round what is trained to the base weight's dtype."""
        if adapter_name not in self.adapters:
            return
        device = self.base_layer.weight.device if device is None else device  # type: ignore[assignment]
        for kind in self.adapters[adapter_name].formula.kinds:
            change = self.box(kind)[adapter_name]
            if not change.weight.is_meta and change.weight.device != device:
                change.to(device)
        if any(t.device != device for t in self.basis(adapter_name)):
            self.put_basis(adapter_name, tuple(t.to(device) for t in self.basis(adapter_name)))  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterLayer":
        """As of any module, but the kept base follows, S0 and changes lose no digit, and bases stay shared."""
        if self.batch is not None:
            raise RuntimeError("a model cannot be moved or cast within a batch of several adapters")
        before = {name: self.values(name) for name in self.adapters}
        shared = self.widest()
        self.move_kept(fn)
        super()._apply(fn, recurse)
        for name, values in before.items():
            self._restore(name, values)
        for first, names in shared.items():
            for name in names[1:]:
                rank = self.box("S0")[name].numel()
                U, V, _ = self.basis(first)
                self.put_basis(name, (U[:, :rank], V[:, :rank], self.box("S0")[name]))
        return self

    def _restore(self, name: str, before: Mapping[str, Tensor]) -> None:
        """The digits that a cast has taken from what an adapter trains, and from its S0."""
        exact = self.exact
        for kind, old in before.items():
            now = self.box("S0")[name] if kind == "S0" else self.box(kind)[name].weight
            if (value := uncast(now, old, exact)) is None:
                continue
            if kind == "S0":
                self.box("S0").register_buffer(name, value)
            else:
                replace_values(now, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are of the layer outside of any batch."""
        return self.__dict__ | {"batch": None}

    def extra_repr(self) -> str:
        """Sizes and ranks, for ``print(model)``."""
        ranks = {name: self.box("S0")[name].numel() for name in self.adapters}
        merged = f", merged={self.merged_adapters}" if self.base_kept else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={ranks}{merged}"


def layers_of(model: nn.Module, adapter: str) -> dict[str, AdapterLayer]:
    """Name → layer that an adapter is in, in the model's order."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdapterLayer) and adapter in layer.adapters
    }
