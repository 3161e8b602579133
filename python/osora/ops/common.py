# SPDX-License-Identifier: Apache-2.0
"""What the operators' modules share: refusals, autocast, who looks on, and the reference where CUDA was not built."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osora import _load


def one_device(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError in a fake kernel whose arguments are on several devices."""
    # They run for real when one tensor is on the meta device: the result would be uninitialised memory of another's.
    devices = {str(t.device) for t in tensors if t is not None}
    torch._check(len(devices) == 1, lambda: f"osora::{name}: all must be on one device, got {sorted(devices)}")


_FROZEN = ("weight", "U", "V", "S0")


def refuse_frozen(name: str, wanted: dict[str, bool]) -> None:
    """Raise RuntimeError if a gradient is ``wanted`` of a frozen argument."""
    for argument, requires_grad in wanted.items():
        if requires_grad:
            raise RuntimeError(
                f"osora::{name}: {argument} requires a gradient, but {', '.join(_FROZEN)} are frozen by the method; "
                f"call {argument}.requires_grad_(False), or detach() it"
            )


def no_double_backward(name: str) -> Callable:
    """The derivative of a backward operator: an error that says what does work."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no derivative of its own: double backward (create_graph=True, gradient penalties) is not "
            "supported through osora's operators; torch.func.grad and torch.func.hessian are"
        )

    return backward


def is_watched() -> bool:
    """Whether someone decides operator by operator: a compiler, or a policy of selective activation checkpointing.

    For them h is an operator of its own, ``osora::down``, so that it can be kept without y. The same bits, but one
    call more.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_exporting() -> bool:
    """Whether torch.export traces."""
    # Not torch.compiler.is_exporting(): torch 2.11 folds it to true wherever it compiles. What it reads is right.
    return torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Inside a transform of torch.func, or forward-mode differentiation: they see through plain torch alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


HALVES = (torch.bfloat16, torch.float16)


def another_dtype(x: Tensor, U: Tensor, V: Tensor) -> bool:
    """Whether a basis is in another dtype of at most 32 bits than x: a quantised base takes x in any of them."""
    small = (*HALVES, torch.float32)
    return U.dtype == V.dtype != x.dtype and U.dtype in small and x.dtype in small


def cast_frozen(inputs: tuple) -> tuple:
    """Weight, U and V of ``(x, weight, bias, U, V, ...)`` in x's dtype."""
    x, weight, bias, U, V, *rest = inputs
    return x, None if weight is None else weight.to(x.dtype), bias, U.to(x.dtype), V.to(x.dtype), *rest


def autocast_inputs(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """x and bias as autocast wants them, and whether it wants anything of the frozen tensors."""
    # Of the devices with operators of ours only "meta" lacks autocast, and cannot be asked for it. To ask
    # torch.amp.is_autocast_available instead would break the graph of torch 2.11.
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if not autocast or x.dtype == torch.float64:  # as torch's own rule: autocast leaves float64 alone
        return x, bias, False
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype), True


# -- CUDA tensors without a CUDA build -------------------------------------------------------------------------------

has_warned = False


def warning_once(function: Callable) -> Callable:
    """The function, with one warning for all of them."""

    def slow(*arguments: Any) -> Any:
        global has_warned
        if not has_warned:
            has_warned = True
            warnings.warn(
                "osora was built without CUDA: its operators run in plain torch on this device, right but slower "
                "(build again where nvcc is found; docs/build.md)",
                RuntimeWarning,
                stacklevel=2,
            )
        return function(*arguments)

    return slow


_fallbacks = torch.library.Library("osora", "IMPL")


def serve_by_reference(*functions: Callable) -> None:
    """Where osora was built without CUDA, these functions of plain torch are the operators of their names there."""
    if not _load.extension.build_info()["cuda"]:
        for function in functions:
            _fallbacks.impl(function.__name__, warning_once(function), "CUDA")
