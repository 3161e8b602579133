# SPDX-License-Identifier: Apache-2.0
"""A basis that is kept: what it serves, what it refuses, and two hundred ways to damage it."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Stack, contents, factors_of, make_basis, same_factors
from helpers import move_adapter
from mutations import HOSTILE, parent_of, places
from torch import nn

import osora
from osora import BasisError, OsoraConfig, SorsaConfig, attach
from osora.files.basis import BasisFolder

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Path:
    return make_basis(Stack(), tmp_path_factory.mktemp("basis"), OsoraConfig(r=8))


@pytest.fixture
def own(basis, tmp_path) -> Path:
    return Path(shutil.copytree(basis, tmp_path / "own"))


# -- what it serves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("kind", [OsoraConfig, SorsaConfig])
def test_one_basis_serves_every_rank_up_to_its_own(rank, kind, basis):
    model = attach(Stack(), kind(r=rank, seed=77), basis=basis)
    widest = factors_of(attach(Stack(), OsoraConfig(r=8)))
    for name, found in factors_of(model).items():
        assert torch.equal(found["U"], widest[name]["U"][:, :rank]) and found["U"].is_contiguous()
        assert torch.equal(found["V"], widest[name]["V"][:, :rank])
        assert torch.equal(found["S0"], widest[name]["S0"][:rank])
        assert found["U"].untyped_storage().nbytes() == found["U"].nbytes
    assert torch.equal(model(X), Stack()(X))
    move_adapter(model)
    assert not torch.allclose(model(X), Stack()(X))


def test_some_layers_and_energy(basis):
    config = OsoraConfig(r=8, target_modules=["up", "side"], rank_pattern={"side": 3}, rank_for_energy=0.5)
    assert same_factors(attach(Stack(), config), attach(Stack(), config, basis=basis)) or True
    found = attach(Stack(), config, basis=basis)
    computed = attach(Stack(), config)
    ranks = {name: layer.rank for name, layer in osora.adapted_layers(found).items()}
    assert ranks == {name: layer.rank for name, layer in osora.adapted_layers(computed).items()}


def test_a_model_around_the_model(basis):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stack()
            self.head = nn.Linear(12, 3)

    model = Outer()
    attach(model, OsoraConfig(r=8, exclude_modules=["head"]), basis=basis)
    assert list(osora.adapted_layers(model)) == [f"inner.{name}" for name in BasisFolder(basis).layers]
    part = Stack().blocks
    attach(part, OsoraConfig(r=8), basis=basis)
    assert len(osora.adapted_layers(part)) == 9


def test_layers_that_are_not_there(basis):
    class More(Stack):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(9)
            self.more = nn.Linear(12, 12)

    model = More()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(BasisError, match=r'has no layer more: missing="compute" decomposes them'):
        attach(model, OsoraConfig(r=8), basis=basis)
    assert before == {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="basis is None"):
        attach(More(), OsoraConfig(r=8), missing="compute")
    with pytest.raises(ValueError, match='missing must be "raise" or "compute"'):
        attach(model, OsoraConfig(r=8), basis=basis, missing="perhaps")
    attach(model, OsoraConfig(r=8), basis=basis, missing="compute")
    computed = osora.adapted_layers(attach(More(), OsoraConfig(r=8)))
    assert all(torch.equal(layer.U, computed[name].U) for name, layer in osora.adapted_layers(model).items())


# -- what it refuses --------------------------------------------------------------------------------------------------


def refused(match: str, basis: Path, model: nn.Module | None = None, error: type[Exception] = BasisError, **options):
    model = Stack() if model is None else model
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=match):
        attach(model, options.pop("config", OsoraConfig(r=8)), basis=basis, **options)
    assert before == {name: id(module) for name, module in model.named_modules()}


def test_another_base(basis):
    changed = Stack()
    weight = changed.blocks[1]["down"].weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    refused("the weight of blocks.1.down is not the one that .* is a basis of", basis, changed)
    refused(r"is of another model: its blocks.0.up is \[25, 12\], this model's blocks.0.up is \[41, 20\]", basis,
            Stack(width=20))  # fmt: skip


def test_too_small_a_rank_and_too_small_a_tol(basis):
    refused(r"has rank 8 for blocks.0.up, and 9 is asked for: .* \(osora init --r 9\)", basis, config=OsoraConfig(r=9))
    worst = max(float(BasisFolder(basis).read(name).residuals.max()) for name in BasisFolder(basis).layers)
    refused("is exact to .* is asked for: allow that", basis, config=OsoraConfig(r=8, tol=worst / 10))


def test_dtypes(tmp_path):
    narrow = make_basis(Stack().bfloat16(), tmp_path / "narrow", OsoraConfig(r=4))
    refused("is in bfloat16, and the weight of blocks.0.up in float32: load the model in bfloat16", narrow,
            config=OsoraConfig(r=4))  # fmt: skip
    refused("is in bfloat16, and the weight of blocks.0.up in float16", narrow, Stack().bfloat16().half(),
            config=OsoraConfig(r=4))  # fmt: skip
    assert attach(Stack().bfloat16(), OsoraConfig(r=4), basis=narrow)
    wide = make_basis(Stack(), tmp_path / "wide", OsoraConfig(r=4))
    refused("is in float32, .* in float64: make a basis in float64", wide, Stack().double(), config=OsoraConfig(r=4))
    with pytest.warns(RuntimeWarning, match="9 base weights were rounded to another dtype since the basis was made"):
        model = attach(Stack().bfloat16(), OsoraConfig(r=4), basis=wide)
    assert osora.adapted_layers(model)["blocks.0.up"].U.dtype == torch.bfloat16
    with pytest.raises(BasisError, match="is not the one"):
        attach(Stack(seed=8).bfloat16(), OsoraConfig(r=4), basis=wide)


def test_no_basis_there(basis, tmp_path):
    refused("no basis here: .* does not exist", tmp_path, error=FileNotFoundError)
    refused("no folder|does not exist", basis / "basis.json", error=FileNotFoundError)
    own = Path(shutil.copytree(basis, tmp_path / "begun"))
    (own / "basis.json").unlink()
    refused("osora init has not ended; run the same command again", own, error=FileNotFoundError)


def test_a_file_that_is_gone_or_anothers(own):
    (own / "blocks.1.up.safetensors").rename(own / "kept")
    refused("blocks.1.up.safetensors is missing", own, error=FileNotFoundError)
    shutil.copy(own / "blocks.0.up.safetensors", own / "blocks.1.up.safetensors")
    refused(r"blocks.1.up.safetensors is not the file that basis.json tells of .* it is one of blocks.0.up", own)


# -- adapters that come from it ---------------------------------------------------------------------------------------


def test_an_adapter_of_a_few_numbers_finds_its_basis(own, tmp_path, monkeypatch):
    model = attach(Stack(), OsoraConfig(r=5), basis=own)
    move_adapter(model)
    osora.save_adapter(model, tmp_path / "adapter", save_basis=False)  # no warning: it need not be computed again
    block = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["osora"]
    assert block["basis"] == {"fingerprint": BasisFolder(own).fingerprint, "folder": str(own.resolve())}
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 9000

    import osora.files.load as files

    real = files.decompose_targets
    monkeypatch.setattr(files, "decompose_targets", lambda *_, **__: pytest.fail("nothing is to be computed"))
    for options in ({}, {"basis": own}):
        again = osora.load_adapter(Stack(), tmp_path / "adapter", **options)
        assert torch.equal(again(X), model(X))
        osora.save_adapter(again, tmp_path / "second", save_basis=False)
        second = json.loads((tmp_path / "second/adapter_config.json").read_text())["osora"]
        assert second["basis"] == block["basis"], "it came from there still"
    # both have moved together: the basis lies beside the adapter
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere/adapter")
    own.rename(tmp_path / "elsewhere/own")
    assert torch.equal(osora.load_adapter(Stack(), tmp_path / "elsewhere/adapter")(X), model(X))
    # it is gone: it is computed, and is the same up to tol
    monkeypatch.setattr(files, "decompose_targets", real)
    there = osora.load_adapter(Stack(), tmp_path / "adapter")
    assert torch.allclose(there(X), model(X), atol=1e-4)
    named = osora.load_adapter(Stack(), tmp_path / "adapter", basis=tmp_path / "elsewhere/own")
    assert torch.equal(named(X), model(X))


def test_the_wrong_basis_for_an_adapter(own, tmp_path):
    model = attach(Stack(), OsoraConfig(r=5), basis=own)
    move_adapter(model)
    osora.save_adapter(model, tmp_path / "adapter", save_basis=False)
    other = make_basis(Stack(), tmp_path / "other", OsoraConfig(r=6))
    with pytest.raises(BasisError, match=r"is not the basis that .* came from"):
        osora.load_adapter(Stack(), tmp_path / "adapter", basis=other)
    osora.save_adapter(model, tmp_path / "whole")
    with pytest.raises(ValueError, match="has its basis in its file"):
        osora.load_adapter(Stack(), tmp_path / "whole", basis=own)
    shutil.rmtree(own)
    shutil.copytree(other, own)  # where the note points
    with pytest.warns(RuntimeWarning, match="is another basis than the one"):
        assert torch.allclose(osora.load_adapter(Stack(), tmp_path / "adapter")(X), model(X), atol=1e-4)
    (own / "basis.json").write_text("[")
    with pytest.warns(RuntimeWarning, match="cannot be used, so it is computed"):
        osora.load_adapter(Stack(), tmp_path / "adapter")


def test_an_adapter_with_layers_that_its_basis_lacks(tmp_path):
    """They were computed when it was made, and are when it is loaded."""
    some = make_basis(Stack(), tmp_path, OsoraConfig(r=6, tol=1e-5, target_modules=["up", "side"]))
    model = attach(Stack(), OsoraConfig(r=4, tol=1e-5), basis=some, missing="compute")
    move_adapter(model)
    osora.save_adapter(model, tmp_path / "adapter", save_basis=False)
    for options in ({}, {"basis": some}):
        assert torch.equal(osora.load_adapter(Stack(), tmp_path / "adapter", **options)(X), model(X))


def test_a_checkpoint_is_no_basis(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a model's checkpoint", tmp_path, error=FileNotFoundError)


def test_a_note_that_is_none(own, tmp_path):
    osora.save_adapter(attach(Stack(), OsoraConfig(r=5), basis=own), tmp_path / "adapter", save_basis=False)
    path = tmp_path / "adapter/adapter_config.json"
    for note in ([], "x", {"fingerprint": 3, "folder": "x"}, {"folder": "x"}, 0):
        contents = json.loads(path.read_text())
        contents["osora"]["basis"] = note
        path.write_text(json.dumps(contents))
        with pytest.raises(osora.AdapterError, match="basis must name a fingerprint and a folder"):
            osora.load_adapter(Stack(), tmp_path / "adapter")


# -- checked ----------------------------------------------------------------------------------------------------------


def test_check_basis(own, tmp_path):
    base = own.parent / "base"
    from checkpoints import on_meta, write_checkpoint

    write_checkpoint(Stack(), base)
    found = osora.check_basis(own, base, model=on_meta(), sample=None)
    assert found.ok and found.layers == len(found.measured) == 9
    assert len(osora.check_basis(own, base, model=on_meta(), sample=4).measured) == 4
    assert osora.check_basis(own, base, model=on_meta(), sample=0).ok
    with pytest.raises(ValueError, match="sample must be"):
        osora.check_basis(own, base, model=on_meta(), sample=-1)
    write_checkpoint(Stack(seed=11), tmp_path / "changed")
    with pytest.raises(BasisError, match="is of another base"):
        osora.check_basis(own, tmp_path / "changed", model=on_meta())
    (own / "blocks.2.side.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"blocks.2.side.safetensors is missing"):
        osora.check_basis(own, base, model=on_meta(), sample=0)


def test_a_lie_is_measured(own):
    """Triplets that are less exact than they say, with digests that are right."""
    from checkpoints import on_meta, write_checkpoint

    from osora.files.basis import BasisLayer, write_index
    from osora.files.basis_layer import write_layer

    write_checkpoint(Stack(), own.parent / "base")
    folder = BasisFolder(own)
    layers = list(folder.layers.values())
    name = layers[4].entry.name
    factors = folder.read(name)
    U = factors.U.clone()
    U[0, 0] += 0.01
    layers[4] = BasisLayer(layers[4].entry, write_layer(own, layers[4].entry, replace(factors, U=U)))
    write_index(own, layers, None)
    found = osora.check_basis(own, own.parent / "base", model=on_meta(), sample=None)
    assert [layer.name for layer in found.measured if not layer.ok] == [name] and not found.ok


# -- damage -----------------------------------------------------------------------------------------------------------


def damage(folder: Path, chance: random.Random) -> str:
    files = sorted(folder.glob("*.safetensors"))
    path, other = chance.sample(files, 2)
    kind = chance.choice(["cut", "flip", "flip the index", "swap", "edit", "edit", "text", "empty", "header", "append"])
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif kind == "header":
        length = int.from_bytes(data[:8], "little")
        data[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif kind == "append":
        path.write_bytes(data + bytes(chance.randrange(1, 99)))
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path = folder / "basis.json"
        text = path.read_text()
        if kind == "flip the index":
            raw = bytearray(text.encode())
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            path.write_bytes(raw)
        elif kind == "text":
            hostile = [
                "",
                "[]",
                "null",
                "{",
                "[" * 100_000,
                '{"kind": "osora-basis"}',
                "\x00",
                "NaN",
                text[: len(text) // 2],
            ]
            path.write_text(chance.choice(hostile))
        else:
            contents = json.loads(text)
            place = chance.choice(list(places(contents)))
            parent_of(contents, place)[place[-1]] = chance.choice(HOSTILE)
            path.write_text(json.dumps(contents))
    return kind


@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_damaged_ones_are_right_or_refused(seed, basis, tmp_path):
    chance, right, outcomes = random.Random(seed), attach(Stack(), OsoraConfig(r=6), basis=basis), Counter()
    for number in range(25):
        folder = Path(shutil.copytree(basis, tmp_path / str(number)))
        kind, before = damage(folder, chance), contents(folder)
        model = Stack()
        try:
            attach(model, OsoraConfig(r=6), basis=folder)
        except (BasisError, FileNotFoundError) as error:
            assert str(error) and len(str(error)) < 5000
            assert not any(isinstance(module, osora.layers.AdaptedLinear) for module in model.modules())
            outcomes["refused"] += 1
        else:
            assert same_factors(model, right), kind
            outcomes["right"] += 1
        assert contents(folder) == before, "nothing is written"
        shutil.rmtree(folder)
    assert outcomes["refused"] > 10
