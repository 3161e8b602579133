# SPDX-License-Identifier: Apache-2.0
"""Several adapters in a PEFT model: one after the other, at once, row by row, combined; and SORSA's."""

import importlib

import pytest
import torch
from helpers import logits, run_python, tiny_gpt2, tiny_llama, token_ids
from packaging.version import Version
from peft import PeftModel, get_peft_model
from pefts import OsoraConfig, adapted, layers, move, peft, quiet, tensors
from saved_adapters import both
from torch import nn

import osora
from osora.peft import SorsaConfig

pytestmark = quiet


def three(make=tiny_llama) -> nn.Module:
    """Two that share a basis, and one of a larger rank that has its own."""
    model = adapted(make, r=6)
    model.add_adapter("small", OsoraConfig(r=3, tol=1e-4, target_modules=r".*\.(q_proj|v_proj|up_proj|c_attn)"))
    model.add_adapter("large", OsoraConfig(r=9, tol=1e-4))
    return move(move(model, "small", 0.2), "large", 0.2)


def alone(model: nn.Module, name: str | list[str], ids: torch.Tensor) -> torch.Tensor:
    model.base_model.set_adapter(name)
    return logits(model, ids)


def test_bases_are_shared_where_they_can_be():
    for layer in layers(three()):
        U = {name: layer.basis(name)[0] for name in layer.adapters}
        assert U["large"].data_ptr() != U["default"].data_ptr()
        assert "small" not in U or U["small"].data_ptr() == U["default"].data_ptr()
        found = osora.truncated_svd(layer.base_layer.weight.detach(), 9, tol=1e-4, name=layer.name)
        assert torch.equal(U["large"], found.U)  # by the seed and the name, beside others as alone


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_each_row_by_its_own_adapter(make):
    model, ids = three(make), token_ids(6, 7)
    names = ["large", "__base__", "default", "small", "default", "large"]
    with torch.no_grad():
        got = model(ids, adapter_names=names).logits
    base = logits(make(), ids)
    for name in ("default", "small", "large"):
        rows = [i for i, row in enumerate(names) if row == name]
        torch.testing.assert_close(got[rows], alone(model, name, ids)[rows], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[rows], base[rows], atol=0.02)
    assert torch.equal(got[1], base[1])
    assert all(layer.batch is None for layer in layers(model))


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}], ids=str)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and:UserWarning")
def test_rows_of_adapters_with_and_without_whole_modules(options):
    make = lambda: tiny_llama(tied=False)  # noqa: E731
    model, ids = adapted(make, **options), torch.tensor([[3, 5, 7]] * 4)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.add_adapter("two", OsoraConfig(r=4, tol=1e-4))
    move(model, "two", 0.2)
    wish = {name: alone(model, name, ids) for name in ("default", "two")} | {"__base__": logits(make(), ids)}
    for active in ("default", "two"):
        model.set_adapter(active)
        for names in (["default", "two", "__base__", "default"], ["two"] * 4, ["default"] * 4):
            with torch.no_grad():
                got = model(ids, adapter_names=names).logits
            for i, name in enumerate(names):
                torch.testing.assert_close(got[i], wish[name][i], rtol=1e-4, atol=1e-4)


def test_generation_with_beams():
    model, ids = three(), token_ids(3, 4)
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    names = ["small", "__base__", "large"]
    with torch.no_grad():
        got = model.generate(input_ids=ids, adapter_names=names, **options)
        for i, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
                assert torch.equal(got[i], model.generate(input_ids=ids[i : i + 1], **options)[0])


def test_a_batch_that_is_refused():
    model, ids = three(), token_ids(2, 5)
    for names, words in (
        (["no", "default"], r"non-existing adapter\(s\): no"),
        (["default"], "has 1 names, and a layer got x of shape"),
    ):
        with pytest.raises(ValueError, match=words), torch.no_grad():
            model(ids, adapter_names=names)
    with pytest.raises(RuntimeError, match=r"run it under torch\.no_grad"):
        model(ids, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="in training mode"), torch.no_grad():
        model.train()(ids, adapter_names=["default"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="while adapters are merged"), torch.no_grad():
        model(ids, adapter_names=["default"] * 2)
    assert all(layer.batch is None for layer in layers(model))


def test_several_active_ones_add_up():
    model, ids = three(), token_ids()
    got = alone(model, ["default", "large"], ids)
    plain = tiny_llama()
    with torch.no_grad():
        for layer in layers(model):
            delta = sum(layer.get_delta_weight(name) for name in ("default", "large"))
            plain.get_submodule(layer.name).weight.add_(delta)
    torch.testing.assert_close(got, logits(plain, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Adapter small was active which is now deleted:UserWarning")
def test_set_and_delete():
    model, ids = three(), token_ids()
    wish = {name: alone(model, name, ids) for name in ("default", "small")}
    model.set_adapter("small")
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"small"}
    model.delete_adapter("large")
    assert torch.equal(logits(model, ids), wish["small"])
    model.delete_adapter("small")
    assert torch.equal(alone(model, "default", ids), wish["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_one_config_for_two_adapters(tmp_path):
    """As TRL makes its reference: each is saved by its own name."""
    model, ids = adapted(), token_ids()
    model.add_adapter("ref", model.peft_config["default"])
    move(model, "ref", 0.3)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("ref", tmp_path / "ref")):
        other = PeftModel.from_pretrained(tiny_llama(), folder)
        assert torch.equal(logits(other, ids), alone(model, name, ids))


def test_weighted_sums():
    model = adapted(r=6)
    model.add_adapter("small", OsoraConfig(r=6, tol=1e-4))
    move(move(model, "default", 1e-3), "small", 1e-3)
    model.add_weighted_adapter(["default", "small"], [0.7, -2.0], "sum")
    for layer in layers(model):
        parts = [layer.get_delta_weight(name) for name in ("default", "small")]
        wish, got = 0.7 * parts[0] - 2 * parts[1], layer.get_delta_weight("sum")
        # what is lost are products of o and s, a thousandth of either
        assert (got - wish).norm() < 0.01 * wish.norm()
        assert not any(p.requires_grad for p in layer.deltas("sum"))
    with pytest.raises(ValueError, match='must be "linear"'):
        model.add_weighted_adapter(["default"], [1.0], "x", "svd")
    for other, rank in (("large", 9), ("less", 3)):  # another basis, another rank
        model.add_adapter(other, OsoraConfig(r=rank))
        with pytest.raises(ValueError, match="a weighted sum of others is no adapter"):
            model.add_weighted_adapter(["default", other], [1.0, 1.0], "x")
    assert "x" not in model.peft_config and all("x" not in layer.adapters for layer in layers(model))


def test_another_method_beside_it_is_refused():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))


# -- transformers' own integration -----------------------------------------------------------------------------------


# transformers 5.24 wants a PEFT that is newer than any which is supported here.
LEAST_PEFT = importlib.import_module("transformers.integrations.peft").MIN_PEFT_VERSION


@pytest.mark.skipif(Version(peft.__version__) < Version(LEAST_PEFT), reason=f"transformers wants PEFT {LEAST_PEFT}")
@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@both
def test_transformers_own_integration(save_basis, tmp_path):
    model, ids = tiny_llama(), token_ids()
    base = logits(model, ids)
    model.add_adapter(OsoraConfig(r=4, tol=1e-4, save_basis=save_basis))
    assert torch.equal(logits(model, ids), base)
    wish = logits(move(model), ids)
    model.save_pretrained(tmp_path / "transformers")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "transformers").save_pretrained(tmp_path / "peft")
    assert torch.equal(logits(osora.load_adapter(tiny_llama(), tmp_path / "transformers"), ids), wish)
    for name in ("transformers", "peft"):
        other = tiny_llama()
        other.load_adapter(str(tmp_path / name), adapter_name="x")
        assert torch.equal(logits(other, ids), wish)
        other.disable_adapters()
        assert torch.equal(logits(other, ids), base)
        other.enable_adapters()
        other.add_adapter(OsoraConfig(r=2), "y")
        other.set_adapter("x")
        assert torch.equal(logits(other, ids), wish)
        other.delete_adapter("y")
        assert torch.equal(logits(other, ids), wish)
    refusing = tiny_llama()
    with pytest.raises(ValueError, match="not found in the base model"):
        refusing.add_adapter(OsoraConfig(r=4, target_modules=["nothing"]))
    refusing.add_adapter(OsoraConfig(r=4))  # nothing is left of the first
    assert torch.equal(logits(refusing, ids), base)
    damaged = tiny_llama()
    damaged.model.layers[0].mlp.up_proj.weight.data[1, 2] += 0.1
    with pytest.raises(osora.AdapterError, match="is not the one this adapter was trained on"):
        damaged.load_adapter(str(tmp_path / "peft"))


# -- SORSA -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_sorsa_both_ways(make, alpha, save_basis, tmp_path):
    ids, base = token_ids(), logits(make(), token_ids())
    model = get_peft_model(make(), SorsaConfig(r=4, tol=1e-4, alpha=alpha, save_basis=save_basis))
    assert torch.equal(logits(model, ids), logits(make(), ids))
    wish = logits(move(model), ids)
    assert base.shape == wish.shape and not torch.allclose(wish, logits(make(), ids), atol=0.02)
    model.save_pretrained(tmp_path / "peft")
    own = osora.load_adapter(make(), tmp_path / "peft")
    assert torch.equal(logits(own, ids), wish)
    osora.save_adapter(own, tmp_path / "native", save_basis=save_basis)
    for low in (False, True):
        other = PeftModel.from_pretrained(make(), tmp_path / "native", low_cpu_mem_usage=low)
        assert torch.equal(logits(other, ids), wish)
    assert all(torch.equal(value, tensors(model)[name]) for name, value in tensors(other).items())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), wish, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.unload(), ids), logits(make(), ids))


def test_sorsas_penalty_is_in_each_step():
    """What the native API's optimiser steps to, PEFT's does, without a line in the loop."""
    ids = token_ids()
    own = osora.attach(tiny_llama(), osora.SorsaConfig(r=4, gamma=0.3))
    model = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=0.3))
    twins = dict(osora.adapted_layers(own))
    with torch.no_grad():
        for layer in layers(model):
            for a, b in zip(layer.deltas("default"), twins[layer.name].deltas("default"), strict=True):
                b.copy_(a.normal_(std=0.05))
    assert torch.equal(osora.orthonormality(model), osora.orthonormality(own)) and osora.orthonormality(model) > 0
    for net in (own, model):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for layer in layers(model):
        pairs = zip(layer.deltas("default"), twins[layer.name].deltas("default"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), layer.name
    without = get_peft_model(tiny_llama(), SorsaConfig(r=4, gamma=0.0))
    assert osora.orthonormality(without) == 0
    model.unload()
    with pytest.raises(ValueError, match="no SORSA adapter is active"):
        osora.orthonormality(tiny_llama())


@pytest.mark.parametrize("options", [{"train": "s"}, {"train": "o"}, {"side": "input"}, {"initial_o": 0.5}], ids=str)
def test_ablations(options, tmp_path):
    model, ids = get_peft_model(tiny_llama(), OsoraConfig(r=4, tol=1e-4, **options)), token_ids()
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"osora_" + options["train"]} if "train" in options else len(trained) == 2
    model.save_pretrained(tmp_path)
    wish = logits(move(model), ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(osora.load_adapter(tiny_llama(), tmp_path), ids), wish)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), wish)


def test_peft_is_needed_by_its_own_package_alone():
    """`import osora` neither imports PEFT nor needs it; `import osora.peft` without it says what to do."""
    program = """
import sys
import osora
assert not {"peft", "transformers"} & set(sys.modules)
sys.modules["peft"] = None
try:
    import osora.peft
except ImportError as error:
    print(error)
"""
    assert run_python(program).startswith("osora.peft needs PEFT 0.18 or newer: pip install")
