# SPDX-License-Identifier: Apache-2.0
"""SORSA on a model: the same life as OSoRA's, and beside it."""

import copy

import pytest
import torch
from helpers import logits, move_adapter, tiny_gpt2, tiny_llama, token_ids
from precision import every_dtype
from saved_adapters import both
from torch import Tensor, nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig, adapted_layers
from osora.layers import AdaptedLinear, SorsaLinear
from osora.layers.base_weight import oriented_weight
from osora.model.state import all_layers
from osora.svd.truncated import decompose

every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
# Row by row against the adapter alone: float32 models of two layers, whose rounding is of another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def config(r: int = 6, **options) -> SorsaConfig:
    return SorsaConfig(**({"r": r, "tol": 1e-4} | options))


def move(model: nn.Module, name: str, step: float = 0.05) -> nn.Module:
    """Changes as training would leave them, of that adapter alone."""
    with torch.no_grad():
        for layer in adapted_layers(model, name).values():
            for parameter in layer.trained(name):
                parameter.normal_(std=step)
    return model


def paper(layer: AdaptedLinear, name: str, alpha: float | None = None) -> Tensor:
    """The merged weight of the paper, W_res + scale U diag(S) Vᵀ, in float64."""
    u, s, v = (t.detach().double() for t in layer.deltas(name))
    U0, V0, S0 = (t.double() for t in layer.basis(s.numel()))
    scale = 1 if alpha is None else alpha / len(s)
    residual = oriented_weight(layer.base_layer).detach().double() - scale * (U0 * S0) @ V0.t()
    return residual + scale * ((U0 + u) * (S0 + s)) @ (V0 + v).t()


def make_layer(k: int = 12, d: int = 10, r: int = 4, dtype: torch.dtype = torch.float32, **options) -> SorsaLinear:
    base = nn.Linear(k, d, dtype=dtype).requires_grad_(False)
    (factors,) = decompose([base.weight], r, names=["layer"])
    return SorsaLinear(base, factors, **options)


# -- the layer -------------------------------------------------------------------------------------------------------


@every_dtype
def test_it_starts_as_its_base(dtype):
    layer = make_layer(dtype=dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (torch.randn(3, 12), torch.randn(2, 3, 12), torch.randn(0, 12), torch.randn(12)):
        assert torch.equal(layer(x.to(dtype)), layer.base_layer(x.to(dtype)))
    assert {n: (p.dtype, tuple(p.shape)) for n, p in layer.named_parameters(recurse=False)} == {
        "u": (exact, (10, 4)),
        "s": (exact, (4,)),
        "v": (exact, (12, 4)),
    }


@every_dtype
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_it_is_the_paper_s_layer(dtype, alpha):
    layer = make_layer(dtype=dtype, formula=osora.layers.formulas.SorsaFormula(alpha))
    with torch.no_grad():
        for parameter in layer.deltas("default"):
            parameter.normal_(std=0.1)
    x = torch.randn(50, 12, dtype=torch.float64).to(dtype)
    wish = x.double() @ paper(layer, "default", alpha).t() + layer.bias.double()
    # 16 bits: factors and results of a unit 4e-3 at most, sums of some ten terms of size one
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 5e-2)
    torch.testing.assert_close(layer(x).double(), wish, rtol=tolerance, atol=tolerance)
    delta = layer.delta_weight()
    assert delta.dtype == layer.u.dtype and torch.linalg.matrix_rank(delta.double(), tol=1e-4) <= 8


def test_the_factors_are_never_16_bit():
    """U + 1e-4 in bfloat16 would be U."""
    model = move_adapter(osora.attach(tiny_llama(), config()), 1e-4)
    before = [p.detach().clone() for p in osora.adapter_parameters(model)]
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in osora.adapter_parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(before, osora.adapter_parameters(model), strict=True))


def test_dropout_acts_on_the_branch_while_training():
    layer, x = make_layer(dropout=0.5), torch.randn(4, 12)
    assert torch.equal(layer.train()(x), layer.base_layer(x)), "nothing to drop at the start"
    with torch.no_grad():
        layer.s.normal_()
    plain = layer.eval()(x)
    layer.train()
    assert not torch.equal(layer(x), plain) and not torch.equal(layer(x), layer(x))


def test_the_materialised_plan_is_refused():
    model = osora.attach(tiny_llama(), config())
    with pytest.raises(
        ValueError, match=r"q_proj: the materialised plan is for OSoRA with O from 1 .* 'default' is SorsaFormula"
    ):
        osora.set_execution(model, "materialised")
    assert {layer.execution for layer in adapted_layers(model).values()} == {"split"}


# -- in a model ------------------------------------------------------------------------------------------------------


@every_model
def test_attach_train_merge_detach(make):
    model, ids = make(), token_ids()
    base, tensors = logits(model, ids), {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    osora.attach(model, config())
    assert torch.equal(logits(model, ids), base)
    trained = osora.adapter_parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    linears = [oriented_weight(layer.base_layer).shape for layer in adapted_layers(model).values()]
    count = sum(6 * (d + k + 1) for d, k in linears)
    assert osora.summary(model).trainable == sum(m.trainable for m in osora.summary(model).modules) == count
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    now = logits(model, ids)
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), base)
    weights = {name: layer.base_layer.weight for name, layer in adapted_layers(model).items()}
    wish = {name: paper(layer, "default") for name, layer in adapted_layers(model).items()}
    osora.merge(model)
    torch.testing.assert_close(logits(model, ids), now, rtol=1e-4, atol=1e-4)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(oriented_weight(layer.base_layer).double(), wish[name], rtol=1e-5, atol=1e-6)
    osora.unmerge(model)
    assert all(layer.base_layer.weight is weights[name] for name, layer in adapted_layers(model).items())
    assert torch.equal(logits(model, ids), now)
    osora.detach(model)
    assert torch.equal(logits(model, ids), base)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: i for n, (i, _) in tensors.items()}
    assert all(torch.equal(p, tensors[n][1]) for n, p in model.named_parameters())


@both
@every_model
@pytest.mark.parametrize("alpha", [None, 16.0])
def test_saved_and_loaded(make, save_basis, alpha, tmp_path):
    model, ids = osora.attach(make(), config(alpha=alpha, rank_pattern={"o_proj|c_proj": 3})), token_ids()
    move_adapter(model)
    osora.save_adapter(model, tmp_path, save_basis=save_basis)
    other = osora.load_adapter(make(), tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    for a, b in zip(adapted_layers(model).values(), adapted_layers(other).values(), strict=True):
        assert a.formula("default") == b.formula("default") and isinstance(b, SorsaLinear)
        assert all(
            torch.equal(p, q) and q.requires_grad for p, q in zip(a.deltas("default"), b.deltas("default"), strict=True)
        )
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in osora.adapter_parameters(other)}
    with pytest.raises(AdapterError, match="base weight"):
        wrong = make()
        with torch.no_grad():
            for parameter in wrong.parameters():
                parameter.mul_(1.01)
        osora.load_adapter(wrong, tmp_path)


# -- beside others ---------------------------------------------------------------------------------------------------


def three(make=tiny_llama, **options) -> nn.Module:
    """SORSA a in every layer; OSoRA b of smaller rank; SORSA c, scaled, in some layers. a is active."""
    model = move(osora.attach(make(**options), config(), name="a"), "a")
    move(osora.add_adapter(model, "b", OsoraConfig(r=3, tol=1e-4)), "b")
    some = config(5, alpha=2.0, layers_to_transform=[1], rank_pattern={"o_proj|c_proj": 2})
    return move(osora.add_adapter(model, "c", some), "c")


def alone(model: nn.Module, name: str | None, ids: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    if name is None:
        with osora.disabled(model):
            return logits(model, ids)
    return logits(osora.set_adapter(model, name), ids)


@every_model
def test_each_row_is_its_own_adapter_s(make):
    model, names = three(make), ["b", None, "a", "c", "a", "b", None]
    ids = token_ids(len(names), 5)
    wish = {name: alone(model, name, ids) for name in ("a", "b", "c", None)}
    for first in wish:  # or the comparison below shows nothing
        assert all(first == second or (wish[first] - wish[second]).abs().max() > 0.05 for second in wish)
    before = logits(model, ids)
    with osora.adapters_in_batch(model, names):
        got = logits(model, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], wish[name][row], **CLOSE)
    assert all(torch.equal(got[row], wish[None][row]) for row in (1, 6)), "the base's very bits"
    assert torch.equal(logits(model, ids), before)


def test_a_batch_with_hooks_and_autocast():
    model, names = three(), ["b", None, "a", "c"]
    ids, layer, seen = token_ids(4, 5), list(all_layers(model).values())[-1], []
    with osora.adapters_in_batch(model, names):
        plain = logits(model, ids)
        layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(logits(model, ids), plain, **CLOSE)
        assert seen == [1]
        with torch.autocast("cpu", torch.bfloat16):  # two layers in 8 bits
            torch.testing.assert_close(logits(model, ids).float(), plain, rtol=0.15, atol=0.15)


def test_the_adapters_are_those_on_entry():
    model, ids = three(), token_ids(2, 5)
    with osora.adapters_in_batch(model, ["a", "b"]):
        before = logits(model, ids)
        move(model, "a", 1.0)
        assert torch.equal(logits(model, ids), before)
        with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
            model(ids)


def test_methods_take_turns():
    model, ids = three(), token_ids()
    wish = {name: alone(model, name, ids) for name in "abc"}
    kept = {
        name: [id(p) for layer in adapted_layers(model, name).values() for p in layer.deltas(name)] for name in "abc"
    }
    state = osora.set_adapter(copy.deepcopy(model), "b").state_dict()
    for name in "bcacb":
        osora.set_adapter(model, name)
        assert torch.equal(logits(model, ids), wish[name])
        assert [id(p) for p in osora.adapter_parameters(model)] == kept[name]
        assert {id(p) for p in model.parameters() if p.requires_grad} == set(kept[name])
    assert model.state_dict().keys() == state.keys() and all(
        torch.equal(model.state_dict()[k], t) for k, t in state.items()
    )
    osora.remove_adapter(osora.remove_adapter(model, "a"), "c")
    assert not any("@" in key or key.endswith((".u", ".v")) for key in model.state_dict())
    assert torch.equal(logits(model, ids), wish["b"])


@both
def test_loaded_beside_others(save_basis, tmp_path):
    model, ids = three(), token_ids()
    for name in "abc":
        osora.save_adapter(model, tmp_path / name, name=name, save_basis=save_basis)
    other = tiny_llama()
    for name in "bca":  # the basis is widened for c, and for a
        osora.load_adapter(other, tmp_path / name, name=name)
    for name in "abc":
        torch.testing.assert_close(alone(other, name, ids), alone(model, name, ids), **CLOSE)
