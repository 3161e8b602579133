# SPDX-License-Identifier: Apache-2.0
"""One adapted layer to try things on."""

import torch
from torch import nn

from osora.layers import OsoraLinear
from osora.layers.base_weight import oriented_weight
from osora.svd.truncated import decompose


def make_layer(k: int = 12, d: int = 10, r: int = 4, dtype: torch.dtype = torch.float32, **options) -> OsoraLinear:
    base = nn.Linear(k, d, dtype=dtype).requires_grad_(False)  # as attach() does
    (factors,) = decompose([oriented_weight(base)], r, names=["layer"])
    return OsoraLinear(base, factors, **options)


def moved(layer: OsoraLinear, step: float = 0.1) -> OsoraLinear:
    with torch.no_grad():
        layer.o.normal_(std=step)
        layer.s.normal_(std=step)
    return layer
