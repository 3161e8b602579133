# SPDX-License-Identifier: Apache-2.0
"""A base layer and one adapter's branch: together in one operator, or one after the other."""

from torch import Tensor, nn

from osora.layers.base_weight import has_global_hooks, has_hooks, oriented_weight
from osora.layers.formulas import Basis, Deltas, Formula
from osora.layers.quantised import kind_of


def adapted_linear(
    base: nn.Module, x: Tensor, formula: Formula, basis: Basis, deltas: Deltas, dropout: float = 0.0
) -> Tensor:
    """What a base layer gives with one adapter: y [..., out_features].

    The base layer is called where calling it does more than its product, where it alone can read its quantised weight,
    and where dropout gives the branch another x.

    Args:
        base: ``torch.nn.Linear``, transformers' ``Conv1D``, or a quantised layer that is known.
        x: [..., in_features].
        formula: the adapter's method.
        basis: U, V and S0 of the adapter's rank.
        deltas: the adapter's tensors, in the order of ``formula.kinds``.
        dropout: probability for the entries of the branch's x, 0 where the layer is not training.
    """
    hooked, kind = has_hooks(base), kind_of(base)
    if hooked or dropout > 0 or kind is not None:
        if kind is not None and x.requires_grad:
            kind.check_gradient(base)
        branch, y = nn.functional.dropout(x, dropout) if dropout > 0 else x, base(x)
        # hooks may keep y; autograd lets nobody write to a view that a function of Python's gave, as bitsandbytes' do
        if hooked or has_global_hooks() or (kind is not None and y._is_view()):
            return y + formula.linear(branch, None, None, basis, deltas)
        return formula.add_(y, branch, basis, deltas)
    return formula.linear(x, oriented_weight(base), base.bias, basis, deltas)  # type: ignore[arg-type]
