# SPDX-License-Identifier: Apache-2.0
"""OSoRA's operators with types, fake kernels, derivatives and autocast.

``torch.ops.osora.*`` are the raw operators, of ``csrc/torch/schema.cpp``; the functions here are what to call.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osora import reference
from osora.ops.common import (
    HALVES,
    another_dtype,
    autocast_inputs,
    cast_frozen,
    is_exporting,
    is_transformed,
    is_watched,
    no_double_backward,
    one_device,
    refuse_frozen,
    serve_by_reference,
)

_ops = torch.ops.osora

# -- fake kernels: shapes and dtypes without data --------------------------------------------------------------------


@torch.library.register_fake("osora::fold")
def _(U: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    one_device("fold", U, S0, s, o)
    return U.new_empty(U.shape)


@torch.library.register_fake("osora::fold_many")
def _(U: Sequence[Tensor], S0: Sequence[Tensor], s: Sequence[Tensor], o: Sequence[Tensor]) -> list[Tensor]:
    one_device("fold_many", *U, *S0, *s, *o)
    return [u.new_empty(u.shape) for u in U]


@torch.library.register_fake("osora::fold_backward")
def _(U: Tensor, P: Tensor, S0: Tensor, s: Tensor, o: Tensor, need_s: bool, need_o: bool) -> tuple[Tensor, Tensor]:
    one_device("fold_backward", U, P, S0, s, o)
    return P.new_empty(U.shape[1] if need_s else 0), P.new_empty(U.shape[0] if need_o else 0)


@torch.library.register_fake("osora::linear")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor
) -> tuple[Tensor, Tensor]:
    one_device("linear", x, weight, bias, U, V, S0, s, o)
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], U.shape[0])), x.new_empty((rows, U.shape[1]))


@torch.library.register_fake("osora::down")
def _(x: Tensor, V: Tensor) -> Tensor:
    one_device("down", x, V)
    return x.new_empty((math.prod(x.shape[:-1]), V.shape[1]))


@torch.library.register_fake("osora::up")
def _(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    D: Tensor | None = None,
) -> Tensor:
    one_device("up", x, h, weight, bias, U, S0, s, o, D)
    return x.new_empty((*x.shape[:-1], U.shape[0]))


@torch.library.register_fake("osora::linear_backward")
def _(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_x: bool,
    need_s: bool,
    need_o: bool,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    one_device("linear_backward", dy, h, weight, U, V, S0, s, o, D)
    sums = reference.accumulate_dtype(dy.dtype)
    dx = dy.new_empty((*dy.shape[:-1], V.shape[0]) if need_x else (0,))
    ds = dy.new_empty(U.shape[1] if need_s else 0, dtype=sums)
    do = dy.new_empty(U.shape[0] if need_o else 0, dtype=sums)
    return dx, ds, do


@torch.library.register_fake("osora::linear_add_")
def _(y: Tensor, x: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    one_device("linear_add_", y, x, U, V, S0, s, o)
    return x.new_empty((math.prod(x.shape[:-1]), U.shape[1]))


# -- derivatives -----------------------------------------------------------------------------------------------------


def _frozen_wanted(weight: Tensor | None, U: Tensor, V: Tensor, S0: Tensor) -> dict[str, bool]:
    wanted = {"U": U.requires_grad, "V": V.requires_grad, "S0": S0.requires_grad}
    return wanted if weight is None else wanted | {"weight": weight.requires_grad}


def _fold_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    U, S0, s, o = inputs
    refuse_frozen("fold", {"U": U.requires_grad, "S0": S0.requires_grad})
    ctx.save_for_backward(U, S0, s, o)


def _fold_gradient(ctx: Any, dD: Tensor) -> tuple[Tensor | None, ...]:
    U, S0, s, o = ctx.saved_tensors
    P = dD.to(reference.accumulate_dtype(U.dtype))
    need_s, need_o = ctx.needs_input_grad[2:4]
    ds, do = _ops.fold_backward(U, P, S0, s, o, need_s, need_o)
    return None, None, ds.to(s.dtype) if need_s else None, do.to(o.dtype) if need_o else None


torch.library.register_autograd("osora::fold", _fold_gradient, setup_context=_fold_setup)


def _fold_many_setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    raise RuntimeError(
        "osora::fold_many has no derivative, and an input requires a gradient: call it under torch.no_grad() or with "
        "detached tensors; osora.ops.fold of each layer is differentiable in s and o"
    )


def _fold_many_gradient(ctx: Any, *dD: Any) -> None:
    raise AssertionError("the set-up raises")


torch.library.register_autograd("osora::fold_many", _fold_many_gradient, setup_context=_fold_many_setup)


def _linear_save(ctx: Any, inputs: tuple, h: Tensor) -> None:
    _, weight, _, U, V, S0, s, o = inputs
    refuse_frozen("linear", _frozen_wanted(weight, U, V, S0))
    ctx.save_for_backward(h, *(() if weight is None else (weight,)), U, V, S0, s, o)


def _linear_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, *given, U, V, S0, s, o = ctx.saved_tensors
    weight = given[0].to(h.dtype) if given else None
    U, V = U.to(h.dtype), V.to(h.dtype)
    need_x, _, need_bias, _, _, _, need_s, need_o = ctx.needs_input_grad[-8:]
    dx, ds, do = _ops.linear_backward(dy, h, weight, U, V, S0, s, o, need_x, need_s, need_o)
    dbias = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]).sum(0) if need_bias else None
    return (
        dx if need_x else None,
        None,
        dbias,
        None,
        None,
        None,
        ds.to(s.dtype) if need_s else None,
        do.to(o.dtype) if need_o else None,
    )


def _registered_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    _linear_save(ctx, inputs, output[1])


def _registered_gradient(ctx: Any, dy: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    return (None,) * 8 if dy is None else _linear_gradient(ctx, dy)


# For callers of torch.ops.osora.linear and for torch.export; osora.ops.linear takes the shorter way below.
torch.library.register_autograd("osora::linear", _registered_gradient, setup_context=_registered_setup)


for _name in ("osora::fold_backward", "osora::linear_backward"):
    torch.library.register_autograd(_name, no_double_backward(_name))


def _half_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("osora::down and osora::up have no derivatives of their own: call osora.ops.linear, which has")


for _name in ("osora::down", "osora::up"):
    torch.library.register_autograd(_name, _half_backward)


class _Linear(torch.autograd.Function):
    """``osora::linear`` in its halves for autograd where :func:`is_watched`; ``osora::linear_trained`` is quicker."""

    @staticmethod
    def forward(ctx: Any, cast: bool, *inputs: Tensor | None) -> Tensor:
        # The frozen tensors are cast here and once more in the backward: a 16-bit copy is not worth keeping.
        x, weight, bias, U, V, *deltas = cast_frozen(inputs) if cast else inputs
        h = _ops.down(x, V)
        y = _ops.up(x, h, weight, bias, U, *deltas)
        _linear_save(ctx, inputs, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_linear_gradient(ctx, dy)


class _LinearAdd(torch.autograd.Function):
    """``osora::linear_add_`` for autograd; its inputs are those of ``osora::linear`` with y before them."""

    @staticmethod
    def forward(ctx: Any, cast: bool, y: Tensor, *inputs: Tensor | None) -> Tensor:
        x, _, _, *rest = cast_frozen(inputs) if cast else inputs
        h = _ops.linear_add_(y, x, *rest)
        ctx.mark_dirty(y)
        _linear_save(ctx, inputs, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, dy, *_linear_gradient(ctx, dy)


# -- what to call ----------------------------------------------------------------------------------------------------


def fold(U: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    """The adapter as one matrix D [d, r], ``W = W0 + D Vᵀ``; see :func:`osora.reference.fold`.

    Differentiable in s and o. Raises RuntimeError for wrong shapes, dtypes or devices, naming the argument. Under
    torch.func and forward-mode differentiation it is plain torch.
    """
    return reference.fold(U, S0, s, o) if is_transformed() else _ops.fold(U, S0, s, o)


def fold_many(U: Sequence[Tensor], S0: Sequence[Tensor], s: Sequence[Tensor], o: Sequence[Tensor]) -> list[Tensor]:
    """:func:`fold` of many layers at once, bit for bit: one launch on a card, one parallel loop on a CPU.

    Args:
        U: left singular vectors, [d, r] of any shapes, of one dtype and on one device.
        S0: singular values, [r] each.
        s: changes of the singular values, [r] each.
        o: changes of the output scales, [d] each.

    Returns:
        D of each layer, [d, r] in U's dtype.

    Raises:
        RuntimeError: lists of different lengths; a wrong shape, dtype or device, naming the layer by its place and the
            argument; an input requires a gradient and gradients are enabled (there is none: use :func:`fold`).
    """
    if not any((U, S0, s, o)):  # torch finds an operator's device by its tensors
        return []
    return _ops.fold_many(U, S0, s, o)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
) -> Tensor:
    """An OSoRA linear layer: ``y = x W0ᵀ + bias + (x V) Dᵀ``, ``D = U ⊙ (o (S0 + s) + s)``.

    Differentiable in x, bias, s and o. For the backward it saves ``h = x V`` [n, r] and nothing else beside the
    parameters. Under ``torch.autocast`` x, weight, bias, U and V take the autocast dtype; S0, s and o never do.

    The transforms of torch.func and forward-mode differentiation get :func:`osora.reference.linear`, plain torch that
    they can see through: every one of them works, at the memory of plain torch. To selective activation checkpointing
    and to compilers h is the output of ``torch.ops.osora.down``.

    Args:
        x: input [..., k].
        weight: frozen base weight [d, k] in any strides, or None for the adapter's branch alone.
        bias: [d] or None; it is not scaled by O.
        U: left singular vectors [d, r], in x's dtype; float32 too, with V, for 16-bit x and weight (FSDP2 casts
            parameters and no buffers), and without a weight any dtype of at most 32 bits for another: both are cast,
            and what is kept for the backward are the given ones.
        V: right singular vectors [k, r], as U.
        S0: singular values [r], float32 (float64 for float64 x).
        s: change of the singular values [r], float32 (float64); 16-bit is accepted.
        o: change of the output scales, O − 1, [d], as s.

    Returns:
        y [..., d] in x's dtype.

    Raises:
        RuntimeError: wrong shape, dtype or device, naming the argument; weight, U, V or S0 require a gradient; double
            backward.
    """
    x, bias, cast = autocast_inputs(x, bias)
    # FSDP2's MixedPrecisionPolicy casts parameters to 16 bits, and leaves buffers, such as U and V, in float32.
    narrowed = x.dtype in HALVES and U.dtype == V.dtype == torch.float32
    cast = cast or (another_dtype(x, U, V) if weight is None else narrowed and weight.dtype == x.dtype)
    inputs = (x, weight, bias, U, V, S0, s, o)
    transformed = is_transformed()
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # An exported graph has the operator itself, whose registered derivative serves whoever trains it.
    if trained and not transformed and not is_exporting():
        refuse_frozen("linear", _frozen_wanted(weight, U, V, S0))
        return _Linear.apply(cast, *inputs) if is_watched() else _ops.linear_trained(*inputs, cast)
    inputs = cast_frozen(inputs) if cast else inputs
    return (reference.linear if transformed else _ops.linear)(*inputs)[0]


def linear_add_(y: Tensor, x: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    """Add the adapter's branch to a given y, in place: ``y += (x V) Dᵀ``, ``D = U ⊙ (o (S0 + s) + s)``.

    For a base that computes its own product, such as a quantised one. Differentiable in y (which it passes through),
    x, s and o; for the backward it saves ``h = x V`` [n, r] and nothing else beside the parameters. torch's rules for
    operators in place hold: whoever saved y for a backward is told. Under ``torch.autocast`` x, U and V take y's
    dtype, which cannot change. Under ``torch.compile`` the branch is computed apart and added: one more tensor of y's
    size, and in 16 bits one more rounding.

    Args:
        y: [..., d] in any layout without overlap. One whose rows do not form a matrix is copied, and copied back.
        x: input [..., k], in y's dtype.
        U, V, S0, s, o: as for :func:`linear`.

    Returns:
        y itself.

    Raises:
        RuntimeError: wrong shape, dtype or device, naming the argument; y overlaps itself or another argument; y is a
            leaf that requires a gradient; a frozen argument requires one; double backward.
    """
    # An operator that writes to an argument has no derivative there.
    if torch.compiler.is_compiling() or is_transformed():
        return y.add_(linear(x, None, None, U, V, S0, s, o))
    x, _, cast = autocast_inputs(x, None)
    x = x.to(y.dtype) if cast else x
    cast = cast or (x.dtype == y.dtype and another_dtype(x, U, V))
    inputs = (x, None, None, U, V, S0, s, o)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, *inputs)):
        if y.requires_grad and (y.is_leaf or (y._base is not None and y._base.is_leaf)):
            raise RuntimeError(
                "osora.ops.linear_add_: y is a leaf that requires a gradient, or a view of one, and would be changed "
                "in place; give a clone(), or call it under torch.no_grad()"
            )
        refuse_frozen("linear_add_", {"U": U.requires_grad, "V": V.requires_grad, "S0": S0.requires_grad})
        return _LinearAdd.apply(cast, y, *inputs)
    inputs = cast_frozen(inputs) if cast else inputs
    _ops.linear_add_(y, *(t for t in inputs if t is not None))
    return y


serve_by_reference(
    reference.fold,
    reference.fold_many,
    reference.fold_backward,
    reference.linear,
    reference.down,
    reference.up,
    reference.linear_backward,
    reference.linear_add_,
)
