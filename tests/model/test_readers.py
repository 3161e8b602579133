# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that read weights past their layers: adapted, trained and merged as any other."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn

import osora
import osora.peft

SIZES = {"vocab_size": 64, "hidden_size": 32}
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
WAVE = torch.randn(1, 800, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def wavlm() -> nn.Module:
    # fmt: off
    return tf.WavLMModel(tf.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
        feat_proj_dropout=0.0, activation_dropout=0.0, mask_time_prob=0.0,
    ))


def jamba() -> nn.Module:
    # fmt: off
    return tf.JambaForCausalLM(tf.JambaConfig(
        **SIZES, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=1,
        num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    ))


def mobilebert() -> nn.Module:
    # fmt: off
    return tf.MobileBertForMaskedLM(tf.MobileBertConfig(
        **SIZES, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, embedding_size=16,
        intra_bottleneck_size=16,
    ))


def siglip() -> nn.Module:
    # fmt: off
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
    ))


def bloom() -> nn.Module:
    return tf.BloomForCausalLM(tf.BloomConfig(**SIZES, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True))


def states(kind: str) -> Callable[[], nn.Module]:
    model, config = getattr(tf, f"{kind}ForCausalLM"), getattr(tf, f"{kind}Config")
    more = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4} if kind == "Mamba2" else {}
    return lambda: model(config(**SIZES, state_size=4, num_hidden_layers=2, **more))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "WavLM": (wavlm, lambda m: m(WAVE).last_hidden_state),
    "Mamba": (states("Mamba"), lambda m: m(IDS).logits),
    "Mamba2": (states("Mamba2"), lambda m: m(IDS).logits),
    "FalconMamba": (states("FalconMamba"), lambda m: m(IDS).logits),
    "Jamba": (jamba, lambda m: m(IDS).logits),
    "MobileBERT": (mobilebert, lambda m: m(IDS).logits),
    "BLOOM, slow but exact": (bloom, lambda m: m(IDS).logits),
    "SigLIP": (siglip, lambda m: m(IMAGE).pooler_output),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.filterwarnings("ignore")  # of these models' own
@pytest.mark.parametrize("method", ["Osora", "Sorsa"])
@pytest.mark.parametrize("api", ["native", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_trained_moves_the_output_and_is_merged(family, api, method):
    make, run = FAMILIES[family]
    if family == "SigLIP" and api == "peft":
        pytest.skip("PEFT's all-linear picks the out_proj of torch's MultiheadAttention, and the call is refused")
    base = made(make).eval()
    if api == "native":
        model = osora.attach(made(make), getattr(osora, f"{method}Config")(r=4))
    else:
        model = get_peft_model(made(make), getattr(osora.peft, f"{method}Config")(r=4))
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(model), run(base)), "untrained: the base"
    run(model).float().square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None]
    assert trained and not dead
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        adapted = run(model)
        assert not torch.allclose(adapted, run(base), atol=1e-4)
        osora.merge(model) if api == "native" else model.merge_adapter()
        torch.testing.assert_close(run(model), adapted, rtol=1e-3, atol=2e-5)
        osora.unmerge(model) if api == "native" else model.unmerge_adapter()
        torch.testing.assert_close(run(model), adapted, rtol=0, atol=0)


def rwkv() -> nn.Module:
    # fmt: off
    return tf.RwkvForCausalLM(tf.RwkvConfig(
        **SIZES, attention_hidden_size=32, intermediate_size=48, num_hidden_layers=4, rescale_every=2,
        context_length=32, tie_word_embeddings=False,
    ))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("api", ["native", "peft"])
def test_rwkv_is_the_same_in_training_and_in_evaluation(api, caplog):
    """It divides two of its weights in place between the two: they are left out, in words."""
    config = {"target_modules": "all-linear", "r": 4}
    if api == "native":
        model = osora.attach(made(rwkv), osora.OsoraConfig(**config))
    else:
        model = get_peft_model(made(rwkv), osora.peft.OsoraConfig(**config))
    left_out = {record.args[0] for record in caplog.records if "is left out" in record.getMessage()}
    assert {name.split("blocks.")[1] for name in left_out} == {
        f"{i}.{part}" for i in range(4) for part in ("attention.output", "feed_forward.value")
    }
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
        training, evaluation = (run(IDS).logits for run in (model.train(), model.eval()))
        base = [run(IDS).logits for run in (made(rwkv).train(), made(rwkv).eval())]
    assert not torch.allclose(evaluation, base[1], atol=1e-4)
    difference = (training - evaluation).abs().max()
    assert difference <= 2 * (base[0] - base[1]).abs().max() + 1e-4
