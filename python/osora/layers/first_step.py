# SPDX-License-Identifier: Apache-2.0
"""Layers that train nothing are told at the first step of an optimiser: no gradient has reached their tensors."""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

log = logging.getLogger("osora")
_NAMES_SHOWN = 5


class _Watch:
    """The layers of one adapter that no optimiser has stepped yet."""

    def __init__(self, layers: Mapping[str, nn.Module], trained: Callable[[Any], Iterable[Tensor]]) -> None:
        self.layers = {name: weakref.ref(layer) for name, layer in layers.items()}
        self.trained = trained

    def look(self, held: set[int]) -> bool:
        """Whether there is nothing more to look for, given the parameters that an optimiser holds."""
        reached, dead = False, []
        alive = {name: layer for name, ref in self.layers.items() if (layer := ref()) is not None}
        for name, layer in alive.items():
            tensors = [tensor for tensor in self.trained(layer) if id(tensor) in held]
            if any(tensor.grad is not None for tensor in tensors):
                reached = True
            elif tensors:
                dead.append(name)
        if not reached:  # another optimiser's step, or one without a backward
            return not alive
        if dead:
            more = f" and {len(dead) - _NAMES_SHOWN} more" if len(dead) > _NAMES_SHOWN else ""
            log.warning(
                "no gradient has reached the adapter of %s%s before the first step. Nothing is wrong if the model had "
                "no use for them in this batch (an expert without tokens, a layer that was dropped); otherwise they "
                "train nothing: leave them out with exclude_modules",
                ", ".join(dead[:_NAMES_SHOWN]),
                more,
            )
        return True


_watched: list[_Watch] = []
_hooked = False


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _watched[:] = [watch for watch in _watched if not watch.look(held)]


def watch_first_step(layers: Mapping[str, nn.Module], trained: Callable[[Any], Iterable[Tensor]]) -> None:
    """At the first step of an optimiser that holds tensors of these layers, name those that got no gradient.

    Args:
        layers: module name → layer.
        trained: a layer's tensors of the adapter in question.
    """
    global _hooked
    if not _hooked:  # and it stays: a hook cannot go while hooks are being called
        register_optimizer_step_pre_hook(_before_step)
        _hooked = True
    _watched.append(_Watch(layers, trained))
