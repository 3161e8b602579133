# SPDX-License-Identifier: Apache-2.0
"""A model as it was before an adapter came: what PEFT puts in beside the adapter's layers goes out again with it."""

from collections.abc import Collection

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


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

    def restore(self) -> None:
        """Put both back; with ``low_cpu_mem_usage`` PEFT has put other parameters in their places."""
        for module, last, parameter, values in self.values:
            parameter.data.copy_(values)
            module._parameters[last] = parameter  # within init_empty_weights an assignment would copy it to meta
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)


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


__all__ = ["Before", "put_originals", "wrappers"]
