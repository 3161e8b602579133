# SPDX-License-Identifier: Apache-2.0
"""``osora::linear_multi``: OSoRA with another adapter for each row, for inference."""

from typing import Any

import torch
from torch import Tensor

from osora import reference
from osora.ops.common import another_dtype, autocast_inputs, cast_frozen, one_device, serve_by_reference

_ops = torch.ops.osora


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
    one_device("linear_multi", x, weight, bias, U, V, S0, s, o, index)
    return x.new_empty((*x.shape[:-1], U.shape[0]))


def _refuse_training(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "osora::linear_multi is for inference, and an input requires a gradient: call it under torch.no_grad(), or "
        "train one adapter at a time with osora::linear"
    )


torch.library.register_autograd("osora::linear_multi", _refuse_training, setup_context=_refuse_training)


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
    """:func:`osora.ops.linear` with another adapter for each row, for inference.

    ``y_i = x_i W0ᵀ + bias + (x_i V) D_aᵀ`` with ``a = index[i]``. The adapters share U, V, S0 and the base weight, and
    the time hardly depends on how many there are. Autocast is as for :func:`osora.ops.linear`.

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
    x, bias, cast = autocast_inputs(x, bias)
    cast = cast or (weight is None and another_dtype(x, U, V))
    inputs = (x, weight, bias, U, V, S0, s, o)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        _refuse_training()
    return _ops.linear_multi(*(cast_frozen(inputs) if cast else inputs), index, ranks)


serve_by_reference(reference.linear_multi)
