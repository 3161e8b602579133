# SPDX-License-Identifier: Apache-2.0
"""Where the calls begin and end in which the layers of a model work together: hooks on its forward."""

import weakref
from typing import Any

import torch
from torch import nn

from osora.layers.together import Known, close_call, is_seen_through, open_call
from osora.model.state import all_layers
from osora.model.targets import uncompiled


class Caller:
    """The hooks of one model, or of its replicas; copies of the model have copies, which know nothing yet."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[nn.Module], Known] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return {"_known": None}

    def _of(self, model: nn.Module) -> Known:
        known = self._known
        if known is None or known[0]() is not model:  # a replica of torch.nn.DataParallel has this very object
            layers = {name: layer for name, layer in all_layers(model).items() if layer.together}
            known = self._known = weakref.ref(model), Known(layers)
        return known[1]

    def begin(self, model: nn.Module, args: Any) -> None:
        """A hook before the forward."""
        if not is_seen_through():
            open_call(model, lambda: self._of(model))

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook after the forward, whatever came of it."""
        if not torch.compiler.is_compiling():
            close_call(model)


def follow_calls(model: nn.Module) -> None:
    """Put the hooks on a model in which a layer works together with others, once; take them off any other."""
    model = uncompiled(model)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Caller)]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
    if any(layer.together for layer in all_layers(model).values()):
        caller = Caller()
        model.register_forward_pre_hook(caller.begin)
        model.register_forward_hook(caller.end, always_call=True)


__all__ = ["Caller", "follow_calls"]
