# SPDX-License-Identifier: Apache-2.0
"""What a layer of PEFT's form is made of: modules for trained tensors, and what it knows of each adapter."""

from dataclasses import dataclass

from torch import Tensor, nn

from osora.files.format import Description
from osora.layers.formulas import Formula
from osora.svd.certificate import Certificate


class Delta(nn.Module):
    """One trained tensor. A module of its own, with a ``weight``, because TRL and FSDP look for adapters as such."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


_NONE_YET = Certificate(0.0, 0, True, "")


@dataclass
class Adapter:
    """What a layer knows of one of its adapters beside its tensors."""

    formula: Formula
    dropout: float
    save_basis: bool
    tol: float
    certificate: Certificate = _NONE_YET
    awaited: Description | None = None  # of a file, until its tensors have come and been checked
    rebuilt: bool = False  # whether the basis was computed again for them
