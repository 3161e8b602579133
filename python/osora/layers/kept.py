# SPDX-License-Identifier: Apache-2.0
"""A merged weight in the base weight's place, and back: the native layer's way, and that of PEFT's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from osora.layers.base_weight import dense_weight, is_conv1d, is_quantised
from osora.layers.known_base import KnownBase
from osora.layers.offloaded import is_offloaded
from osora.layers.quantised import AsItWas, Kept, kind_of, restore


class KeepsBase(nn.Module):
    """A layer around a ``base_layer``, whose own weight it keeps as long as a merged one stands in its place."""

    base_layer: nn.Module
    base_kept: list[Kept]  # one while the layer is merged
    out_features: int
    in_features: int
    of_inference: bool = False  # whether the base weight was made within torch.inference_mode()
    known: KnownBase | None = None  # the base weight's fingerprint, once it was taken

    awaits_basis: bool = False  # it was made on the meta device: see osora.restore_basis

    def refuse_awaiting(self) -> None:
        """Raise RuntimeError where U, V and S0 have no values yet."""
        if self.awaits_basis:
            raise RuntimeError(
                "the adapter was attached on the meta device, and its basis has no values yet: load the base weights, "
                "then call osora.restore_basis(model, folder)"
            )

    def base(self) -> Any:
        """The base layer or, while a merged weight is in it, what it was, for whoever reads a base weight."""
        return AsItWas(self.base_layer, self.base_kept[0]) if self.base_kept else self.base_layer

    def refuse_quantised(self, cure: str) -> None:
        """Raise ValueError where the base is quantised, so that merging would round most of an adapter away."""
        if (kind := kind_of(self.base_layer)) is not None:
            raise ValueError(
                f"the base weight is quantised ({kind.name(self.base_layer)}), and merging would round most of the "
                f"adapter away: {cure}"
            )

    def _own_weight(self) -> nn.Parameter:
        if is_offloaded(self.base_layer):
            raise ValueError(
                "accelerate has offloaded the base weight, and would take a merged one away with it: merge on disk "
                "(osora.merge_saved), or load the model without offloading"
            )
        own = self.base_kept[0].weight if self.base_kept else getattr(self.base_layer, "weight", None)
        if isinstance(own, Tensor) and not isinstance(own, nn.Parameter):
            raise ValueError(
                "the base weight is computed anew in each forward (pruned, or parametrised), so that nothing can be "
                "merged into it: make it a parameter first, by prune.remove, remove_weight_norm or "
                "parametrize.remove_parametrizations"
            )
        return own  # type: ignore[return-value]  # what is no tensor at all is told where it is read

    def refuse_training(self, deltas: Iterable[Tensor]) -> None:
        """Raise RuntimeError where a gradient would be needed past a weight of inference mode."""
        if torch.is_grad_enabled() and any(delta.requires_grad for delta in deltas):
            raise RuntimeError(
                "the base weight was made within torch.inference_mode(), and nothing can be trained on it: load the "
                "model outside of it (torch.no_grad() serves as well), or run this one under torch.inference_mode()"
            )

    def base_dense(self) -> Tensor:
        """The base weight [out_features, in_features] to sum a merged one from, as :func:`dense_weight` gives it.

        Raises:
            ValueError: the layer was exchanged for one of other sizes or without a weight, or is on the meta device.
        """
        weight, wanted = dense_weight(self.base()), (self.out_features, self.in_features)
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"the base weight is {list(weight.shape)}, and the adapter is for one of {list(wanted)}: the base "
                "layer was exchanged after the adapter had come: put it back, or detach first"
            )
        if weight.is_meta:
            raise ValueError("the base weight is on the meta device and has no values: load the weights first")
        return weight

    def refuse_computed(self) -> None:
        """Raise ValueError where the base weight is no parameter, so that nothing can take its place."""
        if kind_of(self.base_layer) is None:
            self._own_weight()

    def put_merged(self, total: Tensor) -> None:
        """Put a sum [out_features, in_features], rounded once, in the base weight's place; quantised where that is.

        Raises:
            ValueError: NaN or infinite entries, in the base weight's dtype; nothing is changed then.
        """
        if (kind := kind_of(self.base_layer)) is not None:
            if not bool(total.isfinite().all()):
                raise ValueError("merging gives NaN or infinite weights")
            kind.replace(self.base_layer, total, self.base_kept.append)
            return
        own = self._own_weight()
        merged = total.to(own.dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"merging gives NaN or infinite weights in {own.dtype}")
        if is_conv1d(self.base_layer):
            merged = merged.t()
        merged = merged.contiguous()
        self.base_kept[:] = [Kept(own)]  # first: whoever interrupts this can put it back
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)

    def put_back(self) -> None:
        """Put the kept base weight back: the same tensor, bit for bit."""
        restore(self.base_layer, self.base_kept[0])
        self.base_kept.clear()

    def move_kept(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Have the kept weight follow where ``nn.Module._apply(fn)`` moves the others. Raises RuntimeError."""
        for kept in self.base_kept:
            if is_quantised(self.base_layer):
                raise RuntimeError("a model merged with requantize=True cannot be moved: call osora.unmerge first")
            kept.weight.data = fn(kept.weight.data)


def uncast(now: Tensor, before: Tensor, exact: torch.dtype) -> Tensor | None:
    """``before`` in ``exact`` where ``now`` is, if a cast has taken digits of it; else None."""
    if now.dtype == before.dtype == exact or (before.is_meta and not now.is_meta):
        return None
    return before.to(device=now.device, dtype=exact)


def replace_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another dtype; its gradient follows."""
    grad, parameter.grad = parameter.grad, None  # a gradient of another dtype would refuse the assignment
    parameter.data = values
    parameter.grad = None if grad is None else grad.to(values.dtype)
