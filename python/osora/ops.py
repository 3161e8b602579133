# SPDX-License-Identifier: Apache-2.0
"""The operators of ``csrc/torch/schema.cpp`` with types, fake kernels, derivatives and autocast.

``torch.ops.osora.*`` are the raw operators; the functions here are what to call. Where the extension was built without
CUDA, CUDA tensors are served by :mod:`osora.reference`, with one warning.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from osora import _load, reference

_ops = torch.ops.osora

# -- fake kernels: shapes and dtypes without data --------------------------------------------------------------------


def _one_device(name: str, *tensors: Tensor | None) -> None:
    # They run for real when one tensor is on the meta device: the result would be uninitialised memory of another's.
    devices = {str(t.device) for t in tensors if t is not None}
    torch._check(len(devices) == 1, lambda: f"osora::{name}: all must be on one device, got {sorted(devices)}")


@torch.library.register_fake("osora::fold")
def _(U: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    _one_device("fold", U, S0, s, o)
    return U.new_empty(U.shape)


@torch.library.register_fake("osora::fold_backward")
def _(U: Tensor, P: Tensor, S0: Tensor, s: Tensor, o: Tensor, need_s: bool, need_o: bool) -> tuple[Tensor, Tensor]:
    _one_device("fold_backward", U, P, S0, s, o)
    return P.new_empty(U.shape[1] if need_s else 0), P.new_empty(U.shape[0] if need_o else 0)


@torch.library.register_fake("osora::linear")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor
) -> tuple[Tensor, Tensor]:
    _one_device("linear", x, weight, bias, U, V, S0, s, o)
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], U.shape[0])), x.new_empty((rows, U.shape[1]))


@torch.library.register_fake("osora::down")
def _(x: Tensor, V: Tensor) -> Tensor:
    _one_device("down", x, V)
    return x.new_empty((math.prod(x.shape[:-1]), V.shape[1]))


@torch.library.register_fake("osora::up")
def _(
    x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, U: Tensor, S0: Tensor, s: Tensor, o: Tensor
) -> Tensor:
    _one_device("up", x, h, weight, bias, U, S0, s, o)
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
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device("linear_backward", dy, h, weight, U, V, S0, s, o)
    sums = reference.accumulate_dtype(dy.dtype)
    dx = dy.new_empty((*dy.shape[:-1], V.shape[0]) if need_x else (0,))
    ds = dy.new_empty(U.shape[1] if need_s else 0, dtype=sums)
    do = dy.new_empty(U.shape[0] if need_o else 0, dtype=sums)
    return dx, ds, do


@torch.library.register_fake("osora::linear_multi")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    index: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:
    _one_device("linear_multi", x, weight, bias, U, V, S0, s, o, index)
    return x.new_empty((*x.shape[:-1], U.shape[0]))


@torch.library.register_fake("osora::linear_add_")
def _(y: Tensor, x: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    _one_device("linear_add_", y, x, U, V, S0, s, o)
    return x.new_empty((math.prod(x.shape[:-1]), U.shape[1]))


@torch.library.register_fake("osora::truncated_svd")
def _(
    weights: Sequence[Tensor],
    rank: int,
    tol: float,
    seed: int,
    keys: Sequence[int],
    method: str,
    max_memory: int = 0,
) -> tuple[Tensor, ...]:
    count, (d, k) = len(weights), weights[0].shape
    like = weights[0].new_empty(0, dtype=reference.accumulate_dtype(weights[0].dtype))
    host: dict[str, Any] = {"device": "cpu"}
    return (
        like.new_empty(count, d, rank),
        like.new_empty(count, rank),
        like.new_empty(count, k, rank),
        torch.empty(count, rank, dtype=torch.float64, **host),
        torch.empty(count, dtype=torch.bool, **host),
        torch.empty(count, dtype=torch.int64, **host),
        torch.empty(count, dtype=torch.int64, **host),
        torch.empty(count, dtype=torch.int64, **host),
        torch.empty(count, dtype=torch.float64, **host),
        torch.empty(count, dtype=torch.float64, **host),
    )


# -- derivatives -----------------------------------------------------------------------------------------------------

_FROZEN = ("weight", "U", "V", "S0")


def _refuse_frozen(name: str, wanted: dict[str, bool]) -> None:
    for argument, requires_grad in wanted.items():
        if requires_grad:
            raise RuntimeError(
                f"osora::{name}: {argument} requires a gradient, but {', '.join(_FROZEN)} are frozen by the method; "
                f"call {argument}.requires_grad_(False), or detach() it"
            )


def _frozen_wanted(weight: Tensor | None, U: Tensor, V: Tensor, S0: Tensor) -> dict[str, bool]:
    wanted = {"U": U.requires_grad, "V": V.requires_grad, "S0": S0.requires_grad}
    return wanted if weight is None else wanted | {"weight": weight.requires_grad}


def _fold_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    U, S0, s, o = inputs
    _refuse_frozen("fold", {"U": U.requires_grad, "S0": S0.requires_grad})
    ctx.save_for_backward(U, S0, s, o)


def _fold_gradient(ctx: Any, dD: Tensor) -> tuple[Tensor | None, ...]:
    U, S0, s, o = ctx.saved_tensors
    P = dD.to(reference.accumulate_dtype(U.dtype))
    need_s, need_o = ctx.needs_input_grad[2:4]
    ds, do = _ops.fold_backward(U, P, S0, s, o, need_s, need_o)
    return None, None, ds.to(s.dtype) if need_s else None, do.to(o.dtype) if need_o else None


torch.library.register_autograd("osora::fold", _fold_gradient, setup_context=_fold_setup)


def _linear_save(ctx: Any, inputs: tuple, h: Tensor) -> None:
    _, weight, _, U, V, S0, s, o = inputs
    _refuse_frozen("linear", _frozen_wanted(weight, U, V, S0))
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


def _no_double_backward(name: str) -> Callable:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no derivative of its own: double backward (create_graph=True, gradient penalties) is not "
            "supported through osora's operators; torch.func.grad and torch.func.hessian are"
        )

    return backward


for _name in ("osora::fold_backward", "osora::linear_backward"):
    torch.library.register_autograd(_name, _no_double_backward(_name))


def _refuse_training(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "osora::linear_multi is for inference, and an input requires a gradient: call it under torch.no_grad(), or "
        "train one adapter at a time with osora::linear"
    )


torch.library.register_autograd("osora::linear_multi", _refuse_training, setup_context=_refuse_training)


def _half_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("osora::down and osora::up have no derivatives of their own: call osora.ops.linear, which has")


for _name in ("osora::down", "osora::up"):
    torch.library.register_autograd(_name, _half_backward)


class _Linear(torch.autograd.Function):
    """``osora::linear`` in its halves for autograd where :func:`_watched`; ``osora::linear_trained`` is quicker."""

    @staticmethod
    def forward(ctx: Any, cast: bool, *inputs: Tensor | None) -> Tensor:
        # The frozen tensors are cast here and once more in the backward: a 16-bit copy is not worth keeping.
        x, weight, bias, U, V, *deltas = _cast_frozen(inputs) if cast else inputs
        h = _ops.down(x, V)
        y = _ops.up(x, h, weight, bias, U, *deltas)
        _linear_save(ctx, inputs, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_linear_gradient(ctx, dy)


def _watched() -> bool:
    """Whether someone decides operator by operator: a compiler, or a policy of selective activation checkpointing.

    For them h is an operator of its own, ``osora::down``, so that it can be kept without y. The same bits, but one
    call more.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _exporting() -> bool:
    # Not torch.compiler.is_exporting(): torch 2.11 folds it to true wherever it compiles. What it reads is right.
    return torch.compiler._is_exporting_flag


def _transformed() -> bool:
    """Inside a transform of torch.func, or forward-mode differentiation: they see through plain torch alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_HALVES = (torch.bfloat16, torch.float16)


def _another_dtype(x: Tensor, U: Tensor, V: Tensor) -> bool:
    """Whether a basis is in another dtype of at most 32 bits than x: a quantised base takes x in any of them."""
    small = (*_HALVES, torch.float32)
    return U.dtype == V.dtype != x.dtype and U.dtype in small and x.dtype in small


def _cast_frozen(inputs: tuple) -> tuple:
    x, weight, bias, U, V, *rest = inputs
    return x, None if weight is None else weight.to(x.dtype), bias, U.to(x.dtype), V.to(x.dtype), *rest


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """x and bias as autocast wants them, and whether it wants anything of the frozen tensors."""
    # Of the devices with operators of ours only "meta" lacks autocast, and cannot be asked for it. To ask
    # torch.amp.is_autocast_available instead would break the graph of torch 2.11.
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if not autocast or x.dtype == torch.float64:  # as torch's own rule: autocast leaves float64 alone
        return x, bias, False
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype), True


class _LinearAdd(torch.autograd.Function):
    """``osora::linear_add_`` for autograd; its inputs are those of ``osora::linear`` with y before them."""

    @staticmethod
    def forward(ctx: Any, cast: bool, y: Tensor, *inputs: Tensor | None) -> Tensor:
        x, _, _, *rest = _cast_frozen(inputs) if cast else inputs
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
    return reference.fold(U, S0, s, o) if _transformed() else _ops.fold(U, S0, s, o)


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
    x, bias, cast = _autocast(x, bias)
    # FSDP2's MixedPrecisionPolicy casts parameters to 16 bits, and leaves buffers, such as U and V, in float32.
    narrowed = x.dtype in _HALVES and U.dtype == V.dtype == torch.float32
    cast = cast or (_another_dtype(x, U, V) if weight is None else narrowed and weight.dtype == x.dtype)
    inputs = (x, weight, bias, U, V, S0, s, o)
    transformed = _transformed()
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    # An exported graph has the operator itself, whose registered derivative serves whoever trains it.
    if trained and not transformed and not _exporting():
        _refuse_frozen("linear", _frozen_wanted(weight, U, V, S0))
        return _Linear.apply(cast, *inputs) if _watched() else _ops.linear_trained(*inputs, cast)
    inputs = _cast_frozen(inputs) if cast else inputs
    return (reference.linear if transformed else _ops.linear)(*inputs)[0]


def linear_multi(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    index: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:
    """:func:`linear` with another adapter for each row, for inference.

    ``y_i = x_i W0ᵀ + bias + (x_i V) D_aᵀ`` with ``a = index[i]``. The adapters share U, V, S0 and the base weight, and
    the time hardly depends on how many there are. Autocast is as for :func:`linear`.

    Args:
        x: input [..., k].
        weight: base weight [d, k] in any strides, or None for the adapters' branches alone.
        bias: [d] or None.
        U: left singular vectors [d, r], in x's dtype.
        V: right singular vectors [k, r], in x's dtype.
        S0: singular values [r], float32 (float64 for float64 x).
        s: changes of the singular values [A, r], float32 (float64); 16-bit is accepted, and widened in every call.
        o: changes of the output scales [A, d], as s.
        index: int64 on x's device: the adapter of each row, −1 for the base, whose rows are those of
            ``torch.nn.functional.linear`` bit for bit. Its shape is x's without the last dimension, or the first of
            these dimensions alone: for x [batch, tokens, k] also [batch], one adapter a sequence.
        ranks: [A] int64, on the CPU or x's device: adapter a has rank ``ranks[a]`` and uses that many leading columns
            of U, V and S0. None: all have rank r.

    Returns:
        y [..., d] in x's dtype.

    Raises:
        IndexError: on the CPU, a value of index or ranks out of range. On another device nobody waits to look: an
            index out of range gives a row of NaN, and a rank out of range is taken for the nearest that there is.
        RuntimeError: wrong shape, dtype or device, naming the argument; a gradient would be needed.
    """
    x, bias, cast = _autocast(x, bias)
    cast = cast or (weight is None and _another_dtype(x, U, V))
    inputs = (x, weight, bias, U, V, S0, s, o)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        _refuse_training()
    return _ops.linear_multi(*(_cast_frozen(inputs) if cast else inputs), index, ranks)


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
    if torch.compiler.is_compiling() or _transformed():
        return y.add_(linear(x, None, None, U, V, S0, s, o))
    x, _, cast = _autocast(x, None)
    x = x.to(y.dtype) if cast else x
    cast = cast or (x.dtype == y.dtype and _another_dtype(x, U, V))
    inputs = (x, None, None, U, V, S0, s, o)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, *inputs)):
        if y.requires_grad and (y.is_leaf or (y._base is not None and y._base.is_leaf)):
            raise RuntimeError(
                "osora.ops.linear_add_: y is a leaf that requires a gradient, or a view of one, and would be changed "
                "in place; give a clone(), or call it under torch.no_grad()"
            )
        _refuse_frozen("linear_add_", {"U": U.requires_grad, "V": V.requires_grad, "S0": S0.requires_grad})
        return _LinearAdd.apply(cast, y, *inputs)
    inputs = _cast_frozen(inputs) if cast else inputs
    _ops.linear_add_(y, *(t for t in inputs if t is not None))
    return y


# -- CUDA tensors without a CUDA build -------------------------------------------------------------------------------

_warned = False


def _served_by_reference(function: Callable) -> Callable:
    def slow(*arguments: Any) -> Any:
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                "osora was built without CUDA: its operators run in plain torch on this device, right but slower "
                "(build again where nvcc is found; docs/build.md)",
                RuntimeWarning,
                stacklevel=2,
            )
        return function(*arguments)

    return slow


_fallbacks = torch.library.Library("osora", "IMPL")


def _serve_by_reference(*functions: Callable) -> None:
    """Where osora was built without CUDA, these functions of plain torch are the operators of their names there."""
    if not _load._C.build_info()["cuda"]:
        for function in functions:
            _fallbacks.impl(function.__name__, _served_by_reference(function), "CUDA")


_serve_by_reference(
    reference.fold,
    reference.fold_backward,
    reference.linear,
    reference.down,
    reference.up,
    reference.linear_backward,
    reference.linear_multi,
    reference.linear_add_,
)
