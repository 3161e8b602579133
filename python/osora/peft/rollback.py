# SPDX-License-Identifier: Apache-2.0
"""A model as it was before an adapter came: what PEFT puts in beside the adapter's layers goes out again with it."""

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Before:
    """Which parameters were trained and, where an adapter's file has biases, the base's own."""

    def __init__(self, model: nn.Module, biases: bool) -> None:
        """Nothing but the biases is copied."""
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.biases = [
            (module, bias, bias.detach().clone())
            for module in model.modules()
            if biases and (bias := module._parameters.get("bias")) is not None
        ]

    def restore(self) -> None:
        """Put both back; with ``low_cpu_mem_usage`` PEFT has put other parameters in the biases' places."""
        for module, bias, values in self.biases:
            bias.data.copy_(values)
            module._parameters["bias"] = bias  # within init_empty_weights an assignment would copy it to meta
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
