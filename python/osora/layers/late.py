# SPDX-License-Identifier: Apache-2.0
"""Adapters that come when the base is sharded already: where that is right, and how their gradients become one.

DeepSpeed takes what it finds when it is initialised. FSDP2 knows the parameters that ``fully_shard`` found; those
of a later adapter are whole on every process, and nobody would reduce their gradients.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from osora.layers.adapted import AdaptedLinear
from osora.layers.sharded import is_sharded


def can_come_late(layer: nn.Module, by_fsdp: bool) -> bool:
    """Whether an adapter with a basis can be trained on a layer as it is.

    That is a layer that is whole, that ZeRO 3 has partitioned and no engine has taken, or that FSDP2 has sharded, over
    one dimension of a mesh (and copied over others), on the device that it computes on. ``by_fsdp`` says whether
    FSDP2 has sharded anything in its model.
    """
    weight: Any = layer._parameters.get("weight")
    if weight is None or not is_sharded(weight):
        return True
    if hasattr(weight, "ds_id"):
        return not hasattr(weight, "_z3_optimizer")
    from torch.distributed.tensor import Shard

    *others, last = weight.placements
    whole = all(each.is_replicate() for each in others) and type(last) is Shard
    return by_fsdp and whole and weight.device_mesh.device_type == weight.to_local().device.type


class _Averages:
    """At the end of each backward the gradients of parameters that every process has become their mean.

    Gradients that were accumulated stay right: what is the mean already is the mean of itself. All parameters go at
    once, so that it does not matter which of them a process had a use for, nor in which order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Any) -> None:
        self.mesh, self.backward = mesh, -1
        self.groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self.groups[parameter.device, parameter.dtype].append(parameter)
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self.backward:  # a backward that raised has left its number, and the next has another
            self.backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _average(self) -> None:
        for parameters in self.groups.values():
            grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
            used = grads[0].new_tensor([float(p.grad is not None) for p in parameters])
            total = torch.cat([grad.flatten() for grad in grads] + [used])
            for dim in range(self.mesh.ndim):
                distributed.all_reduce(total, group=self.mesh.get_group(dim))
            *means, used = total.split([p.numel() for p in parameters] + [len(parameters)])
            for parameter, mean, count in zip(parameters, means, used.tolist(), strict=True):
                if count:
                    mean = (mean / self.mesh.size()).view_as(parameter)
                    if parameter.grad is None:
                        parameter.grad = mean
                    else:
                        parameter.grad.copy_(mean)


def average_late(layers: Iterable[AdaptedLinear]) -> None:
    """Have the gradients of new adapters averaged, as FSDP2 does it, where it has sharded the base before them."""
    late: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for layer in layers:
        weight: Any = layer.base_layer.weight
        if hasattr(weight, "full_tensor") and layer.adapter is not None:
            late[weight.device_mesh] += layer.trained(layer.adapter)
    for mesh, parameters in late.items():
        _Averages(parameters, mesh)


__all__ = ["average_late", "can_come_late"]
