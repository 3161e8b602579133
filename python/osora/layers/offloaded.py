# SPDX-License-Identifier: Apache-2.0
"""Base layers whose weight is elsewhere until they are called: those that accelerate has offloaded, to memory or disk.

Its hook stands on the base layer: it brings the weight when that is called, and takes it away after. A layer around it
calls it, as any that has a hook.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def _hook(module: Any) -> Any:
    """accelerate's hook that brings the weight, None for no such."""
    hook = getattr(module, "_hf_hook", None) if isinstance(module, nn.Module) else None
    for each in (hook, *getattr(hook, "hooks", ())):  # its SequentialHook has several
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


def is_offloaded(module: Any) -> bool:
    """Whether the layer's weight is on the meta device now, and accelerate brings it for a call."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Module) else None
    return weight is not None and weight.is_meta and _hook(module) is not None


def execution_device(module: Any) -> torch.device:
    """Where a layer's weight is when it is computed with."""
    if not is_offloaded(module):
        return module.weight.device
    device = _hook(module).execution_device  # a number, a name, or a device
    if isinstance(device, int):
        return torch.device(torch.accelerator.current_accelerator().type, device)  # type: ignore[union-attr]
    return torch.device(device)


def brought(module: Any, read: Callable[[Any], T]) -> T:
    """What ``read`` makes of an offloaded layer while its weight is there; the tensors it gives stay."""
    hook = _hook(module)
    hook.pre_forward(module)
    try:
        return read(module)
    finally:
        hook.post_forward(module, None)


__all__ = ["brought", "execution_device", "is_offloaded"]
