# SPDX-License-Identifier: Apache-2.0
"""Every operator in plain torch: the specification, and the fallback where no compiled kernel exists.

Nothing of osora is imported here. Letters: n rows of x, k in_features, d out_features, r rank.

The adapter in delta form (docs/method.md): the paper's layer (OSoRA, arXiv 2505.14350)

    y = x W_resᵀ + bias + O ⊙ (((x V) ⊙ S) Uᵀ),      W_res = W0 − U diag(S0) Vᵀ

is, with o = O − 1 and s = S − S0, term for term

    D[i, j] = U[i, j] · (o[i] · (S0[j] + s[j]) + s[j])
    y       = x W0ᵀ + bias + (x V) Dᵀ

so the base weight W0 is never changed, and o = s = 0 is the base model exactly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights and factors."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of S0 and of every sum: float64 for float64 factors, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold(U: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    """The adapter as one matrix: ``W = W0 + D Vᵀ``.

    Args:
        U: left singular vectors [d, r].
        S0: singular values of the base weight [r], float32 (float64 for float64 U).
        s: trained change of the singular values [r].
        o: trained change of the output scales [d].

    Returns:
        D [d, r] in U's dtype, computed in float32 (float64) and rounded once.
    """
    exact = accumulate_dtype(U.dtype)
    start, s, o = S0.to(exact) + s.to(exact), s.to(exact), o.to(exact)
    return (U.to(exact) * (o[:, None] * start + s)).to(U.dtype)


def fold_many(U: Sequence[Tensor], S0: Sequence[Tensor], s: Sequence[Tensor], o: Sequence[Tensor]) -> list[Tensor]:
    """:func:`fold` of many layers: lists of one length, a layer at each place."""
    return [fold(*layer) for layer in zip(U, S0, s, o, strict=True)]


def fold_backward(
    U: Tensor, P: Tensor, S0: Tensor, s: Tensor, o: Tensor, need_s: bool = True, need_o: bool = True
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`fold`, given ``P = dL/dD`` [d, r] in float32 (float64 for float64 U).

    ``ds[j] = Σᵢ (1 + o[i]) U[i, j] P[i, j]`` and ``do[i] = Σⱼ U[i, j] (S0[j] + s[j]) P[i, j]``.

    Returns:
        ds [r] and do [d] in P's dtype; what is not needed is an empty tensor [0].
    """
    exact = accumulate_dtype(U.dtype)
    product = U.to(exact) * P
    ds = ((1 + o.to(exact))[:, None] * product).sum(0) if need_s else P.new_empty(0)
    do = (product * (S0 + s.to(exact))).sum(1) if need_o else P.new_empty(0)
    return ds, do


def linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor
) -> tuple[Tensor, Tensor]:
    """``y = x W0ᵀ + bias + h Dᵀ`` and ``h = x V``.

    Args:
        x: input [..., k]; x, weight, bias, U and V share one dtype.
        weight: frozen base weight [d, k], or None for the adapter's branch alone.
        bias: [d] or None. It is not scaled by O.
        U: left singular vectors [d, r].
        V: right singular vectors [k, r].
        S0: singular values [r].
        s: change of the singular values [r].
        o: change of the output scales [d].

    Returns:
        y [..., d] and h [n, r], the only tensor the backward needs beside the parameters.
    """
    h = down(x, V)
    return up(x, h, weight, bias, U, S0, s, o), h


def down(x: Tensor, V: Tensor) -> Tensor:
    """The first half of :func:`linear`: ``h = x V`` [n, r] for x [..., k]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ V


def up(
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
    """The second half of :func:`linear`: ``y = x W0ᵀ + bias + h Dᵀ`` [..., d]. A D that is given is not folded."""
    y = h @ (fold(U, S0, s, o) if D is None else D).t()
    if bias is not None:
        y = y + bias
    if weight is not None:
        y = y + x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ weight.t()
    return y.reshape(*x.shape[:-1], U.shape[0])


def linear_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_x: bool = True,
    need_s: bool = True,
    need_o: bool = True,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear`: ``dx = dy W0 + (dy D) Vᵀ``, and ds, do from ``P = dyᵀ h``.

    Returns:
        dx [..., k] in dy's dtype, ds [r], do [d] in float32 (float64 for float64); what is not needed is empty, [0].
    """
    rows = dy.reshape(math.prod(dy.shape[:-1]), U.shape[0])
    dx = dy.new_empty(0)
    if need_x:
        dx = (rows @ (fold(U, S0, s, o) if D is None else D)) @ V.t()
        if weight is not None:
            dx = dx + rows @ weight
        dx = dx.reshape(*dy.shape[:-1], V.shape[0])
    exact = accumulate_dtype(dy.dtype)
    if need_s or need_o:
        P = rows.to(exact).t() @ h.to(exact)
        ds, do = fold_backward(U, P, S0, s, o, need_s, need_o)
    else:
        ds, do = S0.new_empty(0), S0.new_empty(0)
    return dx, ds, do


def multi_scale(h: Tensor, S0: Tensor, s: Tensor, ranks: Tensor | None, index: Tensor) -> Tensor:
    """The first step of :func:`linear_multi` that knows whose row it is.

    Args:
        h: ``x V`` [n, r].
        S0: singular values [r].
        s: changes of the singular values [A, r].
        ranks: how many leading columns count, [A] int64; None for all of them.
        index: the adapter of each row, [n] int64; −1 for none.

    Returns:
        t [2n, r] in h's dtype, rounded once: ``h (S0 + s_a)`` in row i, ``h s_a`` in row n + i. Zeros beyond the rank
        and for −1; NaN where index is out of range.
    """
    exact = accumulate_dtype(h.dtype)
    start, s = S0.to(exact) + s.to(exact), s.to(exact)
    scale = torch.cat([_of_rows(start, index), _of_rows(s, index)])
    limits = s.new_full(s.shape[:1], h.shape[1]) if ranks is None else ranks.to(s)
    # The row of an index out of range has NaN for a rank: not (j >= NaN), so that none of it is taken for absent.
    absent = torch.arange(h.shape[1], device=h.device) >= _of_rows(limits[:, None], index)
    t = h.to(exact).repeat(2, 1) * scale
    return t.masked_fill(absent.repeat(2, 1), 0).to(h.dtype)


def multi_combine(y: Tensor, t: Tensor, o: Tensor, index: Tensor) -> Tensor:
    """``y_i + o_a t_i + t_{n+i}``: the second step of :func:`linear_multi` that knows whose row it is.

    Args:
        y: [n, d].
        t: [2n, d].
        o: changes of the output scales [A, d].
        index: the adapter of each row, [n] int64; rows of −1 keep their bits.

    Returns:
        [n, d] in y's dtype, computed in float32 (float64) and rounded once.
    """
    exact = accumulate_dtype(y.dtype)
    scaled, changed = t.to(exact).tensor_split([len(y)])
    total = y.to(exact) + (_of_rows(o.to(exact), index) * scaled + changed)
    return torch.where((index == -1)[:, None], y, total.to(y.dtype))


def _of_rows(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``; zeros for −1 and NaN for an index out of range, for which no device has to be waited for."""
    count = len(table)
    last = table.new_tensor([0.0, float("nan")])[:, None].expand(2, table.shape[1])
    known = torch.where((index >= 0) & (index < count), index, torch.where(index == -1, count, count + 1))
    return torch.cat([table, last])[known]


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
    """:func:`linear` for many adapters that share U, V, S0 and the base: row i of x by adapter ``a = index[i]``.

    ``y_i = x_i W0ᵀ + bias + o_a ⊙ ((h_i ⊙ (S0 + s_a)) Uᵀ) + (h_i ⊙ s_a) Uᵀ`` with ``h = x V``, which is
    ``x_i W0ᵀ + bias + h_i D_aᵀ``, multiplied out so that no row needs a D of its own.

    Args:
        x: input [..., k]; x, weight, bias, U and V share one dtype.
        weight: frozen base weight [d, k], or None for the adapters' branches alone.
        bias: [d] or None.
        U: left singular vectors [d, r].
        V: right singular vectors [k, r].
        S0: singular values [r].
        s: changes of the singular values [A, r].
        o: changes of the output scales [A, d].
        index: int64 of x's leading shape, or of the first of its dimensions; −1 is the base.
        ranks: [A] int64: the columns of U and V beyond an adapter's rank do not exist for it. None: all have rank r.

    Returns:
        y [..., d] in x's dtype.
    """
    leading, d = x.shape[:-1], U.shape[0]
    rows = x.reshape(math.prod(leading), x.shape[-1])
    index = index.reshape(index.shape + (1,) * (len(leading) - index.dim())).expand(leading).reshape(-1)
    y = x.new_zeros(*leading, d) if weight is None else torch.nn.functional.linear(x, weight, bias)
    t = multi_scale(rows @ V, S0, s, ranks, index) @ U.t()
    return multi_combine(y.reshape(len(rows), d), t, o, index).reshape(*leading, d)


def linear_add_(y: Tensor, x: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor) -> Tensor:
    """``y += h Dᵀ`` in place, for y [..., d] and ``h = x V`` of x [..., k].

    Returns:
        h [n, r], the only tensor the backward needs beside the parameters; y's gradient passes through.
    """
    branch, h = linear(x, None, None, U, V, S0, s, o)
    y.add_(branch)
    return h


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
) -> tuple[Tensor, Tensor]:
    """``y = x W0ᵀ + bias + (x V0) Aᵀ + (x v) Bᵀ`` with ``A = u S + U0 s``, ``B = U S``, and ``h = x V``.

    With ``U = U0 + u``, ``S = S0 + s``, ``V = V0 + v``, ``A V0ᵀ + B vᵀ`` is ``U diag(S) Vᵀ − U0 diag(S0) V0ᵀ`` without
    a difference of large numbers (SORSA, arXiv 2409.00055).

    Args:
        x: input [..., k]; x, weight, bias, U0 and V0 share one dtype.
        weight: frozen base weight [d, k], or None for the adapter's branch alone.
        bias: [d] or None.
        U0: left singular vectors at the start [d, r].
        S0: singular values at the start [r].
        V0: right singular vectors at the start [k, r].
        u: trained change of the left vectors [d, r].
        s: trained change of the singular values [r].
        v: trained change of the right vectors [k, r].

    Returns:
        y [..., d] and h [n, r].
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    A, B, v = _sorsa_fold(U0, S0, u, s, v)
    start, change = rows @ V0, rows @ v
    y = start @ A.t() + change @ B.t()
    if bias is not None:
        y = y + bias
    if weight is not None:
        y = y + rows @ weight.t()
    return y.reshape(*x.shape[:-1], U0.shape[0]), start + change


def sorsa_linear_backward(
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
    need_x: bool = True,
    need_u: bool = True,
    need_s: bool = True,
    need_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`sorsa_linear`; x is read for dv alone, h for du and ds.

    ``dx = dy W0 + (dy A) V0ᵀ + (dy B) vᵀ``, ``dv = xᵀ (dy B)``, and from ``P = dyᵀ h``: ``du = P S``,
    ``ds[j] = Σᵢ U[i, j] P[i, j]``.

    Returns:
        dx [..., k] in dy's dtype; du [d, r], ds [r], dv [k, r] in float32 (float64); what is not needed is empty, [0].
    """
    exact = accumulate_dtype(dy.dtype)
    rows = dy.reshape(math.prod(dy.shape[:-1]), U0.shape[0])
    A, B, v = _sorsa_fold(U0, S0, u, s, v)
    dx, (du, ds, dv) = dy.new_empty(0), (S0.new_empty(0) for _ in range(3))
    if need_x:
        dx = (rows @ A) @ V0.t() + (rows @ B) @ v.t()
        if weight is not None:
            dx = dx + rows @ weight
        dx = dx.reshape(*dy.shape[:-1], V0.shape[0])
    if need_v and x is not None:
        dv = x.reshape(len(rows), V0.shape[0]).to(exact).t() @ (rows @ B).to(exact)
    if (need_u or need_s) and h is not None:
        P = rows.to(exact).t() @ h.to(exact)
        ds = ((U0.to(exact) + u.to(exact)) * P).sum(0) if need_s else ds
        du = P * (S0 + s.to(exact)) if need_u else du
    return dx, du, ds, dv


def _sorsa_fold(U0: Tensor, S0: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = accumulate_dtype(U0.dtype)
    frozen, u, s = U0.to(exact), u.to(exact), s.to(exact)
    A, B = u * (S0 + s) + frozen * s, (frozen + u) * (S0 + s)
    return A.to(U0.dtype), B.to(U0.dtype), v.to(U0.dtype)


def effective_weight(
    weight: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """``W_eff = W0 + D Vᵀ`` [d, k], computed in float32 (float64) and rounded once to ``dtype`` (the weight's)."""
    exact = accumulate_dtype(weight.dtype)
    total = weight.to(exact) + fold(U.to(exact), S0, s, o) @ V.to(exact).t()
    return total.to(weight.dtype if dtype is None else dtype)


def linear_effective(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`linear` with one product, ``y = x W_effᵀ + bias``; W_eff is in x's dtype.

    Returns:
        y [..., d], and ``h = x V`` [n, r] or, if it is not needed, an empty tensor [0].
    """
    y = torch.nn.functional.linear(x, effective_weight(weight, U, V, S0, s, o, x.dtype), bias)
    return y, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ V.to(x.dtype) if need_h else x.new_empty(0)


def linear_effective_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    S0: Tensor,
    s: Tensor,
    o: Tensor,
    need_x: bool = True,
    need_s: bool = True,
    need_o: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_effective`: ``dx = dy W_eff``; ds and do are those of :func:`linear_backward`."""
    dx = dy @ effective_weight(weight, U, V, S0, s, o, dy.dtype) if need_x else dy.new_empty(0)
    exact = accumulate_dtype(dy.dtype)
    if not (need_s or need_o):
        return dx, dy.new_empty(0, dtype=exact), dy.new_empty(0, dtype=exact)
    P = dy.reshape(math.prod(dy.shape[:-1]), U.shape[0]).to(exact).t() @ h.to(exact)
    return dx, *fold_backward(U, P, S0, s, o, need_s, need_o)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The top ``rank`` singular triplets from a full float64 decomposition, with the residuals of the triplets.

    Args:
        weight: [..., d, k].
        rank: number of triplets, at most min(d, k).

    Returns:
        U [..., d, r], S [..., r] (descending), V [..., k, r] in float64; residuals [..., r]
        ``ρᵢ = ‖Wᵀuᵢ − σᵢvᵢ‖ / σᵢ``. The largest entry of each uᵢ is positive.
    """
    exact = weight.to(torch.float64)
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    U, S, V = U[..., :rank], S[..., :rank], Vh.mT[..., :rank]
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(exact)
    U, V = U * sign, V * sign
    residuals = torch.linalg.vector_norm(exact.mT @ U - V * S[..., None, :], dim=-2) / S.clamp_min(1e-300)
    return U, S, V, residuals
