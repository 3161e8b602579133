# SPDX-License-Identifier: Apache-2.0
"""Trainable numbers of real models, built on the meta device, against the closed forms of the papers."""

from collections.abc import Callable

import pytest
import torch
from helpers import move_adapter, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

import osora
from osora import OsoraConfig, SorsaConfig

# Published shapes: hidden, intermediate, layers, heads, key-value heads, size of a head.
MODELS = {
    "Llama-2-7B": ("Llama", 4096, 11008, 32, 32, 32, 128),
    "Mistral-7B": ("Mistral", 4096, 14336, 32, 32, 8, 128),
    "Qwen2-7B": ("Qwen2", 3584, 18944, 28, 28, 4, 128),
    "Gemma-7B": ("Gemma", 3072, 24576, 28, 16, 16, 256),
}
# What a table of the papers, or Σ (d + min(r, d, k)) over all seven linears and over q and v alone, comes to.
OSORA = {
    "Llama-2-7B": {16: (1_363_456, 263_168), 128: (1_388_544, 270_336), 1024: (1_589_248, 327_680)},
    "Mistral-7B": {16: (1_379_840, 164_864), 128: (1_404_928, 172_032), 1024: (1_605_632, 229_376)},
    "Qwen2-7B": {16: (1_393_728, 115_584), 512: (1_490_944, 143_360), 1024: (1_562_624, 157_696)},
    "Gemma-7B": {16: (1_895_488, None), 256: (1_942_528, None), 1024: (2_093_056, None)},
}
# Σ r (d + k + 1); SORSA's paper says 320M, 168M and 200M.
SORSA = {"Llama-2-7B": (128, 319_844_352), "Mistral-7B": (64, 167_786_496), "Gemma-7B": (64, 200_028_416)}


@pytest.fixture(scope="module")
def built() -> Callable[[str], nn.Module]:
    transformers = pytest.importorskip("transformers")
    models: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in models:
            kind, hidden, inner, layers, heads, kv, head = MODELS[name]
            config = getattr(transformers, f"{kind}Config")(
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                head_dim=head,
            )
            with torch.device("meta"):
                models[name] = getattr(transformers, f"{kind}ForCausalLM")(config)
        return models[name]

    return build


@pytest.mark.parametrize("name, r", [(name, r) for name, ranks in OSORA.items() for r in ranks])
def test_osora(built, name, r):
    model, (all_linear, q_and_v) = built(name), OSORA[name][r]
    count = osora.count_parameters(model, OsoraConfig(r=r))
    assert count.trainable == all_linear and len(count.modules) == 7 * MODELS[name][3]
    parts = [osora.count_parameters(model, OsoraConfig(r=r, train=train)).trainable for train in "os"]
    assert sum(parts) == all_linear and parts[1] == sum(min(r, *module.shape) for module in count.modules)
    if q_and_v is not None:
        some = osora.count_parameters(model, OsoraConfig(r=r, target_modules=["q_proj", "v_proj"]))
        assert some.trainable == q_and_v


@pytest.mark.parametrize("name", SORSA)
def test_sorsa(built, name):
    r, wish = SORSA[name]
    count = osora.count_parameters(built(name), SorsaConfig(r=r))
    assert count.trainable == wish and count.basis == wish, "as many as U, V and S0 have"


def test_the_slope_of_qwen2(built):
    """1,390,592 + 196 r up to 512, where k and v have no more to give; SORSA's is LoRA's 2,523,136 and one a layer."""
    for r in (1, 100, 512):
        assert osora.count_parameters(built("Qwen2-7B"), OsoraConfig(r=r)).trainable == 1_390_592 + 196 * r
        sorsa = osora.count_parameters(built("Qwen2-7B"), SorsaConfig(r=r))
        assert sorsa.trainable == (2_523_136 + 196) * r
    count = osora.count_parameters(built("Qwen2-7B"), OsoraConfig(r=1024))
    clipped = [module for module in count.modules if module.note]
    assert len(clipped) == 56 and {m.rank for m in clipped} == {512} and "rank 1024 clipped to 512" in clipped[0].note


def test_the_readme_s_number(built):
    assert osora.count_parameters(built("Llama-2-7B"), OsoraConfig(r=64)).trainable == 1_374_208
    assert osora.count_parameters(built("Llama-2-7B")).total == 6_738_415_616


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
@pytest.mark.parametrize(
    "config",
    [
        OsoraConfig(r=6),
        OsoraConfig(r=200, side="input"),
        OsoraConfig(r=6, train="o", side="input"),
        OsoraConfig(r=6, train="s"),
        SorsaConfig(r=6, exclude_modules=["q_proj", "c_attn", "query", "decoder"]),
    ],
    ids=["osora", "input side", "o alone, input side", "s alone", "sorsa"],
)
def test_it_says_what_attach_does(make, config):
    if make is tiny_bert and not config.exclude_modules:
        config = type(config)(**(config.to_dict() | {"exclude_modules": ["decoder"]}))
    with torch.device("meta"):
        count = osora.count_parameters(make(), config)
    model = move_adapter(osora.attach(make(), config))
    summary = osora.summary(model)
    assert (count.trainable, count.total) == (summary.trainable, summary.total)
    seen = [(m.name, m.shape, m.rank, m.trainable, m.note) for m in summary.modules]
    assert [(m.name, m.shape, m.rank, m.trainable, m.note) for m in count.modules] == seen
    assert count.basis == sum(r * (d + k + 1) for _, (d, k), r, _, _ in seen)
    assert osora.count_parameters(model, config) == count, "of a model that has an adapter, its base"


def test_rank_for_energy_is_counted_as_the_most():
    config = OsoraConfig(r=6, rank_for_energy=0.3)
    model = tiny_llama()
    most = osora.count_parameters(model, config).trainable
    assert most == osora.count_parameters(model, OsoraConfig(r=6)).trainable
    assert most > osora.summary(osora.attach(model, config)).trainable


def test_attach_needs_values_and_says_who_does_not():
    with pytest.raises(ValueError, match=r"meta device .*osora\.count_parameters"):
        osora.attach(tiny_llama().to("meta"))


def test_wrong_calls():
    with pytest.raises(TypeError, match="config must be an OsoraConfig or a SorsaConfig, got int"):
        osora.count_parameters(tiny_llama(), 3)
    with pytest.raises(ValueError, match="no module matches"):
        osora.count_parameters(tiny_llama(), OsoraConfig(target_modules=["nobody"]))
