# SPDX-License-Identifier: Apache-2.0
"""Layers that work together within one forward of their model: the same numbers, one fold, never an old one."""

import copy

import pytest
import torch
from helpers import logits, tiny_gpt2, tiny_llama, token_ids
from side_by_side import FEW, MANY, Attention, Pair, adapt, assert_same, both, called, step
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers import together as layers_together


@pytest.fixture(autouse=True)
def joined_on_a_cpu(monkeypatch):
    """Siblings share a product here too, so that it is tested."""
    monkeypatch.setattr(layers_together, "JOINED_ON", ("cpu", "cuda"))


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["Llama", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_fold_gives_the_bits_of_many(make, dtype):
    alone, together = both(lambda: make(dtype=torch.float32).to(dtype))
    ids = token_ids(*FEW)
    assert_same([logits(together, ids)], [logits(alone, ids)])
    for model in (alone, together):
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    for _ in range(2):
        assert_same(step(together.train(), ids), step(alone.train(), ids))


@pytest.mark.parametrize("train", ["s", "o"])
def test_what_is_not_trained_gets_no_gradient(train):
    alone, together = both(train=train)
    ids = token_ids(*FEW)
    assert_same(step(together, ids), step(alone, ids))


def test_as_it_is_a_cpu_joins_nothing_and_no_bit_changes(monkeypatch):
    monkeypatch.setattr(layers_together, "JOINED_ON", ("cuda",))
    alone, together = both()
    ids = token_ids(*MANY)
    assert_same(step(together, ids), step(alone, ids))
    assert called(lambda: step(together, ids))["down", 4] == 14


def test_one_x_one_product_is_near_float64():
    """Of as many terms as one layer's alone: the bits may be others, the error may not."""
    alone, together = both()
    exact, ids = copy.deepcopy(alone).double(), token_ids(*MANY)
    wish = step(exact, ids)
    for _ in range(3):
        for got, plain, true in zip(step(together, ids), step(alone, ids), wish, strict=True):
            size = true.norm()
            assert (got - true).norm() <= 2 * (plain - true).norm() + 1e-6 * size


def test_training_is_the_same_step_for_step():
    """A fused optimiser writes without counting: a D of the step before would show."""
    found = []
    for model in both():
        optimizer = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2, fused=True)
        losses = []
        for seed in range(4):
            torch.manual_seed(seed)
            losses.append(step(model.train(), token_ids(*FEW))[0])
            optimizer.step()
        found.append(losses)
    assert_same(found[1], found[0])
    assert found[0][0] != found[0][-1]


# -- how often -------------------------------------------------------------------------------------------------------


def test_one_fold_a_forward_and_none_where_no_layer_asks():
    _, model = both()
    ids = token_ids(*FEW)
    for _ in range(2):
        found = called(lambda: step(model, ids))
        assert found["fold_many"] == 1 and found["linear"] == found["fold"] == 0
        assert found["linear_trained"] == found["up"] == found["linear_backward"] == 14
    assert called(lambda: logits(model, ids))["fold_many"] == 1
    with osora.disabled(model):
        assert not called(lambda: logits(model, ids))


def test_one_product_for_one_x_and_a_wrong_guess_once():
    """o reads another x than q, k and v, of the same width: seen in the first forward."""
    _, model = both()
    ids = token_ids(*MANY)
    first, second = (called(lambda: logits(model, ids)) for _ in range(2))
    assert [first["down", width] for width in (16, 12, 8, 4)] == [2, 0, 2, 4]  # two layers: qkvo, gate-up; o, down
    assert [second["down", width] for width in (16, 12, 8, 4)] == [0, 2, 2, 4]
    found = called(lambda: step(model, ids))
    assert found["down"] == 8 and found["down", 12] == found["down", 8] == 2


def test_cross_attention_finds_its_groups():
    torch.manual_seed(0)
    alone = adapt(Attention())
    model = osora.set_execution(copy.deepcopy(alone), "split", together=True)
    x, other = torch.randn(60, 12), torch.randn(60, 12)
    for _ in range(4):
        torch.testing.assert_close(model(x, other), alone(x, other))
    found = called(lambda: model(x, other))
    assert found["down", 8] == 1 and found["down", 4] == 2 and found["down"] == 3  # k and v; q, o
    for _ in range(4):  # now as self-attention: what was found out stays, and is right
        torch.testing.assert_close(model(x, x), alone(x, x))


def test_few_rows_share_no_product():
    """Joining the V of siblings would cost more than x."""
    _, model = both(Pair)
    assert called(lambda: model(torch.randn(15, 12)))["down", 8] == 0
    assert called(lambda: model(torch.randn(16, 12)))["down", 8] == 1


def test_a_layer_that_was_not_there_last_time_folds_alone():
    """An expert that no token came to: it is folded with the others again, once it was asked for."""
    _, model = both(Pair)
    model(torch.randn(3, 12))
    forward, model.down.forward = model.down.forward, lambda x: x[..., :12]
    assert called(lambda: model(torch.randn(3, 12)))["fold_many"] == 1
    model.down.forward = forward
    assert [called(lambda: model(torch.randn(3, 12)))["fold_many"] for _ in range(3)] == [2, 1, 1]


@pytest.mark.parametrize("rank_pattern", [{}, {"gate": 3}])
def test_ranks_of_siblings(rank_pattern):
    alone, model = both(Pair, rank_pattern=rank_pattern)
    x = torch.randn(2, 31, 12, requires_grad=True)
    torch.testing.assert_close(model(x), alone(x))
    found = called(lambda: model(x))
    assert found["down"] == 2 and found["down", 4 + rank_pattern.get("gate", 4)] == 1


# -- never old -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o", "s", "S0", "U", "V"])
def test_a_change_within_the_forward_is_seen(name):
    """Of a layer whose D was made when the first one asked."""

    def change(pair: Pair, x: Tensor) -> None:
        with torch.no_grad():
            getattr(pair.gate, name).add_(0.3)

    for rows in (3, 40):
        alone, model = both(lambda: Pair(between=change))
        x = torch.randn(rows, 12)
        for _ in range(2):
            torch.testing.assert_close(model(x), alone(x))


@pytest.mark.parametrize("name", ["o", "s", "S0", "U", "V", "base_layer.weight", "base_layer.bias"])
def test_another_tensor_within_the_forward_is_seen(name):
    def change(pair: Pair, x: Tensor) -> None:
        path, _, last = name.rpartition(".")
        owner = pair.gate.get_submodule(path)
        new = getattr(owner, last).detach() + 0.3
        setattr(owner, last, new if last in ("S0", "U", "V") else nn.Parameter(new, last in ("o", "s")))

    for rows in (3, 40):
        alone, model = both(lambda: Pair(between=change))
        x = torch.randn(rows, 12)
        for _ in range(2):
            torch.testing.assert_close(model(x), alone(x))


def test_a_change_of_x_between_siblings_is_seen():
    alone, model = both(lambda: Pair(between=lambda pair, x: x.mul_(-1)))
    x = torch.randn(40, 12)
    torch.testing.assert_close(model(x.clone()), alone(x.clone()))


def test_what_nobody_counted_is_seen_in_the_next_forward():
    alone, model = both()
    ids = token_ids(*FEW)
    logits(model, ids)
    for m in (alone, model):
        for parameter in osora.adapter_parameters(m):
            parameter.data.mul_(-2)
    assert_same([logits(model, ids)], [logits(alone, ids)])


def test_a_change_before_the_backward_is_an_error():
    _, model = both()
    loss = model(input_ids=token_ids(*FEW), labels=token_ids(*FEW)).loss
    with torch.no_grad():
        next(iter(adapted_layers(model).values())).o.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_forward_that_fails_ends():
    """Afterwards a layer that is called by itself makes its own D."""

    def fail(pair: Pair, x: Tensor) -> None:
        if x.shape[0] == 5:
            raise ValueError("five rows")

    alone, model = both(lambda: Pair(between=fail))
    for x in (torch.randn(5, 12), torch.randn(40, 12)):
        if x.shape[0] == 5:
            with pytest.raises(ValueError, match="five rows"):
                model(x)
        for m in (alone, model):
            m.gate.o.data.mul_(-3)
        assert_same([model.gate(x)], [alone.gate(x)])
        torch.testing.assert_close(model(torch.ones(40, 12)), alone(torch.ones(40, 12)))


def test_an_interrupted_forward_is_over_when_the_next_begins():
    """No hook of torch's runs after a KeyboardInterrupt."""

    def interrupt(pair: Pair, x: Tensor) -> None:
        if x.shape[0] == 5:
            raise KeyboardInterrupt

    alone, model = both(lambda: Pair(between=interrupt))
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(5, 12))
    for m in (alone, model):
        m.up.o.data.mul_(-3)
        m.gate.o.data.mul_(-3)
    x = torch.randn(3, 12)
    assert_same([model(x)], [alone(x)])
    for m in (alone, model):
        m.gate.o.data.mul_(-3)
    assert_same([model.gate(x)], [alone.gate(x)])
