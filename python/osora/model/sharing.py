# SPDX-License-Identifier: Apache-2.0
"""Two models on one set of base weights (docs/quantised.md)."""

import copy
from typing import Any

from torch import nn

from osora.layers.quantised import keep_order
from osora.model.state import all_layers, forget, state_of
from osora.model.targets import uncompiled, whole_modules
from osora.model.together import follow_calls


def share_base(model: nn.Module) -> nn.Module:
    """A model of its own, without adapters, on the same base weights: no weight is copied.

    It may get an adapter of its own by :func:`osora.attach`, or be the reference model of a preference loss. Buffers
    that are not quantised weights are copied. As long as both live, move or cast neither: give it away or to a trainer
    on the device where it is. Do this before a trainer or accelerate wraps the model, whose hooks would lead from the
    copy to the original.

    Args:
        model: any model, with adapters or without; not merged.

    Returns:
        A model of the same class; of one in DistributedDataParallel, the model inside it. What required a gradient
        before the adapter came does so in it.

    Raises:
        ValueError: the model is merged: its weights are then not the base's; or it has adapters of PEFT.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            "the model has adapters of PEFT, which would come along: share the base model, and then call "
            "get_peft_model on each of the two"
        )
    while isinstance(model, nn.parallel.DistributedDataParallel):  # which knows its parameters, and no others
        model = model.module
    layers = all_layers(model)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: call osora.unmerge(model) first")
    shared: dict[int, Any] = {}  # as copy.deepcopy keeps it: identity -> what stands for it
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in shared:
                continue
            # a parameter of its own for each model, on the same memory; but bitsandbytes' hold more than their memory
            plain = type(parameter) is nn.Parameter
            shared[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
        for name in ("quant_state", "state"):  # of bitsandbytes' layers; the weights' scales are in there
            state = module.__dict__.get(name)
            if type(state).__module__.startswith("bitsandbytes."):
                shared[id(state)] = state
    placed: list[Any] = [*layers.values(), *whole_modules(model).values()]
    for each in placed:
        shared[id(each)] = copy.deepcopy(each.base_layer, shared)
    keep_order(model)  # for good: packed by one, the weights would have no derivative in the other
    if layers:
        shared[id(state_of(model))] = None
    other = copy.deepcopy(model, shared)
    if layers:
        required = state_of(model).required_grad
        forget(other)
        follow_calls(other)
        for name, parameter in uncompiled(other).named_parameters():
            parameter.requires_grad_(required.get(name, parameter.requires_grad))
    return other
