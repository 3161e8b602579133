# SPDX-License-Identifier: Apache-2.0
"""Calls that change a whole model, or nothing of it, whatever stops them: an error, want of memory, Ctrl-C."""

from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


class AllOrNothing:
    """Within it a model may be changed; an exception leaves it as it was on entry.

    What is put back: every module's attributes and tensors, by identity and under the same names, the contents of
    dicts, lists, sets and osora's own objects in them, and what requires a gradient. No tensor is copied: values that
    are written in place stay written.

    Args:
        roots: modules, each with all modules in it.
        others: further objects whose attributes are put back.
        alone: only the ``roots`` themselves.
    """

    def __init__(self, *roots: nn.Module, others: Iterable[object] = (), alone: bool = False) -> None:
        modules = {id(m): m for root in roots for m in ([root] if alone else root.modules())}
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for module in modules.values():
            self._keep_attributes(module)
        for other in others:
            self._keep(other)
        parameters = {id(p): p for m in modules.values() for p in m._parameters.values() if p is not None}
        self._gradients = [(parameter, parameter.requires_grad) for parameter in parameters.values()]

    def _keep_attributes(self, owner: Any) -> None:
        if id(owner) not in self._seen:
            self._seen.add(id(owner))
            self._attributes.append((owner, dict(owner.__dict__)))
            for value in owner.__dict__.values():
                self._keep(value)

    def _keep(self, value: Any) -> None:
        kind = type(value)
        if kind in _CONTAINERS:
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._contents.append((value, kind(value)))
                for item in value.values() if isinstance(value, dict) else value:
                    self._keep(item)
        elif kind.__module__.startswith("osora.") and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            self._keep_attributes(value)

    def restore(self) -> None:
        """Put everything back."""
        for owner, attributes in self._attributes:
            now = owner.__dict__
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
        for container, contents in self._contents:
            if type(container) is list:
                container[:] = contents
            else:
                container.clear()
                container.update(contents)
        for parameter, requires_grad in self._gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    def __enter__(self) -> "AllOrNothing":
        """Nothing is left to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything back, if anything went wrong."""
        if kind is not None:
            self.restore()


__all__ = ["AllOrNothing"]
