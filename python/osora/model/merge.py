# SPDX-License-Identifier: Apache-2.0
"""The adapter folded into the weights of a whole model, and back."""

from collections.abc import Mapping

from torch import nn

from osora.layers import AdaptedLinear
from osora.layers.undo import AllOrNothing
from osora.model.state import adapted_layers, refuse_sharded, state_of


def _merge_one(name: str, layer: AdaptedLinear, requantize: bool) -> None:
    try:
        layer.merge(requantize)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def merge_layers(layers: Mapping[str, AdaptedLinear], requantize: bool = False) -> None:
    """Merge all of them or, whatever stops it, none."""
    with AllOrNothing(*layers.values()):  # which holds the base weights that each merge keeps, and no more
        for name, layer in layers.items():
            _merge_one(name, layer, requantize)


def merge(model: nn.Module, *, requantize: bool = False) -> nn.Module:
    """Put ``W0 + ΔW``, summed in float32 and rounded once, in every adapted layer: forward costs what the base does.

    Of several adapters it is the active one, in the layers that it is in.
    The base weights are kept beside the merged ones (one more copy of the adapted weights) for :func:`unmerge`.
    Modules that it trains whole are its copies already, and stay so.
    If one layer cannot be merged, none is.

    Args:
        model: a model with an adapter.
        requantize: quantise the sum as a quantised base weight is (docs/quantised.md, "Merging"). Most of what an
            adapter changes is smaller than a step of four bits, so without this such a base is refused.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter, merged already, a quantised base weight without ``requantize``, a base weight that is
            computed (pruned, parametrised) or cannot be read, or a merged weight would be NaN or infinite, naming the
            layer.
    """
    state_of(model)
    refuse_sharded(adapted_layers(model), "merged")
    merge_layers(adapted_layers(model), requantize)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back: the same tensors as before :func:`merge`, bit for bit.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter, or not merged.
    """
    state_of(model)
    layers = adapted_layers(model)
    merged = [layer for layer in layers.values() if layer.merged]
    if not merged:
        raise ValueError(f"{next(iter(layers), 'model')}: the adapter is not merged: there is nothing to undo")
    with AllOrNothing(*merged):
        for layer in merged:
            layer.unmerge()
    return model
