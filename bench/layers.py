# SPDX-License-Identifier: Apache-2.0
"""The layers that bench/linear.py compares: one base weight, an adapter of each kind around it, real modules all."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from torch import Tensor, nn

from osora import reference
from osora.layers import OsoraLinear
from osora.svd.certificate import Decomposition

PEERS = ("frozen", "op-by-op", "vera", "lora", "hand", "osora")
OSORA = ("op-by-op", "hand", "osora")  # those that compute OSoRA, and are compared with float64
ABOUT = {
    "frozen": "frozen linear",
    "op-by-op": "op by op",
    "vera": "PEFT VeRA",
    "lora": "PEFT LoRA",
    "hand": "by hand",
    "osora": "osora",
}


class DeltaForm(torch.autograd.Function):
    """What a patient user writes without an extension: osora's formula, order of products and saved tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [n, k]
        weight: Tensor,
        bias: Tensor | None,
        U: Tensor,
        V: Tensor,
        S0: Tensor,
        s: Tensor,
        o: Tensor,
    ) -> Tensor:
        h, D = x @ V, reference.fold(U, S0, s, o)
        ctx.save_for_backward(h, weight, U, V, S0, s, o)
        y = h @ D.t() if bias is None else torch.addmm(bias, h, D.t())
        return y.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, U, V, S0, s, o = ctx.saved_tensors
        dx = (dy @ reference.fold(U, S0, s, o)) @ V.t()
        dx.addmm_(dy, weight)
        P = (dy.t() @ h).to(S0.dtype)
        ds, do = reference.fold_backward(U, P, S0, s, o)
        return dx, None, None, None, None, None, ds, do


class HandLinear(nn.Module):
    """DeltaForm around the tensors of an OsoraLinear, with an o and an s of its own."""

    def __init__(self, layer: OsoraLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.base_layer.weight, layer.bias
        for name in ("U", "V", "S0"):
            self.register_buffer(name, getattr(layer, name))
        self.o = nn.Parameter(layer.o.detach().clone())
        self.s = nn.Parameter(layer.s.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return DeltaForm.apply(x, self.weight, self.bias, self.U, self.V, self.S0, self.s, self.o)


@dataclass(frozen=True)
class Shape:
    """Of a linear layer."""

    family: str
    d: int
    k: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.d}×{self.k}" + (" and bias" if self.bias else "")


@dataclass
class Basis:
    """A frozen base layer and orthonormal factors as wide as the largest rank."""

    linear: nn.Linear
    U: Tensor
    V: Tensor


def draw(device: str, seed: int) -> Callable[..., Tensor]:
    """Normal float32 numbers of a size, made where they are wanted: a CPU takes seconds for those of a card."""
    where = device if device.startswith("cuda") else "cpu"
    generator = torch.Generator(where).manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator, device=where)


def make_basis(shape: Shape, rank: int, dtype: torch.dtype, device: str, seed: int) -> Basis:
    """Random numbers. The factors are not the weight's own: the arithmetic is the same, and no SVD is needed."""
    random = draw(device, seed)
    linear = nn.utils.skip_init(nn.Linear, shape.k, shape.d, bias=shape.bias, device=device, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random(shape.d, shape.k) / math.sqrt(shape.k))
        if shape.bias:
            linear.bias.copy_(random(shape.d))
    U, V = (torch.linalg.qr(random(size, rank)).Q.to(device, dtype) for size in (shape.d, shape.k))
    return Basis(linear.requires_grad_(False), U, V)


def make_osora(basis: Basis, rank: int, seed: int) -> OsoraLinear:
    """With an update as large as the base's output: a wrong adapter cannot hide behind the base's rounding."""
    generator = torch.Generator().manual_seed(seed)
    size = math.sqrt(basis.U.shape[0] / rank)
    factors = Decomposition(
        "layer", basis.U[:, :rank], size * torch.linspace(2, 1, rank), basis.V[:, :rank], torch.zeros(rank), True, 0, ""
    )
    layer = OsoraLinear(basis.linear, factors)
    with torch.no_grad():
        layer.o.copy_(0.3 * torch.randn(layer.o.shape, generator=generator))
        layer.s.copy_(0.5 * size * torch.randn(rank, generator=generator))
    return layer


def adapter_name(number: int) -> str:
    """Of PEFT's adapters in one layer."""
    return "default" if number == 0 else f"number{number}"


def make_peft(basis: Basis, kind: str, rank: int, adapters: int = 1) -> nn.Module:
    """PEFT's own module, its adapters in the base's dtype, every number of them random."""
    from peft import get_peft_model

    model = nn.ModuleDict({"linear": peers.shared(basis.linear)})
    config = peers.peft_config(kind, rank, ["linear"])
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for number in range(1, adapters):
        wrapped.add_adapter(adapter_name(number), config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model["linear"]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                parameter.normal_(std=0.1)
    return layer


def make(name: str, basis: Basis, rank: int, ours: OsoraLinear | None) -> nn.Module:
    """One peer; `ours` is what the peers that compute OSoRA take their numbers from."""
    if name == "frozen":
        return basis.linear
    if name in ("vera", "lora"):
        return make_peft(basis, name, rank)
    assert ours is not None
    return {"osora": lambda layer: layer, "op-by-op": peers.OpByOpLinear, "hand": HandLinear}[name](ours)


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """For a peer that computes OSoRA: o, then s."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def columns(name: str, d: int, k: int) -> tuple[int, int]:
    """Products beyond the frozen linear's, as a multiple of n·r: in the forward, in forward and backward.

    Every adapter multiplies x by [k, r] and that by [r, d], and again for dx. LoRA's gradients need two products more,
    dyᵀ h and xᵀ (dy B); osora's and the delta form's one, dyᵀ h; the others keep an [n, d] tensor instead.
    """
    if name == "frozen":
        return 0, 0
    return k + d, 2 * (k + d) + {"lora": k + d, "osora": d, "hand": d}.get(name, 0)


def floors(name: str, shape: Shape, rank: int) -> tuple[float, float]:
    """Arithmetic over that of the frozen linear: forward, forward and backward."""
    forward, step = columns(name, shape.d, shape.k)
    return 1 + rank * forward / (shape.d * shape.k), 1 + rank * step / (2 * shape.d * shape.k)
