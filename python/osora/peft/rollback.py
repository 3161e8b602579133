# SPDX-License-Identifier: Apache-2.0
"""A model as it was before an adapter came: what PEFT puts in beside the adapter's layers goes out again with it."""

import weakref
from collections.abc import Callable, Collection, Iterable
from contextvars import ContextVar
from types import TracebackType

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from osora.layers.undo import AllOrNothing

_around: ContextVar["Callable[[], Whole | None] | None"] = ContextVar("around", default=None)


def _outer() -> "Whole | None":
    found = _around.get()
    return None if found is None else found()  # of a call that was cut off at its very end nothing is left


class Before:
    """Which parameters were trained and, where an adapter's file has some of the base's (biases, embeddings), these."""

    def __init__(self, model: nn.Module, biases: bool, others: Collection[str] = ()) -> None:
        """Nothing is copied but all biases, if they are wanted, and parameters named in ``others``."""
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.values = [
            (module, last, parameter, parameter.detach().clone())
            for name, module in model.named_modules()
            for last, parameter in module._parameters.items()
            if parameter is not None and ((biases and last == "bias") or f"{name}.{last}" in others)
        ]
        if (outer := _outer()) is not None:
            outer.made.append(self)

    def restore(self) -> None:
        """Put both back; with ``low_cpu_mem_usage`` PEFT has put other parameters in their places."""
        for module, last, parameter, values in self.values:
            parameter.data.copy_(values)
            module._parameters[last] = parameter  # within init_empty_weights an assignment would copy it to meta
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)


class Whole(AllOrNothing):
    """Within it one of PEFT's calls may change a model, and an exception leaves the model as it was.

    What a loaded adapter writes into the base's own parameters is put back too, by each :class:`Before` made within.

    Args:
        roots: modules, each with all modules in it.
        others: further objects whose attributes are put back.
        ours: whether the call is known to be one for osora's adapters. If not, only what an adapter of osora's has
            begun is undone.
    """

    def __init__(self, *roots: nn.Module, others: Iterable[object] = (), ours: bool = True) -> None:
        super().__init__(*roots, others=others)
        self._ours = ours
        self.made: list[Before] = []

    def __enter__(self) -> "Whole":
        """Begin to note what is made, for those around this one too."""
        if (outer := _outer()) is None:
            _around.set(weakref.ref(self))
        else:
            self.made = outer.made
        self._first = len(self.made)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything back, if anything went wrong; else whoever is around this may have to."""
        if kind is not None and (self._ours or self.made[self._first :]):
            for before in reversed(self.made[self._first :]):
                before.restore()
            self.restore()
        if _outer() is self:
            _around.set(None)


def wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """Name → PEFT's wrapper around a module that adapters train whole, or of which they train rows."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def put_originals(model: nn.Module, adapter: str | None = None) -> None:
    """Put wrapped modules back as they came: all of them, or those that ``adapter`` alone has wrapped."""
    for name, wrapper in wrappers(model).items():
        if adapter is None or wrapper._adapters == {adapter}:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, wrapper.original_module)
        elif adapter in wrapper._adapters:
            wrapper.delete_adapter(adapter, [active for active in wrapper.active_adapters if active != adapter])


__all__ = ["Before", "Whole", "put_originals", "wrappers"]
