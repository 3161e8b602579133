# SPDX-License-Identifier: Apache-2.0
"""An adapter in and out of a model: nothing changes, everything comes back, refusals leave it as it was."""

import copy
import pickle
import types

import pytest
import torch
from attached_models import attached, every_model, names
from helpers import logits, move_adapter, tiny_llama, token_ids
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

import osora
from osora import OsoraConfig, adapted_layers, attach, detach

# -- nothing changes ---------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_the_same_bits(make, dtype):
    model, ids = make(dtype=dtype), token_ids()
    one, before = token_ids(1, 1), logits(model, ids)
    before_one = logits(model, one)
    attached(model)
    assert torch.equal(logits(model, ids), before) and torch.equal(logits(model, one), before_one)
    with_gradients = model(ids).logits
    assert with_gradients.requires_grad and torch.equal(with_gradients, before)
    move_adapter(model)
    assert not torch.equal(logits(model, ids), before)
    with osora.disabled(model) as same:
        assert same is model and torch.equal(logits(model, ids), before)
    assert not torch.equal(logits(model, ids), before)


@every_model
def test_it_trains_o_and_s_alone(make):
    model, ids = attached(make()).train(), token_ids()
    parameters = osora.adapter_parameters(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trainable} == {"o", "s"}
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    optimiser, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(20):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.abs().max() > 0 for p in parameters)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_a_model_that_generates():
    model, ids = attached(tiny_llama()), token_ids(1, 4)
    wish = model.generate(ids, max_new_tokens=4, do_sample=False)
    move_adapter(model, 0.2)
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert cached.shape == wish.shape
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_the_same_seed_gives_the_same_adapter():
    first, second = attached(tiny_llama()), attached(tiny_llama())
    for a, b in zip(adapted_layers(first).values(), adapted_layers(second).values(), strict=True):
        assert torch.equal(a.U, b.U) and torch.equal(a.V, b.V) and torch.equal(a.S0, b.S0)


def test_the_basis_is_the_singular_value_decomposition():
    layer = adapted_layers(attached(tiny_llama()))["model.layers.1.mlp.down_proj"]
    U, S, V, _ = osora.reference.truncated_svd(layer.weight, 4)
    torch.testing.assert_close(layer.S0.double(), S, rtol=1e-5, atol=0)
    torch.testing.assert_close((layer.U * layer.S0) @ layer.V.t(), ((U * S) @ V.t()).float(), rtol=1e-3, atol=1e-3)


# -- everything comes back ---------------------------------------------------------------------------------------------


class Shape(dict):
    """What a model is, to the object: modules, tensors, addresses, flags."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            modules={name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
            parameters={
                n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
            },
            buffers={n: (id(b), b.data_ptr()) for n, b in model.named_buffers(remove_duplicate=False)},
            keys=list(model.state_dict()),
            training={name: m.training for name, m in model.named_modules()},
            attributes=sorted(model.__dict__),
        )


@every_model
def test_detach_gives_back_the_very_model(make):
    model, ids = make(), token_ids()
    next(iter(model.parameters())).requires_grad_(False)
    list(model.parameters())[3].requires_grad_(False)
    before, values, wish = Shape(model), copy.deepcopy(model.state_dict()), logits(model, ids)
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    attached(model)
    osora.merge(move_adapter(model))
    osora.unmerge(model)
    for name, p in model.named_parameters():
        if "base_layer" in name:
            assert p.data_ptr() == addresses[name.replace(".base_layer", "")]
    assert detach(model) is model
    assert Shape(model) == before and torch.equal(logits(model, ids), wish)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values.values(), strict=True))
    attached(model)  # and again
    assert len(names(model)) > 6


def test_detach_of_a_merged_model():
    model = tiny_llama()
    before = Shape(model)
    osora.merge(move_adapter(attached(model)))
    detach(model)
    assert Shape(model) == before


@pytest.mark.parametrize("already", [True, False])
def test_detach_merged_leaves_a_plain_model(already):
    model, ids = move_adapter(attached(tiny_llama())), token_ids()
    wish, flags = logits(model, ids), [True] * len(list(tiny_llama().parameters()))
    if already:
        osora.merge(model)
    detach(model, merged=True)
    assert not names(model) and list(model.state_dict()) == list(tiny_llama().state_dict())
    torch.testing.assert_close(logits(model, ids), wish, rtol=1e-4, atol=1e-4)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_detach_merged_takes_all_layers_or_none():
    model = move_adapter(attached(tiny_llama().half()))
    last = list(adapted_layers(model).values())[-1]
    with torch.no_grad():
        last.s.fill_(1e6)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: .*NaN or infinite"):
        detach(model, merged=True)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    assert not names(detach(model))


def test_detach_keeps_the_mode():
    for mode in (True, False):
        model = attached(tiny_llama()).train(mode)
        assert all(m.training == mode for m in model.modules())
        assert all(m.training == mode for m in detach(model).modules())


# -- shared, copied, cast ----------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Tanh(), nn.Linear(6, 6))
        self.again = nn.ModuleDict({"block": self.block, "first": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.again["block"](self.first(self.block(self.again["first"](x))))


def test_a_shared_module_is_adapted_once_in_both_places():
    model, x = Shared(), torch.randn(3, 6)
    before, y = Shape(model), model(x)
    attached(model)
    assert model.first is model.again["first"] and model.block[1] is model.again["block"][1]
    assert names(model) == ["first", "block.1"] and len(osora.adapter_parameters(model)) == 4
    assert torch.equal(model(x), y)
    move_adapter(model)
    merged = osora.merge(model)(x)
    assert not torch.equal(merged, y)
    osora.unmerge(model)
    torch.testing.assert_close(model(x), merged)
    assert Shape(detach(model)) == before


def test_a_shared_module_is_found_by_either_name():
    assert len(names(attached(Shared(), target_modules=[r"again.first"]))) == 1
    with pytest.raises(ValueError, match="no module matches"):
        attached(Shared(), target_modules=["again.first"], exclude_modules=["first"])


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_model(copy_of):
    model, ids = move_adapter(attached(tiny_llama())), token_ids()
    other = copy_of(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert str(osora.summary(other)) == str(osora.summary(model))
    assert not ({id(p) for p in other.parameters()} & {id(p) for p in model.parameters()})
    assert not names(detach(other)) and len(names(model)) == 14


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_and_back(there):
    model = move_adapter(attached(tiny_llama()))
    before = [t.clone() for layer in adapted_layers(model).values() for t in (layer.o, layer.s, layer.S0)]
    ids = token_ids()
    assert torch.isfinite(logits(model.to(there), ids)).all()
    model.to(torch.float32)
    after = [t for layer in adapted_layers(model).values() for t in (layer.o, layer.s, layer.S0)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_disabled_comes_back_after_an_error_and_nests():
    model = move_adapter(attached(tiny_llama()))
    ids = token_ids()
    wish = logits(model, ids)
    with pytest.raises(KeyError), osora.disabled(model), osora.disabled(model):
        raise KeyError
    assert torch.equal(logits(model, ids), wish)
    with pytest.raises(ValueError, match="unmerge"), osora.disabled(osora.merge(model)):
        pass


# -- refusals leave the model as it was --------------------------------------------------------------------------------


def test_a_second_adapter_is_refused():
    model = attached(tiny_llama())
    layers = names(model)
    with pytest.raises(ValueError, match=r"has an osora adapter already: call osora\.detach"):
        attached(model)
    with pytest.raises(ValueError, match="already"):
        attached(nn.ModuleDict({"part": model}))
    assert names(model) == layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_last_weight_leaves_the_model_untouched(bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[3, 5] = bad
    before = Shape(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has NaN or infinite"):
        attached(model)
    assert Shape(model) == before


def test_max_memory_refuses_by_name_before_any_work(monkeypatch):
    model = tiny_llama()
    needs = {tuple(shape): osora.svd_plan(shape, 4).bytes for shape in ((32, 32), (16, 32), (56, 32), (32, 56))}
    largest = max(needs.values())
    limited = attach(model, OsoraConfig(r=4), max_memory=largest)
    for a, b in zip(adapted_layers(limited).values(), adapted_layers(attached(tiny_llama())).values(), strict=True):
        assert torch.equal(a.U, b.U) and torch.equal(a.V, b.V) and torch.equal(a.S0, b.S0)
    model = tiny_llama()
    before = Shape(model)
    monkeypatch.setattr("osora.model.decompose.decompose", None)
    words = rf"gate_proj\.weight \[56, 32\] takes {largest} bytes .* rank 4, and max_memory is {largest - 1}: allow"
    with pytest.raises(ValueError, match=words):
        attach(model, OsoraConfig(r=4), max_memory=largest - 1)
    for bad, error in ((0, ValueError), (-1, ValueError), (2**63, ValueError), (1e9, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_memory must be"):
            attach(model, OsoraConfig(r=4), max_memory=bad)
    assert Shape(model) == before


def test_max_memory_reaches_the_operator(monkeypatch):
    seen, ops = [], torch.ops.osora

    def recorded(*arguments):
        seen.append(arguments)
        return ops.truncated_svd(*arguments)

    stub = types.SimpleNamespace(truncated_svd=recorded, svd_plan=ops.svd_plan)
    monkeypatch.setattr("osora.svd.truncated.operators", stub)
    attach(tiny_llama(), OsoraConfig(r=4), max_memory=123456789)
    attach(tiny_llama(), OsoraConfig(r=4))
    assert {arguments[-1] for arguments in seen} == {123456789, 0}


def test_no_convergence_leaves_the_model_untouched():
    model = nn.Sequential(nn.Linear(300, 300))
    before = Shape(model)
    with pytest.raises(osora.ConvergenceError, match="no certificate of tol=1e-18 for 0"):
        attach(model, OsoraConfig(r=4, tol=1e-18), unconverged="raise")
    assert Shape(model) == before
    with pytest.warns(RuntimeWarning, match="no certificate"):
        attach(model, OsoraConfig(r=4, tol=1e-18))
    assert not osora.summary(model).converged and "NOT ALL CONVERGED" in str(osora.summary(model))


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        attached(nn.Sequential(nn.Linear(4, 4, device="meta")))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("parametrise", [weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
def test_a_weight_that_is_computed_in_each_forward_is_refused(parametrise):
    """A merged weight would be overwritten by the next forward."""
    model = nn.Sequential(nn.Linear(6, 6), parametrise(nn.Linear(6, 6)))
    with pytest.raises(ValueError, match=r"the weight of 1 is computed anew in each forward .*prune\.remove"):
        attach(model, OsoraConfig(r=2))
    attach(model, OsoraConfig(r=2, exclude_modules=["1"]))


def test_wrong_calls():
    model = tiny_llama()
    for function in (detach, osora.merge, osora.unmerge, osora.summary, osora.adapter_parameters):
        with pytest.raises(ValueError, match=r"no osora adapter: call osora\.attach"):
            function(model)
    with pytest.raises(TypeError, match="config must be an OsoraConfig or a SorsaConfig, got dict"):
        attach(model, {"r": 3})
    with pytest.raises(ValueError, match="unconverged"):
        attach(model, OsoraConfig(r=4), unconverged="never")
    assert not names(model)


# -- what there is -----------------------------------------------------------------------------------------------------


def test_summary_counts():
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    summary = osora.summary(attached(model))
    assert summary.trainable == sum(p.numel() for p in osora.adapter_parameters(model)) == 2 * (240 + 7 * 4)
    assert summary.total == total and summary.share == summary.trainable / total
    assert summary.converged and 0 <= summary.max_residual < 1e-3 and summary.seconds > 0
    first = summary.modules[0]
    assert (first.name, first.shape, first.rank) == ("model.layers.0.self_attn.q_proj", (32, 32), 4)
    table = str(summary)
    assert "trainable 536 of 20,160 (2.659%)" in table and "56 x 32" in table


def test_progress_does_not_speak_unless_asked(capsys):
    attached(tiny_llama())
    assert capsys.readouterr() == ("", "")
    attach(tiny_llama(), OsoraConfig(r=4), progress=True)
    out, err = capsys.readouterr()
    assert "decomposing" in out + err and "14/14" in out + err
