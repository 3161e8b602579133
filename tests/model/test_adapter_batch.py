# SPDX-License-Identifier: Apache-2.0
"""One batch, row by row: each row gives what its own adapter gives alone."""

import copy

import pytest
import torch
from helpers import logits, tiny_llama, token_ids
from several_adapters import CLOSE, alone, config, every_model, in_batch, move, three
from torch import nn

import osora
from osora.model.state import all_layers


@every_model
def test_each_row_is_its_own_adapter_s(make):
    model, names = three(make), ["b", None, "a", "c", "a", "b", None]
    ids = token_ids(len(names), 5)
    wish = {name: alone(model, name, ids) for name in ("a", "b", "c", None)}
    for first in ("a", "b", "c", None):  # or the comparison below shows nothing
        assert all(first == second or (wish[first] - wish[second]).abs().max() > 0.05 for second in wish)
    before = logits(model, ids)
    got = in_batch(model, names, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], wish[name][row], **CLOSE)
    assert torch.equal(logits(model, ids), before), "afterwards the active one runs again"
    assert torch.equal(before, wish["a"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_dtypes(dtype):
    model, names = three(dtype=dtype), ["b", None, "a", "c"]
    ids = token_ids(4, 5)
    got, tolerance = in_batch(model, names, ids), {torch.float64: 1e-11, torch.bfloat16: 0.15}[dtype]
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], alone(model, name, ids)[row], rtol=tolerance, atol=tolerance)


def test_a_batch_of_the_base_is_the_base_bit_for_bit():
    model, ids = three(), token_ids(3, 5)
    assert torch.equal(in_batch(model, [None] * 3, ids), logits(tiny_llama(), ids))
    mixed = in_batch(model, [None, "a", None], ids)
    assert torch.equal(mixed[[0, 2]], logits(tiny_llama(), ids)[[0, 2]])


def test_an_empty_batch():
    model = three()
    layer = next(iter(all_layers(model).values()))
    with osora.adapters_in_batch(model, []), torch.no_grad():
        assert layer(torch.randn(0, 3, 32)).shape == (0, 3, 32)


def test_sixty_four_adapters_in_sixty_four_rows():
    model = osora.attach(tiny_llama(layers=1), config(4), name="0")
    for i in range(64):
        if i:
            osora.add_adapter(model, str(i), config(1 + i % 4))
        move(model, str(i))
    names, ids = [str((7 * i) % 64) for i in range(64)], token_ids(64, 3)
    got = in_batch(model, names, ids)
    for row in (0, 1, 31, 63):
        torch.testing.assert_close(got[row], alone(model, names[row], ids)[row], **CLOSE)


def test_generation():
    """One token at a time, with a cache: the batch stays the first dimension."""
    model, ids = three(), token_ids(3, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    names = ["c", None, "a"]
    with osora.adapters_in_batch(model, names):
        got = model.generate(ids, **options)
    for row, name in enumerate(names):
        other = copy.deepcopy(model)
        if name is None:
            osora.detach(other)
        else:
            osora.set_adapter(other, name)
        wish = other.generate(ids, **options)[row]
        assert torch.equal(got[row, : len(wish)], wish)


def test_hooks_of_the_base_fire():
    model, names = three(), ["a", None, "c"]
    ids, layer, seen = token_ids(3, 5), list(all_layers(model).values())[-1], []
    plain = in_batch(model, names, ids)
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(in_batch(model, names, ids), plain, **CLOSE)
    assert seen == [1]


def test_autocast():
    model, names = three(), ["a", None, "c"]
    ids = token_ids(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = in_batch(model, names, ids)
        wish = torch.stack([alone(model, name, ids)[row] for row, name in enumerate(names)])
    torch.testing.assert_close(got.float(), wish.float(), rtol=0.15, atol=0.15)


def test_a_context_in_a_context():
    model, ids = three(), token_ids(2, 5)
    first, second = in_batch(model, ["a", "b"], ids), in_batch(model, ["b", None], ids)
    with osora.adapters_in_batch(model, ["a", "b"]):
        assert torch.equal(in_batch(model, ["b", None], ids), second)
        assert torch.equal(logits(model, ids), first)
        with osora.disabled(model):
            assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    with pytest.raises(KeyError), osora.adapters_in_batch(model, ["a", "b"]):
        raise KeyError
    assert all(layer.batch is None for layer in all_layers(model).values())


def test_the_adapters_are_those_on_entry():
    model, ids = three(), token_ids(2, 5)
    with osora.adapters_in_batch(model, ["a", "b"]):
        before = logits(model, ids)
        move(model, "a", 1.0)
        assert torch.equal(logits(model, ids), before)
    assert not torch.equal(in_batch(model, ["a", "b"], ids), before)


def test_inference_mode():
    model, ids = three(), token_ids(2, 5)
    wish = in_batch(model, ["a", "b"], ids)
    with torch.inference_mode():
        context = osora.adapters_in_batch(model, ["a", "b"])
        context.__enter__()
        assert torch.equal(model(ids).logits, wish)
    assert torch.equal(logits(model, ids), wish)
    osora.detach(model)
    with torch.inference_mode():
        model = three()
        context = osora.adapters_in_batch(model, ["b", "c"])
        context.__enter__()
        wish = model(ids).logits
    model.requires_grad_(False)
    assert torch.equal(model(ids).logits, wish), "the context outlives the mode it was entered in"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6))
    osora.add_adapter(osora.attach(model, config(4)), "b", config(2, target_modules=["2"]))
    move(move(model, "default"), "b")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for names in (["b", None, "default"], ["default"] * 5, [None, "b"], ["b"] * 7):
            x = torch.randn(len(names), 8)
            with osora.adapters_in_batch(model, names):
                torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "names, error, words",
    [
        (["a", "z"], ValueError, r"no adapter 'z'; it has 'a', 'b', 'c'"),
        ("ab", TypeError, "names must be a list"),
        (None, TypeError, "names must be a list"),
        (["a", 3], TypeError, "names must hold adapters' names"),
    ],
)
def test_wrong_names(names, error, words):
    model = three()
    with pytest.raises(error, match=words), osora.adapters_in_batch(model, names):
        pass
    assert all(layer.batch is None for layer in all_layers(model).values())


@pytest.mark.parametrize("names", [["a"], ["a", "b", None], []])
def test_a_wrong_number_of_rows(names):
    model, ids = three(), token_ids(2, 5)
    with pytest.raises(ValueError, match=rf"has {len(names)} names, and a layer got x of shape \[2, 5, 32\]"):
        in_batch(model, names, ids)
    with osora.adapters_in_batch(model, ["a"] * 32), pytest.raises(ValueError, match=r"shape \[32\]"):
        next(iter(all_layers(model).values()))(torch.randn(32))


def test_dropout_in_training_mode():
    model, ids = three(), token_ids(2, 5)
    osora.add_adapter(model, "d", config(dropout=0.1))
    in_batch(model, ["a", "d"], ids)
    model.train()
    in_batch(model, ["a", "b"], ids)
    with pytest.raises(ValueError, match=r"has dropout: call model\.eval\(\) first"):
        in_batch(model, ["a", "d"], ids)


def test_a_gradient_is_refused():
    model, ids = three(), token_ids(2, 5)
    with osora.adapters_in_batch(model, ["a", "b"]), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(ids)
    with osora.adapters_in_batch(model, ["b", "c"]):
        assert not model(ids).logits.requires_grad, "these two are frozen"


def test_a_merged_model_is_refused():
    model = osora.merge(three())
    for call in (
        lambda: in_batch(model, ["a", "b"], token_ids(2, 5)),
        lambda: osora.set_adapter(model, "b"),
        lambda: osora.remove_adapter(model, "b"),
        lambda: osora.add_adapter(model, "d"),
    ):
        with pytest.raises(ValueError, match=r"merged: call osora\.unmerge\(model\) first"):
            call()


def test_what_cannot_be_done_within_a_batch(tmp_path):
    model = three()
    osora.save_adapter(model, tmp_path)
    with osora.adapters_in_batch(model, ["a", "b"]):
        for call in (
            lambda: osora.set_adapter(model, "b"),
            lambda: osora.remove_adapter(model, "b"),
            lambda: osora.add_adapter(model, "d"),
            lambda: osora.load_adapter(model, tmp_path, name="d"),
            lambda: osora.merge(model),
        ):
            with pytest.raises(ValueError, match="within adapters_in_batch"):
                call()
        with pytest.raises(RuntimeError, match="cannot be moved or cast within"):
            model.to(torch.bfloat16)
    assert osora.adapter_names(model) == ["a", "b", "c"]
