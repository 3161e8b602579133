# SPDX-License-Identifier: Apache-2.0
"""Tiny models of random weights of many families of transformers, and what to run of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
WAVE = torch.randn(1, 800, generator=torch.Generator().manual_seed(1))
MEL = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _hidden(output: Any) -> Tensor:
    """What a model without a head gives: its states, and what its pooler makes of them."""
    pooled = getattr(output, "pooler_output", None)
    states: Tensor = output.last_hidden_state
    return states if pooled is None else torch.cat([states.flatten(1), pooled], 1)


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().eval()


def _made(model: str, config: str, options: dict[str, Any], run: Callable[[nn.Module], Tensor]) -> Family:
    def make() -> nn.Module:
        built = getattr(transformers, config)(**options)
        return getattr(transformers, model)(built)

    return Family(make, run)


def _causal(kind: str, **more: Any) -> Family:
    return _made(f"{kind}ForCausalLM", f"{kind}Config", COMMON | more, lambda m: m(IDS).logits)


def _encoder(kind: str, **more: Any) -> Family:
    return _made(f"{kind}Model", f"{kind}Config", COMMON | more, lambda m: _hidden(m(IDS)))


def _vision(kind: str, **more: Any) -> Family:
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"image_size": 16, "patch_size": 8} | more
    return _made(f"{kind}Model", f"{kind}Config", options, lambda m: _hidden(m(IMAGE)))


def _speech(kind: str) -> Family:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    options |= {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    options |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
    options |= {"layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return _made(f"{kind}Model", f"{kind}Config", options, lambda m: m(WAVE).last_hidden_state)


def _seq2seq(kind: str, **more: Any) -> Family:
    return _made(f"{kind}Model", f"{kind}Config", more, lambda m: m(IDS, decoder_input_ids=IDS).last_hidden_state)


_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_STATES = {"state_size": 4}
_JAMBA = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
_LLAMA4 = {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
_MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 16}

FAMILIES: dict[str, Family] = {
    "Llama": _causal("Llama", **GROUPED),
    "Llama, tied": _causal("Llama", **GROUPED, tie_word_embeddings=True),
    "Mistral": _causal("Mistral", **GROUPED),
    "Qwen2": _causal("Qwen2", **GROUPED),
    "Qwen3": _causal("Qwen3", **GROUPED, head_dim=8),
    "Gemma": _causal("Gemma", **GROUPED, head_dim=8),
    "Gemma2": _causal("Gemma2", **GROUPED, head_dim=8),
    "Phi": _causal("Phi"),
    "Phi3": _causal("Phi3", **GROUPED),
    "StableLm": _causal("StableLm", **GROUPED),
    "Cohere": _causal("Cohere", **GROUPED),
    "Granite": _causal("Granite", **GROUPED),
    "Olmo": _causal("Olmo", **GROUPED),
    "Olmo2": _causal("Olmo2", **GROUPED),
    "SmolLM3": _causal("SmolLM3", **GROUPED),
    "Glm": _causal("Glm", **GROUPED, head_dim=8),
    "Starcoder2": _causal("Starcoder2", **GROUPED),
    "GPTNeoX": _causal("GPTNeoX"),
    "OPT": _causal("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "GPT2": _made("GPT2LMHeadModel", "GPT2Config", _GPT2, lambda m: m(IDS).logits),
    "GPTJ": _made("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}, lambda m: m(IDS).logits),
    "Bloom": _causal("Bloom", n_layer=2, n_head=4),
    "Bloom, slow but exact": _causal("Bloom", n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True),
    "Mixtral": _causal("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": _causal("Qwen2Moe", **GROUPED, **EXPERTS, shared_expert_intermediate_size=16),
    "Qwen3Moe": _causal("Qwen3Moe", **GROUPED, **EXPERTS, head_dim=8),
    "Olmoe": _causal("Olmoe", num_key_value_heads=4, num_experts=4, num_experts_per_tok=2),
    "DeepseekV3": _causal("DeepseekV3", **_MLA, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1),
    "Mamba": _causal("Mamba", **_STATES),
    "Mamba2": _causal("Mamba2", **_STATES, num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    "FalconMamba": _causal("FalconMamba", **_STATES),
    "Jamba": _causal("Jamba", **GROUPED, **_JAMBA),
    "Rwkv": _causal("Rwkv", attention_hidden_size=32, rescale_every=2, context_length=32, tie_word_embeddings=False),
    "Falcon": _causal("Falcon", bias=True),
    "Llama4": _made("Llama4ForCausalLM", "Llama4TextConfig", COMMON | GROUPED | _LLAMA4, lambda m: m(IDS).logits),
    "Bert": _encoder("Bert"),
    "Roberta": _encoder("Roberta"),
    "DistilBert": _encoder("DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "Electra": _encoder("Electra", embedding_size=16),
    "Albert": _encoder("Albert", embedding_size=16),
    "Deberta": _encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "DebertaV2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "MobileBert": _encoder("MobileBert", **_MOBILE),
    "Bart": _seq2seq("Bart", **_BART),
    "Pegasus": _seq2seq("Pegasus", **_BART),
    "T5": _seq2seq("T5", **_T5, decoder_start_token_id=0),
    "Whisper": _made(
        "WhisperModel",
        "WhisperConfig",
        _BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
        lambda m: m(MEL, decoder_input_ids=IDS[:1]).last_hidden_state,
    ),
    "ViT": _vision("ViT"),
    "DeiT": _vision("DeiT"),
    "Dinov2": _vision("Dinov2"),
    "CLIP vision": _vision("CLIPVision"),
    "Siglip vision": _vision("SiglipVision"),
    "Wav2Vec2": _speech("Wav2Vec2"),
    "Hubert": _speech("Hubert"),
    "WavLM": _speech("WavLM"),
}
