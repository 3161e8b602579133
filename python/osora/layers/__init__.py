# SPDX-License-Identifier: Apache-2.0
"""One adapted linear layer: its base weight, what its method computes, its basis, a batch of several, and merging."""

from osora.layers.adapted import AdaptedLinear
from osora.layers.linears import OsoraLinear, SorsaLinear

__all__ = ["AdaptedLinear", "OsoraLinear", "SorsaLinear"]
