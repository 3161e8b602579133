# SPDX-License-Identifier: Apache-2.0
"""Adapters combined into a new one, where a sum of changes is a change of the same kind."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from osora.peft.layer import AdapterLayer


def combine(
    model: nn.Module, configs: dict[str, Any], adapters: Sequence[str], weights: Sequence[float], name: str
) -> Any:
    """Give the layers of OSoRA ``adapters`` one more, ``name``, with the weighted sums of their o and s; its config.

    D is ``U (o S0 + s + o s)``, so ΔW is the weighted sum of theirs but for the products ``o s``, which are of second
    order in what was trained. That needs one basis and one rank: o scales as many triplets as its adapter has.

    Raises:
        ValueError: the adapters' bases differ in a layer, or their layers or formulas do.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and any(a in m.adapters for a in adapters)]
    plan = []
    for layer in layers:
        here = [each for each in adapters if each in layer.adapters]
        layer.settle()
        groups = {first: names for first, names in layer.widest().items() if set(here) & set(names)}
        formulas = {layer.adapters[each].formula for each in here}
        ranks = {layer.box("S0")[each].numel() for each in here}
        if len(here) != len(adapters) or not len(groups) == len(formulas) == len(ranks) == 1:
            raise ValueError(
                f"{layer.name}: the adapters {', '.join(adapters)} are not all here, of one kind, in one basis and "
                "of one rank, and a weighted sum of others is no adapter: make all of them active instead "
                "(model.base_model.set_adapter([...])), which adds their changes exactly"
            )
        plan.append((layer, here[0]))
    for layer, first in plan:
        old = layer.adapters[first]
        layer.add(name, copy.copy(old), layer.box("S0")[first].numel())
        layer.put_basis(name, layer.basis(first))
        with torch.no_grad():
            for each, weight in zip(adapters, weights, strict=True):
                for total, part in zip(layer.deltas(name), layer.deltas(each), strict=True):
                    total.add_(part, alpha=weight)
        layer.set_requires_grad(name, False)
    return copy.deepcopy(configs[adapters[0]])


__all__ = ["combine"]
