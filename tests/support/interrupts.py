# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at a given line of osora's code, or of a package it works in, and what a model is made of before and after."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osora

_OWN = str(Path(osora.__file__).parent)


def interrupted(call: Callable[[], object], at: int, own: tuple[str, ...] = (_OWN,)) -> tuple[int, str]:
    """Run ``call`` with a KeyboardInterrupt at the ``at``-th line of the packages in the folders ``own``.

    Returns:
        How many lines ran, and where the interrupt came, if it did.
    """
    seen, where = 0, ""

    def within(frame: Any, event: str, _: object) -> Any:
        nonlocal seen, where
        if event == "line":
            seen += 1
            if seen == at:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return within

    def enter(frame: Any, event: str, _: object) -> Any:
        return within if frame.f_code.co_filename.startswith(own) else None

    before = sys.gettrace()
    gradients = torch.is_grad_enabled()  # torch's own contexts may be stopped on their way out, too
    sys.settrace(enter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(gradients)
    return seen, where


def points(total: int, most: int) -> list[int]:
    """Lines from the first to the last, evenly."""
    step = max(1, total // most)
    return list(range(1, total + 1, step))


def picture(model: nn.Module) -> dict[str, Any]:
    """Modules, tensors, hooks and what is trained, by identity; and all values."""
    tensors: dict[str, Tensor | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors |= {f"{name}.{key}": t for key, t in {**module._parameters, **module._buffers}.items()}
    hooks = {
        name: (list(module._forward_pre_hooks), list(module._forward_hooks)) for name, module in model.named_modules()
    }
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "tensors": {name: None if t is None else (id(t), t.requires_grad) for name, t in tensors.items()},
        "hooks": hooks,
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "values": {name: t.detach().clone() for name, t in tensors.items() if t is not None},
    }


def shape_of(model: nn.Module) -> dict[str, Any]:
    """The same without identities and values: what two models share that were treated alike."""
    full = picture(model)
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "tensors": {name: t if t is None else t[1] for name, t in full["tensors"].items()},
        "attributes": full["attributes"],
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Which parts of two pictures are not the same."""
    parts = [part for part in before if part != "values" and before[part] != after[part]]
    values, now = before["values"], after["values"]
    same = values.keys() == now.keys() and all(torch.equal(values[name], now[name]) for name in values)
    return parts if same else [*parts, "values"]
