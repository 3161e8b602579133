# SPDX-License-Identifier: Apache-2.0
"""The linear operator on a materialised weight ``W_eff = W0 + D Vᵀ``, kept between calls (docs/performance.md).

The operators are functions of their arguments: what is kept is made again as soon as one of its sources is another
tensor, or was written to. What torch does not count (writes through ``.data``, a CUDA graph's replay) needs
:func:`refresh`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from osora import reference
from osora.ops.common import autocast_inputs, no_double_backward, one_device, refuse_frozen, serve_by_reference

_ops = torch.ops.osora

# -- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("osora::linear_effective")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    one_device("linear_effective", x, weight, bias, U, V, S0, s, o)
    h = (math.prod(x.shape[:-1]), U.shape[1]) if need_h else (0,)
    return x.new_empty((*x.shape[:-1], U.shape[0])), x.new_empty(h)


@torch.library.register_fake("osora::linear_effective_backward")
def _(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_x: bool,
    need_s: bool,
    need_o: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    one_device("linear_effective_backward", dy, h, weight, U, V, S0, s, o)
    sums = reference.accumulate_dtype(dy.dtype)
    dx = dy.new_empty((*dy.shape[:-1], V.shape[0]) if need_x else (0,))
    ds = dy.new_empty(U.shape[1] if need_s else 0, dtype=sums)
    do = dy.new_empty(U.shape[0] if need_o else 0, dtype=sums)
    return dx, ds, do


# -- derivatives -----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple, h: Tensor) -> None:
    _, weight, _, U, V, S0, s, o, need_h = inputs
    frozen = {"weight": weight, "U": U, "V": V, "S0": S0}
    refuse_frozen("linear_effective", {name: tensor.requires_grad for name, tensor in frozen.items()})
    if (s.requires_grad or o.requires_grad) and not need_h:
        raise RuntimeError("osora::linear_effective: need_h must be true where s or o requires a gradient")
    ctx.save_for_backward(h, weight, U, V, S0, s, o)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, U, V, S0, s, o = ctx.saved_tensors
    need_x, _, need_bias, _, _, _, need_s, need_o, _ = ctx.needs_input_grad[-9:]
    dx, ds, do = _ops.linear_effective_backward(dy, h, weight, U, V, S0, s, o, need_x, need_s, need_o)
    return (
        dx if need_x else None,
        None,
        dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).sum(0) if need_bias else None,
        None,
        None,
        None,
        ds.to(s.dtype) if need_s else None,
        do.to(o.dtype) if need_o else None,
        None,
    )


def _registered_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, output[1])


def _registered_gradient(ctx: Any, dy: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    return (None,) * 9 if dy is None else _gradient(ctx, dy)


# For callers of torch.ops.osora.linear_effective and for torch.export; linear_materialised below takes a shorter way.
torch.library.register_autograd("osora::linear_effective", _registered_gradient, setup_context=_registered_setup)
torch.library.register_autograd(
    "osora::linear_effective_backward", no_double_backward("osora::linear_effective_backward")
)


class _LinearMaterialised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, h = _ops.linear_effective(*inputs)
        _save(ctx, inputs, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy)


# -- what to call ----------------------------------------------------------------------------------------------------


def linear_materialised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
) -> Tensor:
    """:func:`osora.ops.linear` with one product: ``y = x W_effᵀ + bias``, ``W_eff = W0 + D Vᵀ`` in x's dtype.

    W_eff is summed in float32 (float64), rounded once, and kept for as long as o and the weight live, or until
    :func:`drop`. In 16 bits it cannot hold changes below half of a weight's last digit: early in training that is
    most of the adapter. Differentiable in x, bias, s and o, with the gradients of :func:`osora.ops.linear`: those of s
    and o come from ``h = x V`` [n, r], which is saved, and ``dx = dy W_eff``.

    Under ``torch.autocast`` x and bias take the autocast dtype and so does W_eff, straight from the float32 weight.

    Args:
        x: input [..., k].
        weight: frozen base weight [d, k] in any strides.
        bias: [d] or None.
        U, V, S0, s, o: as for :func:`osora.ops.linear`; U and V in the weight's dtype.

    Returns:
        y [..., d] in x's dtype.

    Raises:
        RuntimeError: wrong shape, dtype or device, naming the argument; a frozen tensor requires a gradient; double
            backward; backward after s or o was written to.
    """
    x, bias, _ = autocast_inputs(x, bias)
    inputs = (x, weight, bias, U, V, S0, s, o)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _LinearMaterialised.apply(*inputs, s.requires_grad or o.requires_grad)
    return _ops.linear_effective(*inputs, False)[0]


def refresh(weight: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> None:
    """Make what is kept of this weight and this o again, in place: its address stays."""
    with torch.no_grad():
        _ops.effective_refresh(weight, U, V, S0, s, o)


def drop(weight: Tensor, o: Tensor) -> None:
    """Free what is kept of this weight and this o; the next call makes it again."""
    if not (weight.is_meta or o.is_meta):
        _ops.effective_drop(weight, o)


def kept_weights(weight: Tensor, o: Tensor) -> list[Tensor]:
    """What is kept of this weight and this o: at most one W_eff [d, k] for each dtype of x."""
    return [] if weight.is_meta or o.is_meta else _ops.effective_kept(weight, o)


def _keep_nothing(*_: Tensor) -> None:
    """The reference makes W_eff in each call."""


_keep_nothing.__name__ = "effective_refresh"
serve_by_reference(reference.linear_effective, reference.linear_effective_backward, _keep_nothing)
