# SPDX-License-Identifier: Apache-2.0
"""The branches of OSoRA's ablations that the fused operator does not have, in plain torch (docs/ablations.md).

With ``F = Q ⊙ (o (S0 + s)ᵀ + c 1 sᵀ)`` for a factor Q and an initial scale c, and O on

- the output side: ``ΔW = F Vᵀ``, Q = U, o [d]. The fused operator serves it for every c but 0.
- the input side: ``ΔW = U Fᵀ``, Q = V, o [k]: the columns of the weight are scaled.
"""

from typing import Any

import torch
from torch import Tensor

from osora import reference
from osora.ops.common import autocast_inputs, is_transformed, refuse_frozen

ROWS = 2**12  # rows of x and dy that are widened at a time


def fold_from(Q: Tensor, S0: Tensor, s: Tensor, o: Tensor, c: float) -> Tensor:
    """F [m, r] of a factor [m, r], S0 and s [r], o [m], in S0's dtype. Exactly zero for zero o and s."""
    s, o = s.to(S0.dtype), o.to(S0.dtype)
    return Q.to(S0.dtype) * (torch.outer(o, S0 + s) + c * s)


def _sums(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right`` of [n, a] and [n, b], summed in float32 (float64)."""
    exact = reference.accumulate_dtype(left.dtype)
    total = left.new_zeros((left.shape[1], right.shape[1]), dtype=exact)
    for a, b in zip(left.split(ROWS), right.split(ROWS), strict=True):
        total.addmm_(a.t().to(exact), b.to(exact))
    return total


class _Branch(torch.autograd.Function):
    """``(x right) leftᵀ``, one of them folded. Saves x [n, k] for O on the input side, h [n, r] on the output side."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor, c: float, on_input: bool
    ) -> Tensor:
        refuse_frozen("ablations", {"U": U.requires_grad, "V": V.requires_grad, "S0": S0.requires_grad})
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            left, right = _factors(x.dtype, U, V, S0, s, o, c, on_input)
            h = rows @ right
            y = h @ left.t()
        ctx.c, ctx.on_input = c, on_input
        wanted = s.requires_grad or o.requires_grad
        ctx.save_for_backward((rows if on_input else h) if wanted else None, U, V, S0, s, o)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, U, V, S0, s, o = ctx.saved_tensors
        need_x, _, _, _, need_s, need_o, _, _ = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1])
            left, right = _factors(dy.dtype, U, V, S0, s, o, ctx.c, ctx.on_input)
            dx = ds = do = None
            g = rows @ left if need_x or ctx.on_input else None
            if need_x:
                assert g is not None
                dx = (g @ right.t()).reshape(*dy.shape[:-1], right.shape[0])
            if need_s or need_o:
                if ctx.on_input:
                    assert g is not None
                    Q, P = V, _sums(kept, g)  # ∂L/∂F
                else:
                    Q, P = U, _sums(rows, kept)
                P *= Q.to(S0.dtype)
                do = (P @ (S0 + s.to(S0.dtype))).to(o.dtype) if need_o else None
                ds = (P.t() @ (ctx.c + o.to(S0.dtype))).to(s.dtype) if need_s else None
        return dx, None, None, None, ds, do, None, None


def _factors(
    dtype: torch.dtype, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor, c: float, on_input: bool
) -> tuple[Tensor, Tensor]:
    """Left [d, r] and right [k, r] in x's dtype, rounded once."""
    if on_input:
        return U.to(dtype), fold_from(V, S0, s, o, c).to(dtype)
    return fold_from(U, S0, s, o, c).to(dtype), V.to(dtype)


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    c: float,
    on_input: bool,
) -> Tensor:
    """``x (weight + ΔW)ᵀ + bias`` [..., d], differentiable in x, bias, s and o; the branch alone without a weight.

    Args:
        x: [..., k].
        weight: frozen base weight [d, k], or None.
        bias: [d] or None.
        U, V, S0: the frozen basis [d, r], [k, r], [r].
        s: change of the singular values [r].
        o: change of the scales, O − c: [k] with ``on_input``, else [d].
        c: initial O.
        on_input: whether O scales the columns of ΔW, on x's side, instead of its rows.

    Returns:
        y in x's dtype. With o and s zero it is ``torch.nn.functional.linear``, bit for bit.
    """
    x, bias, autocast = autocast_inputs(x, bias)
    if is_transformed():  # autograd functions of this kind are opaque to torch.func
        left, right = _factors(x.dtype, U, V, S0, s, o, c, on_input)
        branch = x @ right @ left.t()
    else:
        branch = _Branch.apply(x, U, V, S0, s, o, c, on_input)
    if weight is None:
        return branch if bias is None else branch + bias
    return torch.nn.functional.linear(x, weight.to(x.dtype) if autocast else weight, bias) + branch
