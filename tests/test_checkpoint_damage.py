# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile adapters are refused, and a save that goes wrong costs nothing."""

import os
from pathlib import Path

import pytest
import torch
from adapters import FILES, adapted, both, edit, edit_tensors, refused
from helpers import logits, move_adapter, tiny_llama, token_ids
from torch import Tensor, nn

from osora import AdapterError, checkpoint, load_adapter, save_adapter
from osora.patch import adapted_layers


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 6)
        self.second = self.first


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with its basis, for a fresh tiny_llama()."""
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(share, saved):
    path = saved / FILES[1]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(saved, "is damaged, or not the file .* SHA-256 differs")


@pytest.mark.parametrize("where", [0, 9, 0.3, 0.7, -1])
def test_a_flipped_bit(where, saved):
    path = saved / FILES[1]
    data = bytearray(path.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 4
    path.write_bytes(data)
    refused(saved, "SHA-256 differs")


def test_no_safetensors_file(saved):
    (saved / FILES[1]).write_bytes(b"not tensors at all" * 9)
    edit(saved, lambda config: config.update(tensors_sha256=checkpoint._file_sha256(saved / FILES[1])))
    refused(saved, "is no readable safetensors file")


DOWN = "model.layers.1.mlp.down_proj"
TENSOR_DAMAGE = {
    "missing": (lambda t: t.pop(f"{DOWN}.s"), rf"lacks 1 tensors, the first of which is {DOWN}\.s"),
    "no singular values": (lambda t: t.pop("singular_values"), "lacks 1 tensors.*singular_values"),
    "extra": (lambda t: t.update(more=torch.zeros(3)), r"1 tensors .* does not name, the first is more"),
    "shape": (lambda t: t.update({f"{DOWN}.o": torch.zeros(31)}), r"down_proj\.o must have shape \[32\], got \[31\]"),
    "transposed": (
        lambda t: t.update({f"{DOWN}.U": t[f"{DOWN}.U"].t().contiguous()}),
        r"\.U must have shape \[32, 5\]",
    ),
    "NaN": (lambda t: t[f"{DOWN}.o"].__setitem__(3, float("nan")), r"down_proj\.o must hold finite"),
    "infinity": (lambda t: t[f"{DOWN}.V"].__setitem__((3, 1), float("inf")), r"down_proj\.V must hold finite"),
    "integers": (lambda t: t.update({f"{DOWN}.s": torch.ones(5).int()}), r"\.s must hold finite floating-point values"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_wrong_tensors(damage, saved):
    change, message = TENSOR_DAMAGE[damage]
    edit_tensors(saved, change)
    refused(saved, message)


def module(**values):
    return lambda config: config["modules"][3].update(values)


CONFIG_DAMAGE = {
    "foreign method": (lambda c: c.update(method="lora"), "describes no osora adapter: method is 'lora'"),
    "newer": (lambda c: c.update(format_version=2), "has format_version 2, this osora reads 1: use"),
    "no version": (lambda c: c.pop("format_version"), "has format_version None"),
    "no modules": (lambda c: c.pop("modules"), "modules is missing or no list"),
    "modules empty": (lambda c: c.update(modules=[]), "modules is empty"),
    "module twice": (lambda c: c["modules"].append(c["modules"][0]), "a module is listed twice"),
    "module no dict": (lambda c: c["modules"].append("q_proj"), "a module's name is missing"),
    "config no dict": (lambda c: c.update(config=3), "config is missing or no dict"),
    "unknown option": (lambda c: c["config"].update(alpha=3), "OsoraConfig has no field alpha"),
    "wrong option": (lambda c: c["config"].update(r=0), "r must be at least 1"),
    "save_basis a word": (lambda c: c.update(save_basis="no"), "save_basis is missing or no bool"),
    "rank a word": (module(rank="5"), "a module's rank is missing or no int"),
    "rank too large": (module(rank=6), r"lacks|must have shape"),
    "rank negative": (module(rank=-5), "."),
    "rank zero": (module(rank=0), "."),
    "rank huge": (module(rank=10**18), "."),
    "no digest": (module(weight_sha256=None), "weight_sha256 is missing or no str"),
    "other digest": (module(weight_sha256="0" * 64), "is not the one this adapter was trained on"),
    "short sketch": (module(weight_sketch=[1.0]), "weight_sketch must be 4 finite numbers"),
    "sketch of words": (module(delta_sketch=["a"] * 4), "delta_sketch must be 4 finite numbers"),
    "sketch of NaN": (module(basis_sketch=[float("nan")] * 4), "basis_sketch must be 4 finite numbers"),
    "sketch too large": (module(weight_sketch=[10**400] * 4), "weight_sketch must be 4 finite numbers"),
    "dtype no dtype": (module(dtype="load", weight_sha256=""), "is not the one this adapter was trained on"),
    "dtype of integers": (module(dtype="int8", weight_sha256=""), "is not the one this adapter was trained on"),
    "dtype with a dot": (module(dtype="nn.Linear", weight_sha256=""), "is not the one this adapter was trained on"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_wrong_configs(damage, saved):
    change, message = CONFIG_DAMAGE[damage]
    edit(saved, change)
    refused(saved, message)


@pytest.mark.parametrize(
    "name", ["../x", "__class__", "", ".", "model..layers", "a.b", "model", "model.layers", "forward", "/etc/passwd"]
)
@both
def test_hostile_names(name, save_basis, tmp_path):
    save_adapter(adapted(), tmp_path, save_basis=save_basis)

    def rename(t: dict[str, Tensor]) -> None:
        for key in [key for key in t if key.startswith(f"{DOWN}.")]:
            t[f"{name}.{key.rpartition('.')[2]}"] = t.pop(key)

    edit_tensors(tmp_path, rename)
    edit(tmp_path, lambda config: config["modules"][-1].update(name=name))
    refused(tmp_path, "which this model does not have|osora adapts torch.nn.Linear", error=ValueError)


@both
def test_one_module_under_two_names_is_refused(save_basis, tmp_path):
    """Which of two adapters would a shared layer have? And a property (base_model) is another name for a module."""
    save_adapter(adapted(Shared, r=3), tmp_path, save_basis=save_basis)

    def twice(t: dict[str, Tensor]) -> None:
        t |= {key.replace("first", "second"): value.clone() for key, value in t.items() if key.startswith("first")}
        t["singular_values"] = t["singular_values"].repeat(2)

    edit_tensors(tmp_path, twice)
    edit(tmp_path, lambda config: config["modules"].append(config["modules"][0] | {"name": "second"}))
    model = Shared()
    with pytest.raises(AdapterError, match="second"):
        load_adapter(model, tmp_path)
    assert type(model.first) is nn.Linear

    save_adapter(adapted(), tmp_path, save_basis=save_basis)
    alias = "base_model." + DOWN.removeprefix("model.")
    edit_tensors(tmp_path, lambda t: [t.update({k.replace(DOWN, alias): t.pop(k)}) for k in list(t) if DOWN in k])
    edit(tmp_path, lambda config: config["modules"][-1].update(name=alias))
    refused(tmp_path, "base_model")


def test_a_head_that_is_tied_now_is_refused(tmp_path):
    save_adapter(adapted(lambda: tiny_llama(tied=False), target_modules=["lm_head"]), tmp_path)
    refused(tmp_path, "weight of lm_head is tied")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff\xfe", "is not valid JSON"),
        ("[]", "describes no osora adapter: method is None"),
        ("null", "describes no osora adapter"),
        ('{"peft_type": "LORA", "r": 8}', "describes no osora adapter: method is 'LORA'"),
    ],
    ids=["empty", "cut", "deep", "bytes", "list", "null", "peft"],
)
def test_other_configs(text, message, saved):
    (saved / FILES[0]).write_bytes(text.encode("latin-1"))
    refused(saved, message)


@pytest.mark.parametrize("gone", FILES)
def test_a_missing_file(gone, saved):
    (saved / gone).unlink()
    refused(saved, rf"{gone} does not exist", error=FileNotFoundError)
    refused(saved / "nowhere", "no adapter here", error=FileNotFoundError)


def test_the_tensors_of_another_save(saved, tmp_path):
    save_adapter(move_adapter(adapted(), 0.2), tmp_path / "other")
    os.replace(tmp_path / "other" / FILES[1], saved / FILES[1])
    refused(saved, "SHA-256 differs")


# -- saving goes wrong -----------------------------------------------------------------------------------------------


class DiskIsFull(OSError):
    pass


def fail(*_, **__):
    raise DiskIsFull


def half_a_file(tensors, path, metadata=None):
    Path(path).write_bytes(b"half")
    raise DiskIsFull


FAILURES = {
    "tensors": lambda patch: patch.setattr(checkpoint, "save_file", half_a_file),
    "digest": lambda patch: patch.setattr(checkpoint, "_file_sha256", fail),
    "config": lambda patch: patch.setattr(checkpoint.Path, "write_text", fail),
    "json": lambda patch: patch.setattr(checkpoint.json, "dumps", fail),
    "sync": lambda patch: patch.setattr(checkpoint.os, "fsync", fail),
    "mode": lambda patch: patch.setattr(checkpoint.os, "chmod", fail),
    "rename": lambda patch: patch.setattr(checkpoint.os, "replace", fail),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_leaves_the_old_adapter_and_nothing_else(failure, saved, monkeypatch):
    old, ids = adapted(), token_ids()
    bytes_before = {name: (saved / name).read_bytes() for name in FILES}
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(DiskIsFull):
            save_adapter(move_adapter(adapted(r=3)), saved)
    assert sorted(os.listdir(saved)) == FILES
    assert {name: (saved / name).read_bytes() for name in FILES} == bytes_before
    assert logits(load_adapter(tiny_llama(), saved), ids).shape == logits(old, ids).shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_not_saved(bad, saved):
    model = adapted()
    list(adapted_layers(model).values())[-1].o.data[2] = bad
    before = [(saved / name).read_bytes() for name in FILES]
    with pytest.raises(ValueError, match=rf"{DOWN}\.o has NaN or infinite values; the adapter is not saved"):
        save_adapter(model, saved)
    assert [(saved / name).read_bytes() for name in FILES] == before


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"no osora adapter: call osora\.attach"):
        save_adapter(tiny_llama(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    refused(tmp_path / "file", "no adapter here", error=FileNotFoundError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        save_adapter(adapted(), tmp_path)
    assert not os.listdir(tmp_path)
