# SPDX-License-Identifier: Apache-2.0
"""Models with bitsandbytes' layers, and their twins in float32 on the very weights that the codes stand for."""

import copy

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor, nn

import osora
from osora.layers.base_weight import dense_weight, is_quantised
from osora.layers.quantised import keep_order

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS = ("nf4", "fp4", "int8")


def replace_linears(model: nn.Module, make) -> nn.Module:
    """Every linear layer but the output head."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                setattr(parent, name, make(module))
    return model


def quantised_linear(linear: nn.Module, kind: str, **options) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, **({"threshold": 6.0} | options))
    else:
        layer = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type=kind, **options)
    layer.weight.data = linear.weight.detach().clone()
    if bias:
        layer.bias.data = linear.bias.detach().clone()
    return layer.to("cpu").requires_grad_(False).train(linear.training)


def quantised_llama(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """In sizes that bitsandbytes can pack for a CPU: rows a multiple of 32, columns of a block."""
    model = tiny_llama(dtype=dtype, hidden_size=64, intermediate_size=128)
    return replace_linears(model, lambda linear: quantised_linear(linear, kind, **options))


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with plain linear layers that hold what the codes stand for, in float32."""

    def make(layer: nn.Module) -> nn.Module:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = dense_weight(layer).clone()
        if layer.bias is not None:
            plain.bias.data = layer.bias.detach().float()
        return plain

    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, module in list(parent.named_children()):
            if is_quantised(module):
                setattr(parent, name, make(module))
    return twin.float().train(model.training)


every_kind = pytest.mark.parametrize("kind", KINDS)


CONFIGS = {"osora": osora.OsoraConfig, "sorsa": osora.SorsaConfig}


every_method = pytest.mark.parametrize("method", CONFIGS)


def storages(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Address and bytes of every quantised weight."""
    layers = {n: m for n, m in model.named_modules() if is_quantised(m)}
    return {
        name.removesuffix(".base_layer"): (m.weight.data_ptr(), m.weight.data.view(torch.uint8).clone())
        for name, m in layers.items()
    }


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    now = storages(model)
    assert now.keys() == before.keys() and now
    for name, (address, bits) in now.items():
        assert address == before[name][0] and torch.equal(bits, before[name][1]), name


def unpacked(model: nn.Module) -> nn.Module:
    """As an adapter keeps it: bitsandbytes would round the scales of 4-bit weights in the first evaluation on a CPU."""
    keep_order(model)
    return model


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def packs() -> bool:
    import bitsandbytes

    return bool(bitsandbytes.functional.has_avx512bf16())
