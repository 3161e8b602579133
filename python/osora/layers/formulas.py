# SPDX-License-Identifier: Apache-2.0
"""What each method computes from a frozen basis and an adapter's trained changes, wherever these are kept.

A basis is ``(U [d, r], V [k, r], S0 [r])``. An adapter's tensors, its deltas, come in the order of ``kinds``; the rank
is the length of ``s``, which every method has.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from osora import ops
from osora.config import AdapterConfig, OsoraConfig, SorsaConfig
from osora.ops import ablations as ops_ablations

Basis = tuple[Tensor, Tensor, Tensor]
Deltas = Sequence[Tensor]


class Formula(ABC):
    """A method: its trained tensors, its forward and its ``ΔW``. Without state, so that equal ones are the same."""

    kinds: ClassVar[tuple[str, ...]]
    """Names of an adapter's tensors, in their order; the change of the singular values is "s"."""

    @abstractmethod
    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """The shape of each kind, for a weight [d, k] and rank r."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: Basis, deltas: Deltas) -> Tensor:
        """``x (weight + ΔW)ᵀ + bias`` [..., d]; the branch alone if weight and bias are None."""

    def add_(self, y: Tensor, x: Tensor, basis: Basis, deltas: Deltas) -> Tensor:
        """The branch added to y [..., d], which may be written to; use what is returned."""
        return y + self.linear(x, None, None, basis, deltas)

    @abstractmethod
    def traced_factors(self, basis: Basis, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """``(left [d, q], right [k, q])`` with ``ΔW = left rightᵀ``, left in float32 (float64); with a derivative."""

    @torch.no_grad()
    def factors(self, basis: Basis, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """:meth:`traced_factors` without a derivative."""
        return self.traced_factors(basis, deltas)

    @property
    def trained(self) -> tuple[str, ...]:
        """The kinds that are trained; the others stay as they are."""
        return self.kinds

    @property
    def standard(self) -> bool:
        """Whether it is the paper's OSoRA, which a batch of many and the materialised plan have operators for."""
        return False

    def penalised(self, basis: Basis, deltas: Deltas) -> list[tuple[Tensor, Tensor]]:
        """Factors to be kept orthonormal: each one's trained change and its start, both [m, r]."""
        return []

    def rank(self, deltas: Deltas) -> int:
        """The rank of the basis that these deltas belong to."""
        s = deltas[self.kinds.index("s")]
        return s.numel() or getattr(s, "ds_numel", 0)  # ZeRO 3 leaves none of it outside of its layer

    def named(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Deltas by name in their order."""
        return tuple(deltas[kind] for kind in self.kinds)


def leading(basis: Basis, rank: int) -> Basis:
    """The basis of a smaller rank: leading columns, as views."""
    U, V, S0 = basis
    return basis if rank == S0.numel() else (U[:, :rank], V[:, :rank], S0[:rank])


def owned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory holds more: a file of a view has all of it, and safetensors takes none."""
    tensor = tensor.contiguous()
    whole = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


@dataclass(frozen=True)
class OsoraFormula(Formula):
    """``ΔW = D Vᵀ`` with ``D = U ⊙ (o (S0 + s) + c s)``; deltas o [d] and s [r].

    On the input side U and V change roles: ``ΔW = U Eᵀ``, ``E = V ⊙ (o (S0 + s) + c s)``, o [k].

    Args:
        train: "both", or "o" or "s" alone.
        side: "output" or "input", of O.
        initial_o: c, what O starts at. 1 is the paper's.
    """

    train: str = "both"
    side: str = "output"
    initial_o: float = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("o", "s")

    @property
    def trained(self) -> tuple[str, ...]:
        """O, s, or both."""
        return self.kinds if self.train == "both" else (self.train,)

    @property
    def standard(self) -> bool:
        """The paper's layer, whatever of it is trained."""
        return self.side == "output" and self.initial_o == 1

    @property
    def _fused(self) -> bool:
        return self.side == "output" and self.initial_o != 0

    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """O [d], or [k] on the input side, and s [r]."""
        return {"o": (d if self.side == "output" else k,), "s": (r,)}

    def _as_standard(self, basis: Basis, deltas: Deltas) -> tuple[Tensor, ...]:
        """U, V, S0, s and o of the same layer with O from 1: O / c beside c S."""
        (U, V, S0), (o, s) = basis, deltas
        c = self.initial_o
        return (U, V, S0, s, o) if c == 1 else (U, V, c * S0, c * s.to(S0.dtype), o.to(S0.dtype) / c)

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: Basis, deltas: Deltas) -> Tensor:
        """Osora's operator, or plain torch where O is on the input side or starts at 0."""
        if self._fused:
            return ops.linear(x, weight, bias, *self._as_standard(basis, deltas))
        o, s = deltas
        return ops_ablations.linear(x, weight, bias, *basis, s, o, self.initial_o, self.side == "input")

    def add_(self, y: Tensor, x: Tensor, basis: Basis, deltas: Deltas) -> Tensor:
        """In place, if the operator serves it."""
        if self._fused:
            return ops.linear_add_(y, x, *self._as_standard(basis, deltas))
        return super().add_(y, x, basis, deltas)

    def traced_factors(self, basis: Basis, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """D [d, r] and V [k, r]; on the input side U [d, r] and the folded V [k, r]. Rank r."""
        (U, V, S0), (o, s) = basis, deltas
        if self.side == "input":
            return U.to(S0.dtype), ops_ablations.fold_from(V, S0, s, o, self.initial_o)
        if self.initial_o == 1:
            return ops.fold(U.to(S0.dtype), S0, s.to(S0), o.to(S0)), V  # of 16-bit factors too in float32
        return ops_ablations.fold_from(U, S0, s, o, self.initial_o), V


@dataclass(frozen=True)
class SorsaFormula(Formula):
    """``ΔW = scale (U diag(S) Vᵀ − U0 diag(S0) V0ᵀ)``; deltas u = U − U0 [d, r], s = S − S0 [r], v = V − V0 [k, r].

    ``scale`` is 1, or alpha / r where there is an alpha.
    """

    alpha: float | None = None
    kinds: ClassVar[tuple[str, ...]] = ("u", "s", "v")

    def shapes(self, d: int, k: int, r: int) -> dict[str, tuple[int, ...]]:
        """U [d, r], s [r] and v [k, r]."""
        return {"u": (d, r), "s": (r,), "v": (k, r)}

    def _scaled(self, S0: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        # U diag(S) Vᵀ and U0 diag(S0) V0ᵀ are both linear in the singular values
        if self.alpha is None:
            return S0, s
        scale = self.alpha / S0.numel()
        return scale * S0, scale * s.to(S0.dtype)

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, basis: Basis, deltas: Deltas) -> Tensor:
        """SORSA's operator."""
        (U0, V0, S0), (u, s, v) = basis, deltas
        S0, s = self._scaled(S0, s)
        return ops.sorsa_linear(x, weight, bias, U0, S0, V0, u, s, v)

    def penalised(self, basis: Basis, deltas: Deltas) -> list[tuple[Tensor, Tensor]]:
        """U and V."""
        (U0, V0, _), (u, _, v) = basis, deltas
        return [(u, U0), (v, V0)]

    def traced_factors(self, basis: Basis, deltas: Deltas) -> tuple[Tensor, Tensor]:
        """``[A | B]`` [d, 2r] and ``[V0 | v]`` [k, 2r] (docs/method.md): rank 2r, no difference of large products."""
        (U0, V0, S0), (u, s, v) = basis, deltas
        S0, s = self._scaled(S0, s.to(S0))
        U0, V0, u, v = (t.to(S0) for t in (U0, V0, u, v))
        S = S0 + s
        return torch.cat([u * S + U0 * s, (U0 + u) * S], 1), torch.cat([V0, v], 1)


def formula_of(config: AdapterConfig) -> Formula:
    """The formula of a config's adapters. Raises TypeError for what is no method's config."""
    if isinstance(config, OsoraConfig):
        return OsoraFormula(config.train, config.side, float(config.initial_o))
    if isinstance(config, SorsaConfig):
        return SorsaFormula(config.alpha)
    raise TypeError(f"config must be an OsoraConfig or a SorsaConfig, got {type(config).__name__}")


__all__ = ["Basis", "Deltas", "Formula", "OsoraFormula", "SorsaFormula", "formula_of", "leading"]
