# SPDX-License-Identifier: Apache-2.0
"""What a training loop asks for: groups of parameters with learning rates of their own, and SORSA's penalty."""

from torch import Tensor, nn

from osora.regularizer import penalties_in


def orthonormality(model: nn.Module, gamma: float | None = None) -> Tensor:
    """SORSA's penalty, ``gamma`` times the mean over all factors U and V of how far they are from orthonormal.

    Every step of an optimiser from ``torch.optim`` adds its gradient by itself, so that a training loop needs nothing
    (docs/sorsa.md). Call it to look at it, or to add it to a loss: when it has gone backward, the next step adds
    nothing more.

    Args:
        model: one with a SORSA adapter that is active, of this package or in PEFT.
        gamma: instead of the config's; 1 gives the mean itself.

    Returns:
        A scalar in float32 (float64), differentiable in the factors.

    Raises:
        ValueError: no SORSA adapter is active.
    """
    penalties = penalties_in(model)
    if not penalties:
        raise ValueError("no SORSA adapter is active in this model: there is nothing to penalise")
    values = [penalty.value(gamma) for penalty in penalties]
    return sum(values[1:], values[0])


__all__ = ["orthonormality"]
