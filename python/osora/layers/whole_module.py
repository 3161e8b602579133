# SPDX-License-Identifier: Apache-2.0
"""A module that adapters train whole: the module itself untouched, and a copy of it for each of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def _key(adapter: str) -> str:
    return f"copy@{adapter}"


class WholeModule(nn.Module):
    """What stands in the module's place: the active adapter's copy answers, and without one the module itself.

    What is asked of it beside a forward (``weight``, ``out_features``, a method) is asked of the one that answers.

    Args:
        base_layer: the module, of any kind that has a forward and floating-point parameters.
        adapter: the first adapter's name, which is active then.
        values: its copy; None for one of the module as it is.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter: str, values: nn.Module | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.adapter: str | None = None
        self.batch: Sequence[str | None] | None = None  # within osora.adapters_in_batch: each row's adapter
        self._adapters: list[str] = []
        self.add_adapter(adapter, values)
        self.copy_of(adapter).requires_grad_(True)
        self.select_adapter(adapter)
        self.training = base_layer.training

    def answering(self) -> nn.Module:
        """The active adapter's copy; the module itself where no adapter is on, or each row of a batch has its own."""
        off = not self.enabled or self.adapter is None or self.batch is not None
        return self.base_layer if off else self.copy_of(self.adapter)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module takes → what it gives."""
        if self.batch is not None and self.enabled:
            return self._row_by_row(self.batch, args, kwargs)
        return self.answering()(*args, **kwargs)

    def _row_by_row(self, batch: Sequence[str | None], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(batch):
            rows.setdefault(name if name in self._adapters else None, []).append(row)
        modules = {name: self.base_layer if name is None else self.copy_of(name) for name in rows}
        if len(rows) == 1:
            return next(iter(modules.values()))(*args, **kwargs)
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] != len(batch):
            what = f"x of shape {list(x.shape)}" if isinstance(x, Tensor) else "other arguments than one tensor"
            raise ValueError(
                f"adapters_in_batch has {len(batch)} names, and a module that adapters train whole "
                f"({type(self.base_layer).__name__}) got {what}: it must be one tensor, a row for each name"
            )
        parts = [modules[name](x[torch.tensor(found, device=x.device)]) for name, found in rows.items()]
        if not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(
                f"adapters_in_batch needs modules that give one tensor, and {type(self.base_layer).__name__}, which "
                "adapters train whole, gives something else: run each adapter's rows on their own"
            )
        order = torch.tensor([row for found in rows.values() for row in found]).argsort().to(parts[0].device)
        return torch.cat(parts)[order]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.answering(), name)

    # -- several adapters --

    def adapters(self) -> list[str]:
        """The names of those that train this module."""
        return list(self._adapters)

    def copy_of(self, adapter: str) -> nn.Module:
        """The copy of one of :meth:`adapters`."""
        return self._modules[_key(adapter)]  # type: ignore[return-value]

    def trained(self, adapter: str) -> tuple[nn.Parameter, ...]:
        """The parameters of :meth:`copy_of`, all of which are trained."""
        return tuple(self.copy_of(adapter).parameters())

    def values(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of :meth:`copy_of` by their names in it: parameters, and buffers that are saved."""
        return values_of(self.copy_of(adapter))

    def add_adapter(self, adapter: str, values: nn.Module | None = None) -> None:
        """Take one more, which waits: ``values``, or a copy of the module as it is."""
        new = copied(self.base_layer) if values is None else values
        self.add_module(_key(adapter), new.requires_grad_(False))
        self._adapters.append(adapter)

    def remove_adapter(self, adapter: str) -> None:
        """Forget one of :meth:`adapters` that is not the active one."""
        self._adapters.remove(adapter)
        del self._modules[_key(adapter)]

    def select_adapter(self, adapter: str | None) -> None:
        """Make an adapter the active one; the module itself answers where it is none of :meth:`adapters`."""
        self.adapter = adapter if adapter in self._adapters else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are of the module outside of any batch."""
        return self.__dict__ | {"batch": None}

    def extra_repr(self) -> str:
        """State, for ``print(model)``."""
        return f"adapters={self._adapters}, active={self.adapter!r}" + ("" if self.enabled else ", disabled")


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and saved buffers by name. Raises ValueError for a state that is no tensor."""
    found = module.state_dict()
    if odd := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{odd[0]} is no tensor, and cannot be saved with an adapter")
    return dict(found)


def copied(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own. Raises ValueError for a module whose weights are computed in each forward."""
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:  # torch's for a tensor that is no leaf: weight_norm's or prune's
        raise ValueError(
            "its weights are computed anew in each forward, so that there is nothing to copy: make them parameters "
            f"first, by remove_weight_norm or prune.remove ({error})"
        ) from error


__all__ = ["WholeModule", "copied", "values_of"]
