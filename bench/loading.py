# SPDX-License-Identifier: Apache-2.0
"""A benchmark's model, with the singular triplets of its layers where they are known.

``llama3-8b-layers`` has two blocks in the shapes of Llama-3-8B. Its fourteen linears are matrices of spectra.py, each
of its own seed: known singular vectors, and the singular values of a SmolLM2 layer (the stored points, so that they
are the same everywhere), stretched to 4096 of them (1024 for k and v). The query's for q, k, v and o, the gate's for
gate and up, the down's for down.
"""

from typing import Any

import models
import spectra
import torch
from spectra import Truth

LLAMA_SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_BLOCKS = 2
LLAMA_SPECTRA = {
    **{f"self_attn.{which}_proj": "query" for which in "qkvo"},
    **{"mlp.gate_proj": "gate", "mlp.up_proj": "gate", "mlp.down_proj": "down"},
}
LLAMA_SCALE = 1  # what every width is divided by: not 1 in tests alone


def _llama(dtype: str, device: str, layers: int | None, rank: int) -> tuple[torch.nn.Module, dict[str, Truth]]:
    """The two blocks, and the first `rank` triplets of each of their linears by name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: size if name.startswith("num") else size // LLAMA_SCALE for name, size in LLAMA_SHAPE.items()}
    blocks = LLAMA_BLOCKS if layers is None else len(range(LLAMA_BLOCKS)[:layers])
    config = LlamaConfig(**shape, num_hidden_layers=blocks, vocab_size=128, tie_word_embeddings=True)
    with torch.device("meta"):  # the linears get their weights below, everything else here
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(128, config.hidden_size, generator=generator) * config.initializer_range
    model.model.embed_tokens.weight = torch.nn.Parameter(embeddings.to(models.DTYPES[dtype]))
    model.tie_weights()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight = torch.nn.Parameter(torch.ones_like(module.weight, dtype=models.DTYPES[dtype], device="cpu"))
    source, truth = spectra.Source("stored"), {}
    for number, block in enumerate(model.model.layers):
        for index, (which, kind) in enumerate(LLAMA_SPECTRA.items()):
            linear = block.get_submodule(which)
            d, k = linear.weight.shape
            seed = len(LLAMA_SPECTRA) * number + index
            made = spectra.make(kind, d, k, 1, min(rank, d, k), models.DTYPES[dtype], device, seed, source)
            linear.weight = torch.nn.Parameter(made.weight[0], requires_grad=False)
            (truth[f"model.layers.{number}.{which}"],) = made.truth
    return model, truth


def load_known(
    which: str, dtype: str, device: str, layers: int | None, rank: int
) -> tuple[torch.nn.Module, dict[str, Truth]]:
    """As `load`, with the first `rank` triplets of the layers whose triplets are known, by name, on the device."""
    if which != models.LLAMA:
        return models.load_stored(which, dtype, device, layers), {}
    model, truth = _llama(dtype, device, layers, rank)
    return model.to(device).eval().requires_grad_(False), truth


def load(which: str, dtype: str, device: str, layers: int | None = None) -> torch.nn.Module:
    """The model in evaluation mode, every parameter frozen; Refused with the cure where it cannot be had."""
    return load_known(which, dtype, device, layers, 1)[0]
