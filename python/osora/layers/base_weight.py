# SPDX-License-Identifier: Apache-2.0
"""A base layer's weight, however the layer stores it: as [out, in], as Conv1D's [in, out], or quantised."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osora.layers.offloaded import brought, execution_device, is_offloaded
from osora.layers.quantised import AsItWas, kind_of
from osora.layers.subclasses import has_own_forward


class BaseWeight(NamedTuple):
    """What a weight is, without its values."""

    shape: tuple[int, int]
    """(out_features, in_features)."""
    dtype: torch.dtype
    """The dtype that an adapter's basis is kept in: the weight's, or that of the weight before it was quantised."""
    stored: torch.dtype
    """The dtype of the matrix that :func:`dense_weight` gives: float32 for a quantised one."""
    device: torch.device
    quantised: bool = False

    @property
    def numel(self) -> int:
        """Entries."""
        return self.shape[0] * self.shape[1]


def is_conv1d(module: Any) -> bool:
    """Whether it is GPT-2's ``Conv1D`` of transformers: a linear layer that stores its weight as [in, out]."""
    kind = module.of if isinstance(module, AsItWas) else type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def oriented_weight(module: Any) -> Tensor:
    """The weight of a layer that is not quantised, as [out_features, in_features]: a view for ``Conv1D``.

    Raises:
        ValueError: the layer was exchanged for one whose weight is no tensor.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"the base layer is a {type(module).__module__}.{type(module).__qualname__}, whose weight is no tensor: it "
            "was exchanged after the adapter had come (quantize_dynamic does so): put the layer back, or detach first"
        )
    return weight.t() if is_conv1d(module) else weight


def is_quantised(module: Any) -> bool:
    """Whether the weight is quantised in a way that is known."""
    return kind_of(module) is not None


def base_weight(module: Any) -> BaseWeight:
    """What the weight is; cheap."""
    if (kind := kind_of(module)) is not None:
        return BaseWeight(kind.shape(module), kind.dtype(module), torch.float32, module.weight.device, quantised=True)
    weight: Any = getattr(module, "weight", None)
    # where attach learns of shapes; a parameter that ZeRO 3 has partitioned is empty outside of its layer
    d, k = getattr(weight, "ds_shape", None) or oriented_weight(module).shape
    if hasattr(weight, "ds_shape") and is_conv1d(module):
        d, k = k, d
    return BaseWeight((d, k), weight.dtype, weight.dtype, execution_device(module))


def dense_weight(module: Any) -> Tensor:
    """[out_features, in_features]: the weight itself; of a quantised one what it stands for, a new tensor.

    Of a weight that accelerate has offloaded, a copy where it is computed with.
    """
    if is_offloaded(module):
        return brought(module, dense_weight)
    kind = kind_of(module)
    return oriented_weight(module) if kind is None else kind.dense(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether it is to be called: hooks, a forward of its own, or a layer around it, such as PEFT's LoRA."""
    hooked: Any = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    own = "forward" in module.__dict__ or has_own_forward(module)
    return bool(hooked) or own or "base_layer" in module._modules


def has_global_hooks() -> bool:
    """Whether hooks on the calls of every module are registered; they see the base layer only where it is called."""
    return bool(torch.nn.modules.module._has_any_global_hook())
