# SPDX-License-Identifier: Apache-2.0
"""What is known of singular triplets: their certificate, and what is said where it was not reached."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Unconverged = Literal["warn", "raise"]


class ConvergenceError(RuntimeError):
    """A truncated SVD did not reach its tolerance."""


class Certificate(NamedTuple):
    """How exact the singular triplets of one matrix are: what layers, adapters' files and summaries say of them."""

    max_residual: float
    """The largest residual of a triplet above the rounding floor; 0 if there is none."""
    passes: int
    """Products with W or its transpose."""
    converged: bool
    """Whether every triplet is certified."""
    method: str
    """How they were found: a name of ``SVD_METHODS``, never "auto"."""

    def beside(self, other: "Certificate") -> "Certificate":
        """Of these triplets and further ones of the same matrix: no better than either."""
        residual = max(self.max_residual, other.max_residual)
        return self._replace(max_residual=residual, converged=self.converged and other.converged)


@dataclass(frozen=True)
class Decomposition:
    """The singular triplets of one named matrix, as :class:`osora.TruncatedSVD` has them, and how they were found.

    One that comes from an adapter's file has 0 columns and no (NaN) norm and floor: they are not stored.
    """

    name: str
    U: Tensor
    S: Tensor
    V: Tensor
    residuals: Tensor
    converged: bool
    passes: int
    method: str
    columns: int = 0
    norm: float = math.nan
    floor: float = math.nan

    @property
    def below_floor(self) -> Tensor:
        """[r] bool: which singular values are zero to rounding; none where the floor is not known."""
        return self.S.detach().to("cpu", torch.float64) <= self.floor

    @property
    def certificate(self) -> Certificate:
        """How exact the triplets are."""
        above = self.residuals[~self.below_floor]
        return Certificate(float(above.max()) if above.numel() else 0.0, self.passes, self.converged, self.method)

    def leading(self, rank: int) -> "Decomposition":
        """The first ``rank`` triplets. Exact: a triplet's vectors, value and residual do not depend on later ones."""
        return replace(
            self,
            U=self.U[:, :rank],
            S=self.S[:rank].clone(),  # a view would keep the values that are dropped in every copy on disk
            V=self.V[:, :rank],
            residuals=self.residuals[:rank],
        )


def _reason(item: Decomposition, tol: float, else_use: str) -> tuple[str, str]:
    """What keeps a decomposition from its certificate, and the cure."""
    limits = torch.where(item.below_floor, 1.0, tol)
    missed = (~(item.residuals <= limits)).nonzero().squeeze(1)
    if not len(missed):
        return "a larger singular value than its last was seen, or a solver failed", f"use {else_use} or another seed"
    first, worst = int(missed[0]), int(missed[item.residuals[missed].argmax()])
    residual, sigma = float(item.residuals[worst]), float(item.S[worst])
    where = f"residual {residual:.1e} at triplet {worst + 1} of {len(item.S)}"
    if not residual * max(sigma, item.floor) <= item.floor:
        return f"{where} after {item.passes} passes", f"use {else_use} or a larger tol"
    cures = [f"a rank of at most {first}"] * (first > 0) + ["a larger tol"]
    cures += ["float64 weights"] * (item.S.dtype != torch.float64)
    rounding = f"rounding to {str(item.S.dtype).removeprefix('torch.')} may leave {item.floor / sigma:.1e} there"
    return f"{where}, {rounding}", f"use {' or '.join(cures)}"


def report_failure(
    failed: list[Decomposition], tol: float, unconverged: Unconverged, stacklevel: int, else_use: str = "method='full'"
) -> None:
    """Warn or raise ConvergenceError, naming the matrices, if any of them reached no certificate of ``tol``.

    ``else_use`` is what the caller could have asked for instead.
    """
    if not failed:
        return
    reasons = [(item.name or "weight", *_reason(item, tol, else_use)) for item in failed[:5]]
    worst = "; ".join(f"{name} ({why}: {cure})" for name, why, cure in reasons)
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    message = f"the truncated SVD reached no certificate of tol={tol:g} for {worst}{more}"
    if unconverged == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)
