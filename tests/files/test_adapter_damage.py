# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile adapters are refused, and a save that goes wrong costs nothing."""

import os
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_llama, token_ids
from processes import run_program
from safetensors.torch import load_file, save_file
from saved_adapters import FILES, adapted, both, described, edit, edit_tensors, key, refused
from torch import Tensor, nn

from osora import AdapterError, SorsaConfig, adapted_layers, attach, load_adapter, save_adapter
from osora.files import format as adapter_file


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
    refused(saved, "is damaged, or no safetensors file")


@pytest.mark.parametrize("where", [0, 9, 0.05, 0.3, 0.5, 0.7, 0.9, -1])
def test_a_flipped_bit(where, saved):
    """In the length of the header, in the header, in a tensor."""
    path = saved / FILES[1]
    data = bytearray(path.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 4
    path.write_bytes(data)
    refused(saved, r"is damaged, or no safetensors file|are damaged, or not those|lacks 1 tensors|must hold finite")


@pytest.mark.parametrize("kinds", ["os", "UV"])
def test_tensors_of_two_modules_exchanged(kinds, saved):
    """Same shapes, finite, and all there: the digest tells whose they are."""
    path, (one, two) = saved / FILES[1], ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    tensors = load_file(path)
    for kind in kinds:
        a, b = key(one, kind), key(two, kind)
        tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path)
    refused(saved, r"of model\.layers\.0\.mlp\.up_proj are damaged, or not those that adapter_config\.json was written")


def test_no_safetensors_file(saved):
    (saved / FILES[1]).write_bytes(b"not tensors at all" * 9)
    refused(saved, "is damaged, or no safetensors file")


def test_a_pickle_is_not_read(saved):
    """Not even its first byte: it is not there to be read but to be named."""
    (saved / FILES[1]).rename(saved / "adapter_model.bin")
    refused(saved, "adapter_model.bin is a pickle, which osora never reads", error=FileNotFoundError)


DOWN = "model.layers.1.mlp.down_proj"
TENSOR_DAMAGE = {
    "missing": (lambda t: t.pop(key(DOWN, "s")), rf"lacks 1 tensors, the first of which is \S+{DOWN}\.osora_s\.weight"),
    "no singular values": (lambda t: t.pop(key(DOWN, "S0")), "lacks 1 tensors.*osora_S0"),
    "extra": (lambda t: t.update(more=torch.zeros(3)), r"1 tensors .* does not name, the first is more"),
    "shape": (
        lambda t: t.update({key(DOWN, "o"): torch.zeros(31)}),
        r"down_proj\.osora_o\.weight must have shape \[32\], got \[31\]",
    ),
    "transposed": (
        lambda t: t.update({key(DOWN, "U"): t[key(DOWN, "U")].t().contiguous()}),
        r"osora_U must have shape \[32, 5\]",
    ),
    "NaN": (lambda t: t[key(DOWN, "o")].__setitem__(3, float("nan")), r"down_proj\.osora_o\.weight must hold finite"),
    "infinity": (
        lambda t: t[key(DOWN, "V")].__setitem__((3, 1), float("inf")),
        r"down_proj\.osora_V must hold finite",
    ),
    "integers": (
        lambda t: t.update({key(DOWN, "s"): torch.ones(5).int()}),
        r"osora_s\.weight must hold finite floating-point values",
    ),
    "8 bits": (  # of which torch cannot say whether they are finite
        lambda t: t.update({key(DOWN, "V"): t[key(DOWN, "V")].to(torch.float8_e4m3fn)}),
        r"osora_V must hold finite floating-point values of 16 bits or more \(torch\.float8_e4m3fn\)",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_wrong_tensors(damage, saved):
    change, message = TENSOR_DAMAGE[damage]
    edit_tensors(saved, change)
    refused(saved, message)


def block(**values):
    return lambda config: config["osora"].update(values)


def module(**values):
    return lambda config: described(config)[3].update(values)


CONFIG_DAMAGE = {
    "foreign method": (lambda c: c.update(peft_type="LORA"), "describes no osora adapter: peft_type is 'LORA'"),
    "another method": (lambda c: c.update(peft_type="SORSA"), "lacks|no option"),
    "type no text": (lambda c: c.update(peft_type=["OSORA"]), "describes no osora adapter"),
    "no block": (lambda c: c.pop("osora"), 'has no block "osora": it says how an adapter is to be made'),
    "block no dict": (lambda c: c.update(osora=[3]), 'has no block "osora"'),
    "newer": (block(format_version=3), "has format_version 3, this osora reads 2: use"),
    "version true": (block(format_version=True), "has format_version True"),
    "no version": (lambda c: c["osora"].pop("format_version"), "has format_version None"),
    "version 1": (
        lambda c: [c.clear(), c.update(method="osora", format_version=1)],
        "has format_version 1, of before osora's first release",
    ),
    "no modules": (lambda c: c["osora"].pop("modules"), "modules is missing or no list"),
    "modules empty": (block(modules=[]), "modules is empty"),
    "module twice": (lambda c: described(c).append(described(c)[0]), "a module is listed twice"),
    "module no dict": (lambda c: described(c).append("q_proj"), "a module's name is missing"),
    "unknown option": (lambda c: c.update(beta=3), "osora has no option beta"),
    "option of another method": (lambda c: c.update(alpha=3), "osora has no option alpha"),
    "wrong option": (lambda c: c.update(r=0), "r must be at least 1"),
    "trained biases": (lambda c: c.update(bias="all"), "was trained with bias='all', .* load it with PEFT"),
    "whole modules": (
        lambda c: c.update(modules_to_save=["lm_head"]),
        "trained with modules_to_save=.*has no tensor of such",
    ),
    "save_basis a word": (block(save_basis="no"), "save_basis is missing or no bool"),
    "no basis after all": (block(save_basis=False), "28 tensors adapter_config.json does not name"),
    "rank a word": (module(rank="5"), "a module's rank is missing or no int"),
    "rank too large": (module(rank=6), r"lacks|must have shape"),
    "rank negative": (module(rank=-5), "a module's rank must be at least 1, got -5"),
    "rank zero": (module(rank=0), "a module's rank must be at least 1, got 0"),
    "no rows": (module(out_features=0), "a module's out_features must be at least 1, got 0"),
    "rank huge": (module(rank=10**18), "."),
    "other values": (module(values_sha256="0" * 64), "o, s, S0 of .* are damaged"),
    "other basis": (module(basis_sha256="0" * 64), "U, V of .* are damaged"),
    "no digest": (module(weight_sha256=None), "weight_sha256 is missing or no str"),
    "other digest": (module(weight_sha256="0" * 64), "is not the one this adapter was trained on"),
    "short sketch": (module(weight_sketch=[1.0]), "weight_sketch must be 4 finite numbers"),
    "sketch of words": (module(delta_sketch=["a"] * 4), "delta_sketch must be 4 finite numbers"),
    "sketch of NaN": (module(basis_sketch=[float("nan")] * 4), "basis_sketch must be 4 finite numbers"),
    "sketch too large": (module(weight_sketch=[10**400] * 4), "weight_sketch must be 4 finite numbers"),
    "dtype no dtype": (module(dtype="load"), "dtype must be one of float64, float32, bfloat16, float16, got 'load'"),
    "dtype of integers": (module(dtype="int8"), "a module's dtype must be one of"),
    "dtype with a dot": (module(dtype="nn.Linear"), "a module's dtype must be one of"),
    "an expression too deep": (lambda c: c.update(target_modules="(" * 20_000), "is not a regular expression"),
    "an expression too large": (lambda c: c.update(exclude_modules=f"a{{{2**70}}}"), "is not a regular expression"),
    "a start beyond float32": (lambda c: c.update(initial_o=1e300), "initial_o must be from 1e-20 to 1e20"),
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
        for kind in ["o", "s", "S0", "U", "V"]:
            if key(DOWN, kind) in t:
                t[key(name, kind)] = t.pop(key(DOWN, kind))

    edit(tmp_path, lambda config: described(config)[-1].update(name=name))
    edit_tensors(tmp_path, rename)
    refused(tmp_path, "which this model does not have|osora adapts torch.nn.Linear", error=ValueError)


@both
def test_one_module_under_two_names_is_refused(save_basis, tmp_path):
    """Which of two adapters would a shared layer have? And a property (base_model) is another name for a module."""
    save_adapter(adapted(Shared, r=3), tmp_path, save_basis=save_basis)

    def twice(t: dict[str, Tensor]) -> None:
        t |= {key.replace("first", "second"): value.clone() for key, value in t.items()}

    edit(tmp_path, lambda config: described(config).append(described(config)[0] | {"name": "second"}))
    edit_tensors(tmp_path, twice)
    model = Shared()
    with pytest.raises(AdapterError, match="second"):
        load_adapter(model, tmp_path)
    assert type(model.first) is nn.Linear

    save_adapter(adapted(), tmp_path, save_basis=save_basis)
    alias = "base_model." + DOWN.removeprefix("model.")
    edit(tmp_path, lambda config: described(config)[-1].update(name=alias))
    edit_tensors(tmp_path, lambda t: [t.update({k.replace(DOWN, alias): t.pop(k)}) for k in list(t) if DOWN in k])
    refused(tmp_path, "base_model")


@both
def test_a_module_of_rank_0(save_basis, tmp_path):
    """With tensors to match: nothing can be computed with it."""
    save_adapter(adapted(), tmp_path, save_basis=save_basis)

    def shorten(t: dict[str, Tensor]) -> None:
        for kind in ("s", "S0", "U", "V"):
            if key(DOWN, kind) in t:
                t[key(DOWN, kind)] = t[key(DOWN, kind)][..., :0].contiguous()

    edit(tmp_path, lambda config: described(config)[-1].update(rank=0))
    edit_tensors(tmp_path, shorten)
    refused(tmp_path, "rank must be at least 1")


def test_an_alpha_beyond_float32(tmp_path):
    """Its change is NaN, which no difference is larger than."""
    model = attach(tiny_llama(), SorsaConfig(r=5, alpha=3.0))
    save_adapter(model, tmp_path)
    for alpha in (1e300, 1e38, 1e-300):
        edit(tmp_path, lambda config, alpha=alpha: config.update(alpha=alpha))
        refused(tmp_path, "alpha must be from 1e-20 to 1e20")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_in_another_dtype_with_values_that_are_none(bad, saved):
    """Neither its norm nor its sketch is a number, which no comparison would find too large."""

    def broken() -> nn.Module:
        model = tiny_llama(dtype=torch.bfloat16)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 5] = bad
        return model

    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.up_proj is not the one this adapter was trained on"):
        load_adapter(broken(), saved)


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
        ("[]", "describes no osora adapter: peft_type is None"),
        ("null", "describes no osora adapter"),
        ('{"peft_type": "LORA", "r": 8}', "describes no osora adapter: peft_type is 'LORA'"),
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
    refused(saved, "are damaged, or not those that adapter_config.json was written with")


# -- saving goes wrong -----------------------------------------------------------------------------------------------


class DiskIsFull(OSError):
    pass


def fail(*_, **__):
    raise DiskIsFull


def half_a_file(tensors, path, metadata=None):
    Path(path).write_bytes(b"half")
    raise DiskIsFull


FAILURES = {
    "tensors": lambda patch: patch.setattr(adapter_file, "save_file", half_a_file),
    "digest": lambda patch: patch.setattr(adapter_file.fingerprint, "tensors_digest", fail),
    "config": lambda patch: patch.setattr(adapter_file.Path, "write_text", fail),
    "json": lambda patch: patch.setattr(adapter_file.json, "dumps", fail),
    "sync": lambda patch: patch.setattr(adapter_file.os, "fsync", fail),
    "mode": lambda patch: patch.setattr(adapter_file.os, "chmod", fail),
    "rename": lambda patch: patch.setattr(adapter_file.os, "replace", fail),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_leaves_the_old_adapter_and_nothing_else(failure, saved, monkeypatch):
    old, ids = adapted(), token_ids()
    bytes_before = {name: (saved / name).read_bytes() for name in FILES}
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(DiskIsFull):
            save_adapter(move_adapter(adapted(r=3)), saved)
    assert sorted(os.listdir(saved)) == ["README.md", *FILES]
    assert {name: (saved / name).read_bytes() for name in FILES} == bytes_before
    assert logits(load_adapter(tiny_llama(), saved), ids).shape == logits(old, ids).shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_not_saved(bad, saved):
    model = adapted()
    list(adapted_layers(model).values())[-1].o.data[2] = bad
    before = [(saved / name).read_bytes() for name in FILES]
    with pytest.raises(ValueError, match=rf"{DOWN}\.o has NaN or infinite values: the adapter is not saved"):
        save_adapter(model, saved)
    assert [(saved / name).read_bytes() for name in FILES] == before


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"no osora adapter: call osora\.attach"):
        save_adapter(tiny_llama(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full(saved, tmp_path):
    """As files that may not grow, in a process of its own; safetensors has an error of its own for it."""
    pytest.importorskip("resource", reason="this system has no limit of a file's size")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    program = """
import resource, sys, saved_adapters, osora
model = saved_adapters.adapted(r=8)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    osora.save_adapter(model, sys.argv[1])
except OSError as error:
    print(error)
"""
    assert "adapter_model.safetensors cannot be written, and what was there is left" in run_program(
        tmp_path, program, saved
    )
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


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


def test_a_base_without_weights(saved):
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(AdapterError, match=r"\.weight is on the meta device and has no values: load the weights first"):
        load_adapter(model, saved)
    assert not adapted_layers(model)
