# SPDX-License-Identifier: Apache-2.0
"""The layer of each method, with the names that PEFT looks for."""

from osora.peft.layer import AdapterLayer


class OsoraLinear(AdapterLayer):
    """With OSoRA adapters: ``ΔW = D Vᵀ``, ``D = U ⊙ (o (S0 + s) + s)``."""

    method = "osora"
    trained = ("o", "s")
    adapter_layer_names = ("osora_o", "osora_s")
    other_param_names = ("osora_S0", "osora_U", "osora_V")


class SorsaLinear(AdapterLayer):
    """With SORSA adapters: ``ΔW = U diag(S) Vᵀ − U0 diag(S0) V0ᵀ``; trained are u, s and v, the changes."""

    method = "sorsa"
    trained = ("u", "s", "v")
    adapter_layer_names = ("sorsa_u", "sorsa_s", "sorsa_v")
    other_param_names = ("sorsa_S0", "sorsa_U", "sorsa_V")


__all__ = ["OsoraLinear", "SorsaLinear"]
