# SPDX-License-Identifier: Apache-2.0
"""OSoRA as a method of PEFT: an adapter's life in a model, and that it is the native layer's function."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import logits, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from peft import PeftConfig, get_peft_model
from pefts import OsoraConfig, adapted, layers, move, peft, quiet, tensors
from torch import nn

import osora
from osora import adapted_layers
from osora import config as native
from osora.layers.base_weight import dense_weight, oriented_weight

PEFT = tuple(map(int, peft.__version__.split(".")[:2]))
pytestmark = quiet
every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])


# -- what it computes ------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_untrained_adapter_is_the_base_model(make, dtype):
    ids = token_ids()
    model = make(dtype=dtype)
    wish = logits(model, ids)
    model = get_peft_model(model, OsoraConfig(r=4))
    assert torch.equal(logits(model, ids), wish)


@every_model
def test_the_same_bits_as_the_native_api(make):
    """The factors by the same seed and names, the forward, the gradients, and the merged weights."""
    own = osora.attach(make(), osora.OsoraConfig(r=4, seed=3, rank_pattern={r".*\.0\..*": 3}))
    model = get_peft_model(make(), OsoraConfig(r=4, seed=3, rank_pattern={r".*\.0\..*": 3}))
    native_layers, ids = adapted_layers(own), token_ids()
    assert [layer.name for layer in layers(model)] == list(native_layers)
    for layer in layers(model):
        twin = native_layers[layer.name]
        for a, b in zip(layer.basis("default"), twin.basis(), strict=True):
            assert torch.equal(a, b), layer.name
        with torch.no_grad():
            for a, b in zip(layer.deltas("default"), twin.deltas("default"), strict=True):
                b.copy_(a.normal_(std=0.1))
    results = []
    for net in (own, model):
        out = net(ids).logits
        out.square().mean().backward()
        results.append(out.detach())
    assert torch.equal(*results)
    for layer in layers(model):
        pairs = zip(layer.deltas("default"), native_layers[layer.name].deltas("default"), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs), layer.name
    osora.merge(own)
    model.merge_adapter()
    for layer in layers(model):
        assert torch.equal(layer.base_layer.weight, native_layers[layer.name].base_layer.weight)


def test_what_is_trained():
    """Two vectors a layer in float32, nothing else, and their number is the closed form."""
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), OsoraConfig(r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        f"base_model.model.{layer.name}.osora_{kind}.default.weight" for layer in layers(model) for kind in "os"
    }
    assert set(trained) == expected and len(layers(model)) == 14
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(p.numel() for p in trained.values()) == sum(layer.out_features + 4 for layer in layers(model))
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained.values())


def test_training_moves_the_adapter_alone():
    model, ids = get_peft_model(tiny_llama(), OsoraConfig(r=4, dropout=0.1)).train(), token_ids()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_dropout_is_on_the_branch_alone():
    model, ids = adapted(dropout=0.5), token_ids()
    still = logits(model, ids)
    assert torch.equal(still, logits(model, ids))
    assert not torch.equal(logits(model.train(), ids), still)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))


# -- which layers ----------------------------------------------------------------------------------------------------

Q = "self_attn.q_proj"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 14),
        ({"target_modules": None}, 14),
        ({"target_modules": "ALL-LINEAR"}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.1\..*_proj"}, 7),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, 1),
        ({"layers_to_transform": [0]}, 7),
        ({"layers_to_transform": 1, "exclude_modules": ["down_proj"]}, 6),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": [1]}, 1),
        ({"target_modules": [f"model.layers.{i}.{Q}" for i in (0, 1)], "layers_to_transform": [0]}, 1),
        ({"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]}, 7),
    ],
    ids=str,
)
def test_targets(options, expected):
    """And the native API has the same, for the options that both have; PEFT's alone are written in any case."""
    model = get_peft_model(tiny_llama(), OsoraConfig(r=2, **options))
    assert len(layers(model)) == expected
    shared = {name: value for name, value in options.items() if name != "layers_pattern" and value is not None}
    if shared.get("target_modules") == "ALL-LINEAR":
        del shared["target_modules"]
    own = osora.attach(tiny_llama(), osora.OsoraConfig(r=2, **shared))
    assert [layer.name for layer in layers(model)] == list(adapted_layers(own))


def test_a_rank_for_nothing_is_refused():
    """In the native API's words; PEFT warns, from 0.21 on."""
    model = tiny_llama()
    before = [id(module) for module in model.modules()]
    with pytest.warns(RuntimeWarning) if PEFT >= (0, 21) else nullcontext():
        with pytest.raises(ValueError, match=r"rank_pattern 'q_porj' matches no target, the first of which is model"):
            get_peft_model(model, OsoraConfig(r=2, rank_pattern={"q_porj": 3}))
    assert [id(module) for module in model.modules()] == before


def test_ranks():
    model = get_peft_model(tiny_llama(), OsoraConfig(r=100, rank_pattern={"q_proj": 3, r"layers\.1\.mlp.up_proj": 7}))
    ranks = {layer.name: layer.box("S0")["default"].numel() for layer in layers(model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3 and ranks["model.layers.1.mlp.up_proj"] == 7
    assert ranks["model.layers.0.self_attn.k_proj"] == 16 and ranks["model.layers.0.mlp.up_proj"] == 32  # clipped


def test_ranks_by_energy():
    own = osora.attach(tiny_llama(), osora.OsoraConfig(r=16, rank_for_energy=0.6))
    model = get_peft_model(tiny_llama(), OsoraConfig(r=16, rank_for_energy=0.6))
    ranks = {layer.name: layer.box("s")["default"].weight.numel() for layer in layers(model)}
    assert ranks == {name: layer.rank for name, layer in adapted_layers(own).items()} and len(set(ranks.values())) > 2
    assert all(p.requires_grad for layer in layers(model) for p in layer.deltas("default"))


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def test_a_model_that_is_not_of_transformers(tmp_path):
    model, x = adapted(Plain, r=3), torch.randn(4, 6)
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(Plain(), tmp_path)
    assert torch.equal(other(x), model(x)) and not torch.equal(Plain()(x), model(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first


def with_(name: str, module: nn.Module) -> nn.Module:
    model = Plain()
    model.add_module(name, module)
    return model


def tiny_rwkv() -> nn.Module:
    config = transformers.RwkvConfig(
        vocab_size=16, hidden_size=8, attention_hidden_size=8, intermediate_size=12, num_hidden_layers=2
    )
    return transformers.RwkvModel(config)


@pytest.mark.parametrize(
    "make, targets, words",
    [
        (tiny_llama, ["embed_tokens"], r"embed_tokens is a .*Embedding; osora adapts torch.nn.Linear and"),
        (
            lambda: with_("experts", Experts()),
            ["first", "experts"],
            r"experts is a Experts, whose weights have more than",
        ),
        (lambda: with_("conv", nn.Conv1d(4, 4, 3)), ["first", "conv"], "conv is a Conv1d, whose weights have more"),
        (tiny_llama, ["lm_head"], "weight of lm_head is tied"),
        (lambda: with_("twice", Shared()), ["twice.first"], "twice.first is also in the model as twice.second"),
        (tiny_rwkv, ["value"], "the model rescales the weight of .*feed_forward.value in place"),
        (tiny_llama, ["no_such"], "not found"),
        (lambda: tiny_llama().to("meta"), ["q_proj"], "is on the meta device and has no values"),
    ],
    ids=["embedding", "experts", "convolution", "tied", "shared", "rewritten", "nothing", "meta"],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning")
def test_a_refusal_leaves_the_model_as_it_was(make, targets, words):
    model = make()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, OsoraConfig(r=2, target_modules=targets))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


def test_a_weight_that_cannot_be_decomposed_leaves_the_model_as_it_was():
    """The last of its layers, when all of them have been wrapped."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = float("nan")
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has NaN or infinite entries"):
        get_peft_model(model, OsoraConfig(r=2))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "bad, error",
    [
        ({"r": 0}, "r must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"tol": -1.0}, "tol must be positive"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"bias": "lora_only"}, 'bias must be "none", "all" or "osora_only"'),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"save_basis": 1}, "save_basis must be True or False"),
    ],
    ids=str,
)
def test_bad_options(bad, error):
    with pytest.raises((TypeError, ValueError), match=error):
        OsoraConfig(**bad)


def test_the_options_are_those_of_the_native_config():
    config = OsoraConfig(r=3, target_modules=["b", "a"], exclude_modules="c.*", rank_pattern={"a": 2}, seed=5)
    assert config.native() == native.OsoraConfig(
        r=3, target_modules=["a", "b"], exclude_modules="c.*", rank_pattern={"a": 2}, seed=5
    )
    assert OsoraConfig().native() == native.OsoraConfig()
    assert set(native.OsoraConfig().to_dict()) <= set(OsoraConfig().to_dict())


# -- the base model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_model
def test_the_base_model_is_never_lost(make, dtype):
    """After second and third adapters, disabling, merging ten times, and unloading: the very tensors and bits."""
    model, ids = make(dtype=dtype), token_ids()
    weights = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    wish = logits(model, ids)
    model = move(get_peft_model(model, OsoraConfig(r=4)), step=0.5)
    first = logits(model, ids)
    for name, rank in (("two", 3), ("three", 6)):
        model.add_adapter(name, OsoraConfig(r=rank))
        move(model, name, 0.5)
        assert torch.equal(logits(model, ids), first)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), wish)
    for round_ in range(10):
        model.set_adapter(["default", "two", "three"][round_ % 3])
        own = logits(model, ids)
        model.merge_adapter()
        assert not torch.equal(logits(model, ids), wish)
        if round_ % 2:
            with model.disable_adapter():
                assert torch.equal(logits(model, ids), wish)
        else:
            model.unmerge_adapter()
        assert torch.equal(logits(model, ids), own)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.merge_adapter()
    base = model.unload()
    assert torch.equal(logits(base, ids), wish)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    for name, parameter in base.named_parameters():
        assert parameter.data_ptr() == weights[name][0] and torch.equal(parameter, weights[name][1]), name


@every_model
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload(make, safe):
    model, ids = adapted(make), token_ids()
    wish = logits(model, ids)
    plain = model.merge_and_unload(safe_merge=safe)
    assert not layers(plain) and not hasattr(plain, "peft_config") and type(plain) is type(make())
    torch.testing.assert_close(logits(plain, ids), wish, rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_is_merged_nowhere():
    model, ids = adapted(), token_ids()
    layers(model)[-1].deltas("default")[0].data[2] = float("nan")
    for call in (model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*adapter default seems to be"):
            call()
        assert len(layers(model)) == 14 and not any(layer.merged for layer in layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))


def test_merging_several_at_once_and_one_after_the_other():
    """The sum of all changes, rounded once, whatever the order."""
    model, ids = adapted(dtype_of(torch.bfloat16)), token_ids()
    model.add_adapter("two", OsoraConfig(r=3))
    move(model, "two")
    model.base_model.set_adapter(["default", "two"])
    both = logits(model, ids)
    model.merge_adapter()
    once = [layer.base_layer.weight.clone() for layer in layers(model)]
    for layer in layers(model):
        total = sum(layer.get_delta_weight(name) for name in layer.merged_adapters) + dense_weight(layer.base()).float()
        assert torch.equal(oriented_weight(layer.base_layer), total.bfloat16())
    torch.testing.assert_close(logits(model, ids).float(), both.float(), rtol=0.1, atol=0.1)  # bfloat16, two layers
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="You are now additionally merging two"):
        model.merge_adapter(["two"])
    assert all(torch.equal(a, layer.base_layer.weight) for a, layer in zip(once, layers(model), strict=True))


def dtype_of(dtype: torch.dtype):
    return lambda: tiny_llama(dtype=dtype)


# -- moves, copies ---------------------------------------------------------------------------------------------------


def test_a_cast_rounds_nothing_that_is_trained():
    model = adapted()
    model.add_adapter("two", OsoraConfig(r=3, tol=1e-4))
    before = tensors(model)
    model.to(torch.bfloat16)
    for name, value in tensors(model).items():
        if name.endswith((".U", ".V")):
            assert value.dtype == torch.bfloat16 and torch.equal(value, before[name].bfloat16())
        else:
            assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    for layer in layers(model):
        assert layer.basis("two")[0].data_ptr() == layer.basis("default")[0].data_ptr()
    assert logits(model, token_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype_changes_nothing(autocast):
    with nullcontext() if autocast else pytest.warns(RuntimeWarning, match="autocast_adapter_dtype=False changes"):
        model = get_peft_model(tiny_llama(dtype=torch.bfloat16), OsoraConfig(r=4), autocast_adapter_dtype=autocast)
    for name, value in tensors(model).items():
        assert value.dtype == (torch.bfloat16 if name.endswith((".U", ".V")) else torch.float32), name


def test_copies_are_of_their_own(tmp_path):
    model, ids = adapted(), token_ids()
    wish = logits(model, ids)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    move(model, step=0.5)
    for i, other in enumerate(copies):
        assert torch.equal(logits(other, ids), wish)
        other.save_pretrained(tmp_path / str(i))  # by its own weights, not by the first model's
        back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / str(i))
        assert torch.equal(logits(back, ids), wish)
    config = copy.deepcopy(model.peft_config["default"])
    assert config.home is None and config == model.peft_config["default"]


def test_random_changes_for_tests():
    model, ids = get_peft_model(tiny_llama(), OsoraConfig(r=4, init_weights=False)), token_ids()
    assert not torch.allclose(logits(model, ids), logits(tiny_llama(), ids), atol=0.01)


def test_osora_is_one_of_the_methods():
    assert OsoraConfig().peft_type.value == "OSORA" and peft.PeftType.OSORA == "OSORA"
    assert isinstance(OsoraConfig(), PeftConfig)
    status = peft.tuners.tuners_utils.BaseTunerLayer
    assert all(isinstance(layer, status) for layer in layers(adapted()))
    (found, *_) = adapted().get_layer_status()
    assert found.available_adapters == ["default"] and found.requires_grad == {"default": True}
    summary = adapted().get_model_status()
    assert summary.active_adapters == ["default"] and summary.adapter_model_type == "OsoraModel"
