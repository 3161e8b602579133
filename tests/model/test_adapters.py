# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one model: which one is active, in and out, merging, files."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_llama, token_ids
from saved_adapters import described, edit, edit_tensors, key
from several_adapters import CLOSE, alone, config, deltas_of, every_model, in_batch, move, same_deltas, three
from torch import Tensor, nn

import osora
from osora import AdapterError
from osora.model.state import all_layers

# -- which one is active -----------------------------------------------------------------------------------------------


def test_names():
    model = osora.attach(tiny_llama(), config())
    assert osora.adapter_names(model) == ["default"] and osora.active_adapter(model) == "default"
    osora.add_adapter(model, "second")
    assert osora.adapter_names(model) == ["default", "second"] and osora.active_adapter(model) == "default"
    assert osora.set_adapter(model, "second") is model and osora.active_adapter(model) == "second"
    for call in (osora.adapter_names, osora.active_adapter, lambda m: osora.set_adapter(m, "a")):
        with pytest.raises(ValueError, match="no osora adapter"):
            call(tiny_llama())


def test_one_adapter_alone_is_as_ever():
    """Whatever its name: keys, modules and parameters of the model do not know that there could be more."""
    plain, named = osora.attach(tiny_llama(), config()), osora.attach(tiny_llama(), config(), name="a")
    assert list(plain.state_dict()) == list(named.state_dict())
    assert not any("@" in name for name in plain.state_dict()) and "adapters=" not in repr(plain)
    osora.remove_adapter(osora.add_adapter(plain, "b"), "b")
    assert list(plain.state_dict()) == list(named.state_dict())


def test_the_active_one_is_trained():
    model, ids = three(), token_ids()
    before = {name: {k: t.clone() for k, t in deltas_of(model, name).items()} for name in "abc"}
    osora.set_adapter(model, "c")
    trained = osora.adapter_parameters(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert {id(p) for p in trained} == {id(p) for p in deltas_of(model, "c").values()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    for name in "abc":
        moved = [not torch.equal(t, before[name][key]) for key, t in deltas_of(model, name).items()]
        assert all(moved) if name == "c" else not any(moved)


def test_parameters_keep_their_identity():
    """An optimiser holds them, and finds them again when its adapter is active again."""
    model = three()
    before = {name: [id(t) for t in deltas_of(model, name).values()] for name in "abc"}
    for name in "bcacb":
        osora.set_adapter(model, name)
        assert [id(p) for p in osora.adapter_parameters(model)] == before[name]
        assert {n: [id(t) for t in deltas_of(model, n).values()] for n in "abc"} == before


def test_a_smaller_rank_trains():
    """The leading columns of the basis: gradients as those of an adapter of that rank in a model of its own."""
    model, ids = three(), token_ids()
    osora.set_adapter(model, "b")
    own = osora.attach(tiny_llama(), config(6))
    osora.detach(own)
    for layer in all_layers(model).values():
        assert layer.rank == 3 and layer.s.shape == (3,) and layer.U.shape[1] == 6
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        padded = copy.deepcopy(model)
    for layer in all_layers(padded).values():  # the same with zeros for what is absent, and S0 too
        layer.S0[3:] = 0
        layer.s = nn.Parameter(torch.cat([layer.s.detach(), torch.zeros(3)]))
        layer.o.grad = None
    padded(ids, labels=ids).loss.backward()
    for one, other in zip(all_layers(model).values(), all_layers(padded).values(), strict=True):
        torch.testing.assert_close(one.s.grad, other.s.grad[:3], **CLOSE)
        torch.testing.assert_close(one.o.grad, other.o.grad, **CLOSE)


def test_a_frozen_model_stays_frozen():
    model = three().requires_grad_(False)
    osora.set_adapter(model, "b")
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_that_it_is_not_in_are_their_bases():
    model = osora.set_adapter(three(), "c")
    out = [name for name, layer in all_layers(model).items() if layer.adapter is None]
    assert out and all(".0." in name for name in out)
    layer, x = all_layers(model)[out[0]], torch.randn(2, 32)
    assert torch.equal(layer(x), layer.base_layer(x)) and "active=None" in repr(layer)
    assert out[0] not in {module.name for module in osora.summary(model).modules}
    assert osora.summary(model).total == osora.summary(osora.set_adapter(model, "a")).total
    assert osora.summary(model).total == sum(p.numel() for p in tiny_llama().parameters())


def test_dropout_is_the_active_one_s():
    model = osora.attach(tiny_llama(), config(dropout=0.5))
    osora.add_adapter(model, "b", config(dropout=0.25))
    layer = next(iter(all_layers(model).values()))
    assert [layer.dropout, osora.set_adapter(model, "b") and layer.dropout] == [0.5, 0.25]


# -- in and out --------------------------------------------------------------------------------------------------------


def test_a_fresh_one_changes_nothing():
    model, ids = three(), token_ids()
    before = logits(model, ids)
    assert osora.add_adapter(model, "d") is model
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(alone(model, "d", ids), logits(tiny_llama(), ids))
    assert [t.shape for t in deltas_of(model, "d").values()] == [t.shape for t in deltas_of(model, "a").values()]


def test_a_fresh_one_in_layers_without_a_basis():
    """Decomposed now, as attach would have done it."""
    model = move(osora.attach(tiny_llama(), config(target_modules=["q_proj"]), name="a"), "a")
    ids = token_ids()
    before = logits(model, ids)
    osora.add_adapter(model, "b", config(4))
    assert torch.equal(logits(model, ids), before)
    whole = osora.attach(tiny_llama(), config(4))
    assert list(all_layers(model)) == list(all_layers(whole))
    for name, layer in all_layers(model).items():
        if "q_proj" not in name:
            assert torch.equal(layer.U, all_layers(whole)[name].U)
    move(model, "b")
    names = ["b", None, "a", "b"]
    ids = token_ids(4, 5)
    got = in_batch(model, names, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], alone(model, name, ids)[row], **CLOSE)
    osora.remove_adapter(model, "b")
    assert all("q_proj" in name for name in all_layers(model))
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 15


def test_ranks_by_energy():
    model = osora.attach(tiny_llama(), config(16), name="a")
    osora.add_adapter(model, "b", config(16, rank_for_energy=0.6))
    osora.add_adapter(model, "c", config(4, rank_for_energy=0.9))
    own = {m.name: m.rank for m in osora.summary(osora.attach(tiny_llama(), config(16, rank_for_energy=0.6))).modules}
    ranks = {m.name: m.rank for m in osora.summary(osora.set_adapter(model, "b")).modules}
    assert ranks == own and len(set(own.values())) > 1
    assert all(m.rank == 4 and "asks for more" in m.note for m in osora.summary(osora.set_adapter(model, "c")).modules)


def test_a_rank_above_the_basis_is_refused():
    model = three()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"has a basis of rank 6, which its adapters share, .*up to 7"):
        osora.add_adapter(model, "d", config(7))
    assert osora.adapter_names(model) == ["a", "b", "c"] and list(model.state_dict()) == before


@pytest.mark.parametrize("name", ["", "a.b", "a", 3, None])
def test_bad_names(name):
    model = three()
    with pytest.raises((ValueError, TypeError), match=r"an adapter's name must|has an adapter 'a' already"):
        osora.add_adapter(model, name)
    assert osora.adapter_names(model) == ["a", "b", "c"]
    if name != "a":
        with pytest.raises((ValueError, TypeError), match=r"an adapter's name must"):
            osora.attach(tiny_llama(), config(), name=name)


@pytest.mark.parametrize("name", ["eval", "train", "o", "U", "weight", "a b", "o@x", "ö/1"])
def test_unusual_names(name):
    model, ids = three(), token_ids(2, 5)
    move(osora.add_adapter(model, name), name)
    other = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(in_batch(other, [name, "a"], ids)[0], alone(model, name, ids)[0], **CLOSE)
    osora.remove_adapter(osora.set_adapter(osora.set_adapter(model, name), "a"), name)
    assert osora.adapter_names(model) == ["a", "b", "c"]


def test_remove():
    model, ids = three(), token_ids()
    wish = {name: alone(model, name, ids) for name in "abc"}
    with pytest.raises(ValueError, match=r"'a' is the active adapter"):
        osora.remove_adapter(model, "a")
    with pytest.raises(ValueError, match="no adapter 'z'"):
        osora.remove_adapter(model, "z")
    osora.remove_adapter(model, "b")
    assert osora.adapter_names(model) == ["a", "c"] and torch.equal(logits(model, ids), wish["a"])
    osora.remove_adapter(osora.set_adapter(model, "c"), "a")
    assert torch.equal(logits(model, ids), wish["c"])
    assert all(".1." in name for name in all_layers(model)), "the other layers are plain again"
    osora.detach(model)
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))


@every_model
def test_detach_gives_the_model_back(make):
    model = make()
    before = {n: id(p) for n, p in model.named_parameters()}, {n: id(m) for n, m in model.named_modules()}
    osora.attach(model, config(), name="a")
    osora.add_adapter(model, "b", config(3))
    osora.set_adapter(model, "b")
    osora.detach(model)
    assert ({n: id(p) for n, p in model.named_parameters()}, {n: id(m) for n, m in model.named_modules()}) == before
    assert all(p.requires_grad for p in model.parameters())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.first(x).tanh()))


def test_a_shared_module():
    model, x = osora.attach(Shared(), config(3, target_modules=["other"])), torch.randn(3, 6)
    move(osora.add_adapter(model, "b", config(2)), "b")
    assert model.first is model.second and len(all_layers(model)) == 2
    with torch.no_grad(), osora.adapters_in_batch(model, ["b", None, "b"]):
        got = model(x)
    with torch.no_grad():
        torch.testing.assert_close(got[1], Shared()(x)[1])
        torch.testing.assert_close(got[[0, 2]], osora.set_adapter(model, "b")(x)[[0, 2]])
    osora.remove_adapter(osora.set_adapter(model, "default"), "b")
    assert type(model.first) is nn.Linear and model.first is model.second


# -- merge, copies, casts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_merge_the_active_one(name):
    model, ids = osora.set_adapter(three(), name), token_ids()
    wish = logits(model, ids)
    torch.testing.assert_close(logits(osora.merge(model), ids), wish, **CLOSE)
    assert torch.equal(logits(osora.unmerge(model), ids), wish)
    torch.testing.assert_close(logits(osora.detach(model, merged=True), ids), wish, **CLOSE)
    assert not all_layers(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("within", [False, True])
def test_copies(copied, within):
    """One made within a batch is outside of it."""
    model, ids = three(), token_ids(2, 5)
    wish = in_batch(model, ["b", "c"], ids)
    if within:
        with osora.adapters_in_batch(model, ["a", "b"]):
            other = copied(model)
    else:
        other = copied(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert torch.equal(in_batch(other, ["b", "c"], ids), wish)
    move(osora.set_adapter(other, "b"), "b")
    assert torch.equal(in_batch(model, ["b", "c"], ids), wish)


def test_state_dicts():
    model, other, ids = three(), three(), token_ids(3, 5)
    for name in "abc":
        move(model, name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(in_batch(other, ["a", "b", "c"], ids), in_batch(model, ["a", "b", "c"], ids))
    with pytest.raises(RuntimeError, match="o@a"):  # another one is active there: no silent exchange
        other.load_state_dict(osora.set_adapter(model, "b").state_dict())


def test_a_cast_and_back_keeps_every_digit():
    model = three()
    before = {name: {k: t.clone() for k, t in deltas_of(model, name).items()} for name in "abc"}
    model.to(torch.bfloat16)
    assert {t.dtype for name in "abc" for t in deltas_of(model, name).values()} == {torch.float32}
    in_batch(model, ["a", "b", "c"], token_ids(3, 5))
    model.to(torch.float32)
    for name in "abc":
        assert all(torch.equal(t, before[name][key]) for key, t in deltas_of(model, name).items())


# -- files -------------------------------------------------------------------------------------------------------------


def saved(model: nn.Module, folder: Path, **options) -> Path:
    osora.save_adapter(model, folder, **options)
    return folder


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_each_is_saved_as_if_it_were_alone(name, save_basis, tmp_path):
    model, ids = three(), token_ids()
    folder = saved(model, tmp_path / "x", name=name, save_basis=save_basis)
    own = osora.load_adapter(tiny_llama(), folder)
    assert osora.adapter_names(own) == ["default"] and same_deltas(own, "default", model, name)
    torch.testing.assert_close(logits(own, ids), alone(model, name, ids), rtol=1e-3, atol=1e-3)
    active = saved(osora.set_adapter(model, name), tmp_path / "y", save_basis=save_basis)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (active / file).read_bytes()
    with pytest.raises(ValueError, match="no adapter 'z'"):
        osora.save_adapter(model, tmp_path / "z", name="z")
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_files_of_separate_models_share_one(order, save_basis, tmp_path):
    """Trained apart, with ranks and layers of their own; loaded in any order, the basis grows where it must."""
    configs = {"a": config(6), "b": config(3), "c": config(9, layers_to_transform=[1])}
    ids, wish = token_ids(4, 5), {}
    for name, its in configs.items():
        own = move_adapter(osora.attach(tiny_llama(), its), 0.1)
        wish[name] = logits(own, ids)
        osora.save_adapter(own, tmp_path / name, save_basis=save_basis)
    model = tiny_llama()
    for name in order:
        before = {n: alone(model, n, ids) for n in (osora.adapter_names(model) if all_layers(model) else [])}
        assert osora.load_adapter(model, tmp_path / name, name=name) is model
        assert all(torch.equal(alone(model, n, ids), value) for n, value in before.items()), "the others are untouched"
    assert osora.adapter_names(model) == list(order) and osora.active_adapter(model) == order[0]
    for name in order:
        # docs/svd.md, "Rebuilding": bases of different runs agree to 10 tol
        torch.testing.assert_close(alone(model, name, ids), wish[name], rtol=5e-3, atol=5e-3)
    names = ["c", None, "a", "b"]
    got = in_batch(model, names, ids)
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], alone(model, name, ids)[row], **CLOSE)
    assert {p.requires_grad for p in osora.adapter_parameters(model)} == {True}
    assert sum(p.requires_grad for p in model.parameters()) == len(osora.adapter_parameters(model))


def test_the_same_file_twice(tmp_path):
    model, ids = three(), token_ids()
    osora.load_adapter(model, saved(model, tmp_path, name="b"), name="d")
    assert same_deltas(model, "b", model, "d") and torch.equal(alone(model, "b", ids), alone(model, "d", ids))


def refused(model: nn.Module, folder: Path, error: type[Exception], words: str, name: str | None = "new") -> None:
    """Loading fails as it should, and the model is the very one it was."""

    def identities() -> list:
        tensors = model.state_dict(keep_vars=True).items()
        return [(n, id(m)) for n, m in model.named_modules()] + [(n, id(t), t.shape) for n, t in tensors]

    ids, before = token_ids(3, 5), identities()
    wish = in_batch(model, ["a", "b", "c"], ids)
    with pytest.raises(error, match=words):
        osora.load_adapter(model, folder, name=name)
    assert identities() == before and osora.adapter_names(model) == ["a", "b", "c"]
    assert torch.equal(in_batch(model, ["a", "b", "c"], ids), wish)


@pytest.mark.parametrize("r", [4, 9])
def test_another_basis_is_refused(r, tmp_path):
    """Vectors turned within it, by hand: its W0 and shapes are right, its function in this basis is not."""
    own = move_adapter(osora.attach(tiny_llama(), config(r)), 0.1)
    layers = list(all_layers(own).values())
    turn = torch.linalg.qr(torch.randn(r, r))[0]
    with torch.no_grad():
        layers[-1].U.copy_(layers[-1].U @ turn)
        layers[-1].V.copy_(layers[-1].V @ turn)
    words = r"model\.layers\.1\.mlp\.down_proj: the adapters of a model share one basis.* off by .*, allowed"
    refused(three(), saved(own, tmp_path), AdapterError, words)


def test_other_singular_values_are_refused(tmp_path):
    own = move_adapter(osora.attach(tiny_llama(), config(4)), 0.1)
    with torch.no_grad():
        list(all_layers(own).values())[3].S0.mul_(1.01)
    folder = saved(own, tmp_path)
    refused(three(), folder, AdapterError, r"o_proj: the adapters of a model share one basis.*basis_sketch off by")
    edit_tensors(folder, lambda tensors: tensors[key("model.layers.0.self_attn.q_proj", "S0")][0].mul_(1.01))
    words = r"0\.self_attn\.q_proj: the adapters of a model share one basis.*S0 off by"
    refused(three(), folder, AdapterError, words)


def test_another_base_is_refused(tmp_path):
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 4] += 0.5
    folder = saved(move_adapter(osora.attach(other, config(4))), tmp_path)
    refused(three(), folder, AdapterError, r"base weight model\.layers\.0\.mlp\.up_proj is not the one")


def test_what_else_is_refused(tmp_path):
    folder = saved(three(), tmp_path / "x")
    refused(three(), folder, ValueError, r"has an osora adapter already: .*name=name", name=None)
    refused(three(), folder, ValueError, r"has an adapter 'b' already", name="b")
    refused(three(), tmp_path / "nowhere", FileNotFoundError, "no adapter here")
    edit(folder, lambda config: described(config)[2].update(dtype="int8"))
    refused(three(), folder, AdapterError, r"dtype must be one of float64, float32, bfloat16, float16, got 'int8'")


def test_a_base_in_another_dtype(tmp_path):
    """As for one adapter: the same weights, rounded, with one warning; and the basis is the same up to rounding."""
    folder = saved(three(), tmp_path / "x", name="b")
    model, ids = three(dtype=torch.float32).to(torch.bfloat16), token_ids()
    with pytest.warns(RuntimeWarning, match="were rounded to another dtype"):
        osora.load_adapter(model, folder, name="d")
    assert torch.equal(alone(model, "d", ids), alone(model, "b", ids))
    own = move_adapter(osora.attach(tiny_llama(), config(4)), 0.1)
    with torch.no_grad():
        for layer in all_layers(own).values():
            turn = torch.linalg.qr(torch.randn(4, 4))[0]
            layer.U.copy_(layer.U @ turn)
            layer.V.copy_(layer.V @ turn)
    with pytest.raises(AdapterError, match="share one basis"), pytest.warns(RuntimeWarning, match="rounded"):
        osora.load_adapter(model, saved(own, tmp_path / "y"), name="e")


# -- with the materialised plan ----------------------------------------------------------------------------------------


def test_the_materialised_plan_goes_along_with_the_active_adapter():
    model, ids = three(), token_ids(3, 5)
    wish = {name: alone(model, name, ids) for name in ("a", "b", "c")}
    mixed = in_batch(model, ["a", "b", "c"], ids)
    osora.set_execution(model, "materialised")
    for name in ("c", "a", "b", "c", "a"):  # c leaves layers alone, which have no plan to follow meanwhile
        torch.testing.assert_close(logits(osora.set_adapter(model, name), ids), wish[name], **CLOSE)
        assert {layer.execution for layer in all_layers(model).values()} == {"materialised"}
        torch.testing.assert_close(in_batch(model, ["a", "b", "c"], ids), mixed, **CLOSE)
    osora.set_adapter(model, "c")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        torch.testing.assert_close(logits(other, ids), wish["c"], **CLOSE)
        torch.testing.assert_close(logits(osora.set_adapter(other, "a"), ids), wish["a"], **CLOSE)
    osora.set_adapter(model, "a")
    move(model, "a", 0.2)
    assert not torch.allclose(logits(model, ids), wish["a"], **CLOSE)
