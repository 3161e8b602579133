# SPDX-License-Identifier: Apache-2.0
"""How adapted layers compute: on the base weight and the branch apart, or on one materialised weight."""

from collections.abc import Iterable

from torch import nn

from osora.config import names_or_regex
from osora.model.state import adapted_layers, state_of
from osora.model.targets import name_matches
from osora.model.together import follow_calls


def set_execution(
    model: nn.Module, plan: str, layers: str | Iterable[str] | None = None, *, together: bool = False
) -> nn.Module:
    """Choose how adapted layers compute; it changes no parameter and no file (docs/performance.md).

    "split", the default, adds the adapter's branch to the base's product: right at every size of the adapter, and no
    memory beside what is saved for the backward. "materialised" keeps ``W0 + D Vᵀ`` for each layer, one more copy of
    its weight, and computes one product with it: quicker from some thousand tokens per optimiser step, and for
    inference. In 16 bits it rounds away changes below a weight's last digit, most of the adapter early in training.

    The materialised weight is made in the first forward, and again after o, s or the base weight changed; micro-batches
    share it, and so do forward and backward. Two cases compute split under either plan: training with dropout, which
    acts on the branch alone, and a base layer with hooks, which must see its own output. Under autocast it is made in
    autocast's dtype. A merged or disabled layer does not use it, nor a batch of :func:`osora.adapters_in_batch`, nor a
    layer whose active adapter's method does not have this plan (SORSA). Parameters that FSDP replaces are refused.

    ``together=True``, of the split plan: within one forward of ``model`` itself, D of all these layers is folded at
    once when the first of them needs it, and kept for the backward, ``d r`` numbers a layer; and layers of one parent
    that are given the same x (q, k and v, say) get their ``x V`` from one product. The same function; a layer that
    cannot take part (another method, quantised, dropout, hooks) and one that is called outside of such a forward, as
    activation checkpointing does, computes on its own. Compiled and traced models do not change.

    Args:
        model: a model with an adapter.
        plan: "split" or "materialised".
        layers: names that layer names end in, or one regular expression for whole names; None for every adapted layer.
        together: see above. Layers that come to the model later are not part of it.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter, an unknown plan, one that the active adapter's method does not have, together with
            "materialised", or no layer of that name.
        TypeError: a parameter that is no plain ``torch.nn.Parameter``, such as those of FSDP2, naming the layer.
    """
    state_of(model)
    chosen = adapted_layers(model)
    if layers is not None:
        wanted = names_or_regex("layers", list(layers) if not isinstance(layers, str) else layers)
        chosen = {name: layer for name, layer in chosen.items() if name_matches(name, wanted)}
        if not chosen:
            raise ValueError(
                f"no adapted layer matches layers={layers!r}; the first is {next(iter(adapted_layers(model)))}"
            )
    for layer in chosen.values():
        layer.refuse_awaiting()
    before = {name: (layer.execution, layer.together) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        try:
            layer.set_execution(plan, together)
        except (TypeError, ValueError) as error:
            for earlier, old in before.items():
                if earlier == name:
                    break
                chosen[earlier].set_execution(*old)
            raise type(error)(f"{name}: {error}") from error
    follow_calls(model)
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Make every materialised weight again, in place, at the address it has.

    Needed after changes of o, s or a base weight that torch does not count: writes through ``.data``, a replayed CUDA
    graph. A graph that is recorded when the weights are up to date reads them at these addresses.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapter.
    """
    state_of(model)
    for layer in adapted_layers(model).values():
        layer.refresh()
    return model
