# SPDX-License-Identifier: Apache-2.0
"""OSoRA's ablations: each is the layer it says, trains what it says, and freezes the rest."""

import copy

import pytest
import torch
from helpers import TOLERANCE, linear_case, logits, move_adapter, saved_tensors, tiny_gpt2, tiny_llama, token_ids
from precision import accumulate, assert_within, every_dtype
from saved_adapters import both
from torch import Tensor, nn

import osora
from osora import OsoraConfig, adapted_layers
from osora.layers import AdaptedLinear
from osora.layers.base_weight import oriented_weight
from osora.layers.formulas import OsoraFormula
from osora.ops import ablations

every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
every_side = pytest.mark.parametrize("side", ["output", "input"])
ABLATIONS = [
    {"train": "o"},
    {"train": "s"},
    {"side": "input"},
    {"side": "input", "train": "o"},
    {"side": "input", "train": "s"},
    {"initial_o": 0.5},
    {"initial_o": 0},
    {"initial_o": -2.0, "side": "input"},
    {"initial_o": 0, "side": "input"},
]
every_ablation = pytest.mark.parametrize("options", ABLATIONS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))


def config(r: int = 5, **options) -> OsoraConfig:
    return OsoraConfig(**({"r": r, "tol": 1e-4} | options))


def paper(layer: AdaptedLinear, name: str = "default") -> Tensor:
    """``W_res + diag(O) U diag(S) Vᵀ``, or with diag(O) on the right, ``W_res`` less the same at the start. float64."""
    formula = layer.formula(name)
    o, s = (t.detach().double() for t in layer.deltas(name))
    U, V, S0 = (t.double() for t in layer.basis(s.numel()))
    W = oriented_weight(layer.base_layer).detach().double()
    c = formula.initial_o
    if formula.side == "output":
        return W - c * (U * S0) @ V.t() + (c + o)[:, None] * ((U * (S0 + s)) @ V.t())
    return W - c * (U * S0) @ V.t() + ((U * (S0 + s)) @ V.t()) * (c + o)


# -- the formula -----------------------------------------------------------------------------------------------------


@every_dtype
@every_side
@pytest.mark.parametrize("c", [1.0, 0.0, -0.5, 3.0])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (0,), (2, 3), (3, 0)], ids=str)
def test_against_float64(rows, c, side, dtype):
    """y and every gradient; errors against the sum of the sizes of all terms."""
    case = linear_case(rows, 24, 20, 6, dtype)
    on_input, exact = side == "input", accumulate(dtype)
    o = 0.1 * torch.randn(24 if on_input else 20, dtype=exact)
    formula = OsoraFormula(side=side, initial_o=c)
    x, bias, s, o = (t.detach().clone().requires_grad_() for t in (case.x, case.bias, case.s, o))
    y = formula.linear(x, case.weight, bias, (case.U, case.V, case.S0), (o, s))
    dy = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    got = {"y": y.detach()} | dict(
        zip(("x", "bias", "s", "o"), torch.autograd.grad(y, (x, bias, s, o), dy), strict=True)
    )

    def double(sizes: bool) -> dict[str, Tensor]:
        take = (lambda t: t.detach().double().abs()) if sizes else (lambda t: t.detach().double())
        x_, b_, s_, o_ = (take(t).requires_grad_() for t in (x, bias, s, o))
        U, V, S0, W = (take(t) for t in (case.U, case.V, case.S0, case.weight))
        c_ = abs(c) if sizes else c
        outer = torch.outer(o_, S0 + s_) + c_ * s_
        delta = U @ (V * outer).t() if on_input else (U * outer) @ V.t()
        y = x_ @ (W + delta).t() + b_
        found = torch.autograd.grad(y, (x_, b_, s_, o_), take(dy))
        return {"y": y.detach()} | dict(zip(("x", "bias", "s", "o"), found, strict=True))

    value, size = double(False), double(True)
    for name, found in got.items():
        assert found.dtype == (exact if name in "so" else dtype), name
        # the branch is rounded before it is added, and F before its product: twice the roundings of the fused operator
        least = 2 ** (-24 if dtype == torch.float16 else -133)
        assert_within(found, value[name], 2 * TOLERANCE[dtype] * size[name] + 256 * least)


@every_side
def test_gradcheck(side):
    case = linear_case((5,), 7, 6, 3, torch.float64)
    o = torch.randn(7 if side == "input" else 6, dtype=torch.float64)
    formula = OsoraFormula(side=side, initial_o=0.0)
    inputs = [t.detach().clone().requires_grad_() for t in (case.x, case.bias, o, case.s)]

    def run(x: Tensor, bias: Tensor, o: Tensor, s: Tensor) -> Tensor:
        return formula.linear(x, case.weight, bias, (case.U, case.V, case.S0), (o, s))

    torch.autograd.gradcheck(run, inputs)


def test_more_rows_than_one_part(monkeypatch):
    monkeypatch.setattr(ablations, "ROWS", 3)
    test_against_float64((7,), 0.0, "input", torch.bfloat16)
    test_against_float64((7,), 0.0, "output", torch.bfloat16)


@pytest.mark.parametrize("side, numbers", [("input", 50 * 24), ("output", 50 * 6)])
def test_what_it_saves(side, numbers):
    """x [n, k] on the input side, h [n, r] on the output side, and nothing of the size of a weight."""
    case = linear_case((50,), 24, 20, 6).trainable("s")
    o = torch.zeros(24 if side == "input" else 20, requires_grad=True)
    known = (case.weight, case.U, case.V, case.S0, case.s, o)
    formula = OsoraFormula(side=side, initial_o=0.0)
    with saved_tensors(*known) as kept:
        formula.linear(case.x, case.weight, case.bias, (case.U, case.V, case.S0), (o, case.s))
    assert sum(t.numel() for t in kept) == numbers
    with saved_tensors(*known) as kept:
        x = case.x.clone().requires_grad_()
        formula.linear(x, None, None, (case.U, case.V, case.S0), (o.detach(), case.s.detach()))
    assert not kept


def test_a_scale_that_starts_elsewhere_is_the_same_layer_at_other_rates():
    """(O, S) and (O / c, c S) are one function: with O from c, o is divided by c, and s multiplied."""
    case = linear_case((5,), 12, 10, 4, torch.float64)
    basis, deltas = (case.U, case.V, case.S0), (case.o, case.s)
    found = OsoraFormula(initial_o=4.0).linear(case.x, case.weight, None, basis, deltas)
    D = case.U * (torch.outer(case.o, case.S0 + case.s) + 4 * case.s)
    torch.testing.assert_close(found, case.x @ (case.weight + D @ case.V.t()).t(), rtol=1e-12, atol=1e-12)


@every_side
def test_torch_func(side):
    case = linear_case((4,), 7, 6, 3, torch.float64)
    o = torch.randn(7 if side == "input" else 6, dtype=torch.float64)
    formula = OsoraFormula(side=side, initial_o=0.0)

    def run(s: Tensor, x: Tensor) -> Tensor:
        return formula.linear(x, case.weight, None, (case.U, case.V, case.S0), (o, s)).sum()

    each = torch.func.vmap(torch.func.grad(run), (None, 0))(case.s, case.x)
    (wish,) = torch.autograd.grad(run(s := case.s.clone().requires_grad_(), case.x), s)
    torch.testing.assert_close(each.sum(0), wish)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_side
def test_it_compiles_and_checkpoints(side):
    torch._dynamo.reset()
    model = osora.attach(nn.Sequential(nn.Linear(7, 6)), config(3, side=side, initial_o=0))
    layer, x = move_adapter(model)[0], torch.randn(4, 7)
    layer(x).sum().backward()
    wish = [layer.o.grad.clone(), layer.s.grad.clone()]
    for run in (
        torch.compile(layer, backend="aot_eager", fullgraph=True),
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
    ):
        layer.zero_grad()
        y = run(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        torch.testing.assert_close([layer.o.grad, layer.s.grad], wish)
    torch._dynamo.reset()


@every_side
@pytest.mark.parametrize("c", [0.0, 0.5])
def test_autocast(side, c):
    model = osora.attach(nn.Sequential(nn.Linear(16, 12)), config(4, side=side, initial_o=c))
    layer, x = move_adapter(model, 0.3)[0], torch.randn(30, 16)
    y = layer(x)
    y.sum().backward()
    wish = layer.o.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16 and layer.o.grad.dtype == torch.float32
    # factors, h, branch and sum each rounded to 8 bits
    assert (half.float() - y).norm() < 2e-2 * y.norm() and (layer.o.grad - wish).norm() < 2e-2 * wish.norm()


# -- in a model ------------------------------------------------------------------------------------------------------


@every_ablation
@every_model
def test_it_starts_as_the_base_and_is_the_paper_s_layer(make, options):
    model, ids = make(), token_ids()
    base = logits(model, ids)
    osora.attach(model, config(**options))
    assert torch.equal(logits(model, ids), base)
    move_adapter(model, 0.2)
    now = logits(model, ids)
    assert (now - base).abs().max() > 0.05
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), base)
    weights = {name: layer.base_layer.weight for name, layer in adapted_layers(model).items()}
    wish = {name: paper(layer) for name, layer in adapted_layers(model).items()}
    osora.merge(model)
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(oriented_weight(layer.base_layer).double(), wish[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, ids), now, rtol=1e-3, atol=1e-3)
    osora.unmerge(model)
    assert all(layer.base_layer.weight is weights[name] for name, layer in adapted_layers(model).items())
    osora.detach(model)
    assert torch.equal(logits(model, ids), base)


@every_ablation
@pytest.mark.parametrize("start", [0.0, 0.1], ids=["fresh", "trained"])
def test_what_is_not_trained_does_not_move(options, start):
    """Not by an optimiser that is given everything, with weight decay; and what is trained does."""
    model, ids = osora.attach(tiny_llama(), config(**options)), token_ids()
    layers = list(adapted_layers(model).values())
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.deltas("default"):
                parameter.normal_(std=start)
    before = [{"o": layer.o.detach().clone(), "s": layer.s.detach().clone()} for layer in layers]
    kinds = {"both": "os"}.get(options.get("train", "both"), options.get("train"))
    trained = [getattr(layer, kind) for layer in layers for kind in kinds]
    assert [id(p) for p in osora.adapter_parameters(model)] == [id(p) for p in trained]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert osora.summary(model).trainable == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for layer, old in zip(layers, before, strict=True):
        assert {kind for kind in "os" if not torch.equal(getattr(layer, kind), old[kind])} == set(kinds)


@every_ablation
@both
def test_saved_and_loaded(save_basis, options, tmp_path):
    model, ids = move_adapter(osora.attach(tiny_llama(), config(**options))), token_ids()
    osora.save_adapter(model, tmp_path, save_basis=save_basis)
    other = osora.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    names = lambda m: [n for n, p in m.named_parameters() if p.requires_grad]  # noqa: E731
    assert names(other) == names(model) and osora.model.state.state_of(other).current.config == config(**options)


def test_beside_each_other():
    """Adapters of different ablations in one model and one batch; training follows the active one."""
    model, ids = tiny_llama(), token_ids(4, 5)
    base = logits(model, ids)
    osora.attach(model, config(train="s"), name="a")
    osora.add_adapter(model, "b", config(side="input", train="o"))
    osora.add_adapter(model, "c", config(3, initial_o=0.5))
    wish = {}
    for name in "abc":
        osora.set_adapter(model, name)
        assert torch.equal(logits(model, ids), base)
        move_adapter(model, 0.2)
        wish[name] = logits(model, ids)
        trained = [
            kind for kind in "os" if next(iter(adapted_layers(model).values())).get_parameter(kind).requires_grad
        ]
        assert trained == {"a": ["s"], "b": ["o"], "c": ["o", "s"]}[name]
    names = ["b", None, "c", "a"]
    with osora.adapters_in_batch(model, names):
        got = logits(model, ids)
    assert torch.equal(got[1], base[1])
    for row, name in enumerate(names):
        if name:
            torch.testing.assert_close(got[row], wish[name][row], rtol=1e-4, atol=1e-4)
            assert (got[row] - base[row]).abs().max() > 0.05


@pytest.mark.parametrize("options", [{"side": "input"}, {"initial_o": 0.5}])
def test_the_materialised_plan_is_refused(options):
    model = osora.attach(tiny_llama(), config(**options))
    with pytest.raises(ValueError, match="the materialised plan is for OSoRA with O from 1 on the output side"):
        osora.set_execution(model, "materialised")
    osora.set_execution(osora.attach(tiny_llama(), config(train="s")), "materialised")


def test_hooks_and_dropout():
    model, ids, seen = osora.attach(tiny_llama(), config(side="input", dropout=0.5)), token_ids(), []
    move_adapter(model, 0.2)
    plain = logits(model, ids)
    layer = next(iter(adapted_layers(model).values()))
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model, ids), plain, rtol=1e-4, atol=1e-4)
    assert seen
    copy.deepcopy(layer).train()
    layer.train()
    x = torch.randn(3, layer.in_features)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"train": "os"}, ValueError, "train must be one of both, o, s, got 'os'"),
        ({"train": ["o"]}, ValueError, "train must be one of"),
        ({"side": "left"}, ValueError, "side must be one of output, input, got 'left'"),
        ({"initial_o": "zeros"}, ValueError, "initial_o must be a number or \"ones\", got 'zeros'"),
        ({"initial_o": float("inf")}, TypeError, "initial_o must be a finite number"),
        ({"initial_o": 0, "train": "s"}, ValueError, "trains nothing"),
    ],
)
def test_wrong_configs(options, error, words):
    with pytest.raises(error, match=words):
        OsoraConfig(**options)


def test_ones():
    assert OsoraConfig(initial_o="ones") == OsoraConfig() and OsoraConfig().to_dict()["initial_o"] == 1.0
