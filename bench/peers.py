# SPDX-License-Identifier: Apache-2.0
"""The models that bench/step.py compares: one base, six ways to train it, all sharing the base's weights."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers import OsoraLinear

PEERS = ("frozen", "osora", "together", "op-by-op", "vera", "lora")
USUAL = tuple(name for name in PEERS if name != "together")
ABOUT = {
    "frozen": "no adapter",
    "osora": "osora",
    "together": "osora, layers together",
    "op-by-op": "plain torch, op by op",
    "vera": "PEFT VeRA",
    "lora": "PEFT LoRA",
}


class OpByOpLinear(nn.Module):
    """OSoRA as its paper writes it, in plain torch: ``y = x W_resᵀ + bias + O ⊙ (((x V) ⊙ S) Uᵀ)``.

    The function of the OsoraLinear it is made from, and the same arithmetic but for one product less in the backward
    (dS and dO need no ``dyᵀ h``), for which autograd keeps an [n, d] tensor.
    """

    def __init__(self, layer: OsoraLinear) -> None:
        super().__init__()
        exact = layer.S0.dtype
        kept = (layer.U.to(exact) * layer.S0) @ layer.V.to(exact).t()
        base: Tensor = layer.base_layer.weight  # type: ignore[assignment]
        self.residual = nn.Parameter((base.to(exact) - kept).to(base.dtype), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("U", layer.U)
        self.register_buffer("V", layer.V)
        self.O = nn.Parameter(1 + layer.o.detach())
        self.S = nn.Parameter(layer.S0 + layer.s.detach())

    def forward(self, x: Tensor) -> Tensor:
        branch = ((x @ self.V) * self.S.to(x.dtype)) @ self.U.t()
        return nn.functional.linear(x, self.residual, self.bias) + self.O.to(x.dtype) * branch


@dataclass
class Peer:
    """A model to train, and what is trained in it."""

    model: nn.Module
    trained: list[nn.Parameter]


def shared(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def needs_input_gradient(model: nn.Module) -> nn.Module:
    """The first linear layers get an input that wants a gradient, as all later ones do, in every peer alike."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def make_osora(base: nn.Module, rank: int, seed: int) -> Peer:
    """Attached, with o and s at small random values: at zero, half of the arithmetic could hide."""
    model = osora.attach(needs_input_gradient(shared(base)), osora.OsoraConfig(r=rank, seed=seed), progress=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.o.copy_(0.02 * torch.randn(layer.o.shape, generator=generator))
            layer.s.copy_(0.02 * torch.randn(layer.s.shape, generator=generator).to(layer.S0) * layer.S0)
    return Peer(model, osora.adapter_parameters(model))


def make_together(adapted: nn.Module) -> Peer:
    """The same adapter, whose layers work together in each forward of the model."""
    model = osora.set_execution(shared(adapted), "split", together=True)
    return Peer(model, osora.adapter_parameters(model))


def make_op_by_op(adapted: nn.Module) -> Peer:
    """The same function as a model with an osora adapter, which stays as it is."""
    model = shared(adapted)
    trained = []
    for name, layer in adapted_layers(model).items():
        twin = OpByOpLinear(layer)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, twin)
        trained += [twin.O, twin.S]
    return Peer(model, trained)


def peft_config(kind: str, rank: int, targets: str | list[str]) -> Any:
    """Of PEFT's VeRA or LoRA, without dropout; LoRA's scale is 1."""
    from peft import LoraConfig, VeraConfig

    if kind == "vera":
        return VeraConfig(r=rank, target_modules=targets, vera_dropout=0.0)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0)


def make_peft(base: nn.Module, kind: str, rank: int, float32: bool) -> Peer:
    """PEFT's VeRA or LoRA; `float32`: its own default, float32 adapters around a 16-bit base."""
    from peft import get_peft_model

    config = peft_config(kind, rank, "all-linear")
    model = get_peft_model(needs_input_gradient(shared(base)), config, autocast_adapter_dtype=float32)
    return Peer(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def make(names: list[str], base: nn.Module, rank: int, seed: int, peft_float32: bool) -> dict[str, Peer]:
    """The peers named."""
    made: dict[str, Peer] = {}
    adapted = make_osora(base, rank, seed) if {"osora", "together", "op-by-op"} & set(names) else None
    for name in names:
        if name == "frozen":
            made[name] = Peer(needs_input_gradient(shared(base)), [])
        elif name == "osora":
            made[name] = adapted
        elif name == "together":
            made[name] = make_together(adapted.model)
        elif name == "op-by-op":
            made[name] = make_op_by_op(adapted.model)
        else:
            made[name] = make_peft(base, name, rank, peft_float32)
    return made
