# SPDX-License-Identifier: Apache-2.0
"""SORSA's operators with types, fake kernels, derivatives and autocast; :mod:`osora.ops.osora` has those of OSoRA.

Trained are the changes u, s, v of the top singular triplets, ``U = U0 + u``, ``S = S0 + s``, ``V = V0 + v``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from osora import reference
from osora.ops.common import (
    HALVES,
    another_dtype,
    autocast_inputs,
    is_transformed,
    no_double_backward,
    one_device,
    serve_by_reference,
)

_ops = torch.ops.osora

# -- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("osora::sorsa_linear")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U0: Tensor,
    S0: Tensor,
    V0: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    one_device("sorsa_linear", x, weight, bias, U0, S0, V0, u, s, v)
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], U0.shape[0])), x.new_empty((rows, U0.shape[1]))


@torch.library.register_fake("osora::sorsa_linear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    U0: Tensor,
    S0: Tensor,
    V0: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    need_x: bool,
    need_u: bool,
    need_s: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one_device("sorsa_linear_backward", dy, x, h, weight, U0, S0, V0, u, s, v)
    sums = reference.accumulate_dtype(dy.dtype)
    return (
        dy.new_empty((*dy.shape[:-1], V0.shape[0]) if need_x else (0,)),
        dy.new_empty(U0.shape if need_u else (0,), dtype=sums),
        dy.new_empty(S0.shape if need_s else (0,), dtype=sums),
        dy.new_empty(V0.shape if need_v else (0,), dtype=sums),
    )


# -- derivatives -----------------------------------------------------------------------------------------------------

_FROZEN = ("weight", "U0", "S0", "V0")


def _save(ctx: Any, inputs: tuple, x: Tensor, h: Tensor) -> None:
    """h [n, r] for the gradients of u and s; x [n, k], which somebody else may keep as well, for that of v."""
    weight, _, *frozen, u, s, v = inputs[1:]
    for name, tensor in zip(_FROZEN, (weight, *frozen), strict=True):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"osora::sorsa_linear: {name} requires a gradient, but {', '.join(_FROZEN)} are frozen: train u, s "
                f"and v, and call {name}.requires_grad_(False), or detach() it"
            )
    kept = {
        "x": x if v.requires_grad else None,
        "h": h if u.requires_grad or s.requires_grad else None,
        "weight": weight,
    }
    ctx.kept = [name for name, tensor in kept.items() if tensor is not None]
    ctx.save_for_backward(*(tensor for tensor in kept.values() if tensor is not None), *frozen, u, s, v)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = list(ctx.saved_tensors)
    kept: dict[str, Tensor] = {name: saved.pop(0) for name in ctx.kept}
    U0, S0, V0, u, s, v = saved
    weight = kept["weight"].to(dy.dtype) if "weight" in kept else None
    need_x, _, need_bias, _, _, _, need_u, need_s, need_v = ctx.needs_input_grad[-9:]
    dx, du, ds, dv = _ops.sorsa_linear_backward(
        dy,
        kept.get("x"),
        kept.get("h"),
        weight,
        U0.to(dy.dtype),
        S0,
        V0.to(dy.dtype),
        u,
        s,
        v,
        need_x,
        need_u,
        need_s,
        need_v,
    )
    return (
        dx if need_x else None,
        None,
        dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).sum(0) if need_bias else None,
        None,
        None,
        None,
        du.to(u.dtype) if need_u else None,
        ds.to(s.dtype) if need_s else None,
        dv.to(v.dtype) if need_v else None,
    )


def _registered_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, inputs[0], output[1])


def _registered_gradient(ctx: Any, dy: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    return (None,) * 9 if dy is None else _gradient(ctx, dy)


# For callers of torch.ops.osora.sorsa_linear and for torch.export; sorsa_linear below takes a shorter way.
torch.library.register_autograd("osora::sorsa_linear", _registered_gradient, setup_context=_registered_setup)
torch.library.register_autograd("osora::sorsa_linear_backward", no_double_backward("osora::sorsa_linear_backward"))


class _SorsaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, autocast: bool, *inputs: Tensor | None) -> Tensor:
        y, h = _ops.sorsa_linear(*(_cast_frozen(inputs) if autocast else inputs))
        assert inputs[0] is not None
        _save(ctx, inputs, inputs[0], h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradient(ctx, dy)


def _cast_frozen(inputs: tuple) -> tuple:
    x, weight, bias, U0, S0, V0, *rest = inputs
    return x, None if weight is None else weight.to(x.dtype), bias, U0.to(x.dtype), S0, V0.to(x.dtype), *rest


# -- what to call ----------------------------------------------------------------------------------------------------


def sorsa_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U0: Tensor,
    S0: Tensor,
    V0: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
) -> Tensor:
    """A SORSA linear layer: ``y = x W0ᵀ + bias + x (U diag(S) Vᵀ − U0 diag(S0) V0ᵀ)ᵀ`` with U = U0 + u, and so on.

    Differentiable in x, bias, u, s and v. For the backward it saves ``h = x V`` [n, r] if u or s is trained, x itself
    [n, k] if v is, and nothing else beside the parameters. Under ``torch.autocast`` x, weight, bias, U0 and V0 take the
    autocast dtype; S0, u, s and v do not, though the products see a copy of v that does. The transforms of torch.func
    and forward-mode differentiation get :func:`osora.reference.sorsa_linear`, plain torch.

    Args:
        x: input [..., k].
        weight: frozen base weight [d, k] in any strides, or None for the adapter's branch alone.
        bias: [d] or None.
        U0: left singular vectors at the start [d, r], in x's dtype; without a weight, with V0, in any of at most 32
            bits.
        S0: singular values at the start [r], float32 (float64 for float64 x).
        V0: right singular vectors at the start [k, r], in x's dtype.
        u: change of the left vectors [d, r], float32 (float64); 16-bit is accepted.
        s: change of the singular values [r], as u.
        v: change of the right vectors [k, r], as u.

    Returns:
        y [..., d] in x's dtype. With u, s and v zero it is the base layer's, bit for bit (on the CPU).

    Raises:
        RuntimeError: wrong shape, dtype or device, naming the argument; a frozen tensor requires a gradient; double
            backward.
    """
    x, bias, cast = autocast_inputs(x, bias)
    # FSDP2's MixedPrecisionPolicy casts parameters to 16 bits, and leaves buffers, such as U0 and V0, in float32.
    narrowed = x.dtype in HALVES and U0.dtype == V0.dtype == torch.float32
    cast = cast or (another_dtype(x, U0, V0) if weight is None else narrowed and weight.dtype == x.dtype)
    inputs = (x, weight, bias, U0, S0, V0, u, s, v)
    if is_transformed():
        return reference.sorsa_linear(*(_cast_frozen(inputs) if cast else inputs))[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _SorsaLinear.apply(cast, *inputs)
    return _ops.sorsa_linear(*(_cast_frozen(inputs) if cast else inputs))[0]


serve_by_reference(reference.sorsa_linear, reference.sorsa_linear_backward)
