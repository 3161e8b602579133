# SPDX-License-Identifier: Apache-2.0
"""The adapted layers by the method that their first adapter has."""

from torch import nn

from osora.layers.adapted import DEFAULT, AdaptedLinear
from osora.layers.formulas import Formula, OsoraFormula, SorsaFormula
from osora.svd.certificate import Decomposition


class OsoraLinear(AdaptedLinear):
    """``y = base_layer(x) + (x V) Dᵀ`` with ``D = U ⊙ (o (S0 + s) + s)``; trained are ``o`` [d] and ``s`` [r].

    Everything else is :class:`osora.layers.AdaptedLinear`'s.
    """

    o: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Decomposition,
        dropout: float = 0.0,
        adapter: str = DEFAULT,
        formula: OsoraFormula = OsoraFormula(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(base_layer, factors, formula, dropout, adapter)


class SorsaLinear(AdaptedLinear):
    """``y = base_layer(x) + x (U diag(S) Vᵀ − U0 diag(S0) V0ᵀ)ᵀ``.

    Trained are the changes ``u`` [d, r], ``s`` [r] and ``v`` [k, r] of the triplets U0, S0 and V0, which are
    the buffers ``U``, ``S0`` and ``V``. Everything else is :class:`osora.layers.AdaptedLinear`'s.
    """

    u: nn.Parameter
    v: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Decomposition,
        dropout: float = 0.0,
        adapter: str = DEFAULT,
        formula: SorsaFormula = SorsaFormula(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(base_layer, factors, formula, dropout, adapter)


def make_layer(
    base_layer: nn.Module, factors: Decomposition, formula: Formula, dropout: float, adapter: str
) -> AdaptedLinear:
    """The layer for a first adapter of that method."""
    if isinstance(formula, OsoraFormula):
        return OsoraLinear(base_layer, factors, dropout, adapter, formula)
    if isinstance(formula, SorsaFormula):
        return SorsaLinear(base_layer, factors, dropout, adapter, formula)
    raise TypeError(f"no layer for a {type(formula).__name__}")


__all__ = ["OsoraLinear", "SorsaLinear", "make_layer"]
