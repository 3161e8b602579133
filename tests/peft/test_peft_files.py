# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and from_pretrained: one format with the native API, both ways, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from pefts import OsoraConfig, adapted, layers, move, peft, quiet, tensors
from processes import run_program
from safetensors.torch import load_file, save_file
from saved_adapters import FILES, both, described, edit, edit_tensors, key
from torch import nn

import osora
from osora import AdapterError, adapted_layers
from osora.peft import SorsaConfig

pytestmark = quiet
every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])
low_memory = pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with its basis, written by PEFT, for a fresh tiny_llama()."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# -- round trips -----------------------------------------------------------------------------------------------------


@low_memory
@both
@every_model
def test_round_trip(make, save_basis, low, tmp_path, monkeypatch):
    model, ids = adapted(make, save_basis=save_basis, rank_pattern={r".*\.0\..*": 3}), token_ids()
    model.save_pretrained(tmp_path)
    if save_basis:  # which needs no decomposition
        monkeypatch.setattr("osora.peft.filling.decompose_targets", lambda *_, **__: pytest.fail("an SVD was run"))
    other = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low)
    monkeypatch.undo()
    first, second = tensors(model), tensors(other)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    assert torch.equal(logits(other.unload(), ids), logits(make(), ids))


@both
@every_model
def test_written_by_peft_and_loaded_natively(make, save_basis, tmp_path):
    model, ids = adapted(make, save_basis=save_basis, seed=4), token_ids()
    model.save_pretrained(tmp_path)
    own = osora.load_adapter(make(), tmp_path)
    assert torch.equal(logits(own, ids), logits(model, ids))
    found = {name: layer.basis() for name, layer in adapted_layers(own).items()}
    for layer in layers(model):
        assert all(torch.equal(a, b) for a, b in zip(layer.basis("default"), found[layer.name], strict=True))
    assert osora.summary(own).max_residual == max(
        layer.adapters["default"].certificate.max_residual for layer in layers(model)
    )


@low_memory
@both
@every_model
def test_written_natively_and_loaded_by_peft(make, save_basis, low, tmp_path):
    own, ids = move_adapter(osora.attach(make(), osora.OsoraConfig(r=5, tol=1e-4, seed=4, dropout=0.1))), token_ids()
    osora.save_adapter(own, tmp_path, save_basis=save_basis)
    model = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(model, ids), logits(own, ids))
    assert model.peft_config["default"].dropout == 0.1 and model.peft_config["default"].seed == 4
    assert layers(model)[0].adapters["default"].dropout == 0.1


@both
def test_the_two_writers_agree(save_basis, tmp_path):
    """The same tensors and the same evidence, so that either can be saved again by the other."""
    own = move_adapter(
        osora.attach(tiny_llama(), osora.OsoraConfig(r=5, tol=1e-4, target_modules=["q_proj", "up_proj"]))
    )
    osora.save_adapter(own, tmp_path / "native", save_basis=save_basis)
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "native").save_pretrained(tmp_path / "peft")
    texts = [json.loads((tmp_path / name / FILES[0]).read_text()) for name in ("native", "peft")]
    assert texts[0]["osora"] == texts[1]["osora"]
    first, second = (load_file(tmp_path / name / FILES[1]) for name in ("native", "peft"))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    for option in osora.OsoraConfig().to_dict():
        assert texts[0][option] == texts[1][option], option


def test_a_new_process_with_other_threads_and_random_state(tmp_path):
    """Nothing of this process is needed: with the basis, and without, where rounding may differ."""
    ids = token_ids()
    for save_basis in (True, False):
        model = adapted(save_basis=save_basis)
        model.save_pretrained(tmp_path / str(save_basis))
        torch.save((ids, logits(model, ids)), tmp_path / str(save_basis) / "wish")
    program = """
import sys, torch, osora.peft, helpers, peft
torch.set_num_threads(3 - torch.get_num_threads() if torch.get_num_threads() < 3 else 1)
torch.manual_seed(77)
for name in ("True", "False"):
    ids, wish = torch.load(sys.argv[1] + "/" + name + "/wish")
    model = peft.PeftModel.from_pretrained(helpers.tiny_llama(), sys.argv[1] + "/" + name)
    print(float((helpers.logits(model, ids) - wish).abs().max()))
"""
    assert all(float(line) < 1e-5 for line in run_program(tmp_path, program, tmp_path).split()[-2:])


def test_adapters_in_sub_folders(tmp_path):
    """As on a hub: "default" at the top, the others below, each alone in its file, whatever version of PEFT writes."""
    model, ids = adapted(), token_ids()
    for name, rank in (("legal", 3), ("medical", 5)):
        model.add_adapter(name, OsoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
        move(model, name, 0.2)
    model.save_pretrained(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")} == {
        FILES[1],
        f"legal/{FILES[1]}",
        f"medical/{FILES[1]}",
    }
    for name, folder, count in (("default", tmp_path, 14), ("legal", tmp_path / "legal", 4)):
        assert len(load_file(folder / FILES[1])) == 5 * count
        model.set_adapter(name)
        wish = logits(model, ids)
        assert torch.equal(logits(osora.load_adapter(tiny_llama(), folder), ids), wish)
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), folder), ids), wish)
    by_name = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="legal", adapter_name="x")
    assert torch.equal(logits(by_name, ids), wish)
    model.save_pretrained(tmp_path / "one", selected_adapters=["medical"])
    assert sorted(p.name for p in (tmp_path / "one" / "medical").iterdir()) == ["README.md", *FILES]


def test_a_merged_model_saves_the_same_adapter(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert load_file(saved / FILES[1]).keys() == load_file(tmp_path / "merged" / FILES[1]).keys()
    assert (
        json.loads((saved / FILES[0]).read_text())["osora"]
        == json.loads((tmp_path / "merged" / FILES[0]).read_text())["osora"]
    )


@both
def test_training_goes_on(save_basis, tmp_path):
    """is_trainable, and then a checkpoint over the adapter that is there, as Trainer resumes."""
    model, ids = adapted(save_basis=save_basis), token_ids()
    model.save_pretrained(tmp_path / "a")
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", is_trainable=True)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    other(input_ids=ids, labels=ids).loss.backward()
    move(other)
    other.save_pretrained(tmp_path / "b")
    model.load_adapter(tmp_path / "b", "default", is_trainable=True)
    assert torch.equal(logits(model, ids), logits(other.eval(), ids))
    assert all(p.requires_grad for layer in layers(model) for p in layer.deltas("default"))


def test_the_tensors_stay_shared_until_one_must_differ(saved, tmp_path):
    """Two adapters of one decomposition use one memory; loading another basis into one leaves the other alone."""
    model, ids = PeftModel.from_pretrained(tiny_llama(), saved), token_ids()
    model.load_adapter(saved, "again")
    wish = logits(model, ids)
    for layer in layers(model):
        assert layer.basis("default")[0].data_ptr() == layer.basis("again")[0].data_ptr()
    other = adapted(seed=9, tol=1e-2)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "again")  # over the one that is there
    assert torch.equal(logits(model, ids), wish)
    model.set_adapter("again")
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_auto_classes(tmp_path):
    """The base's folder is in the adapter's configuration, natively too; and PEFT finds the model's class."""
    tiny_llama(tied=False).save_pretrained(tmp_path / "base")
    transformers = pytest.importorskip("transformers")
    base, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), token_ids()
    model = move(get_peft_model(base, OsoraConfig(r=3, tol=1e-4)))
    model.save_pretrained(tmp_path / "peft")
    osora.save_adapter(
        osora.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft"),
        tmp_path / "native",
    )
    for name in ("peft", "native"):
        assert PeftConfig.from_pretrained(tmp_path / name).base_model_name_or_path == str(tmp_path / "base")
        other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(other, ids), logits(model, ids))


class Headed(nn.Module):
    """With a head to be trained whole, and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("bias", ["none", "all", "osora_only"])
def test_whole_modules_and_biases(bias, tmp_path):
    x = torch.randn(4, 6)
    config = OsoraConfig(r=3, target_modules=["body.0", "body.2"], modules_to_save=["head"], bias=bias)
    model = get_peft_model(Headed(), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name in trained if name.endswith("bias") and "head" not in name}
    assert len(biases) == (0 if bias == "none" else 2) and any("modules_to_save" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(Headed(), tmp_path)
    assert torch.equal(other(x), model(x))
    if bias == "none":
        assert torch.equal(osora.load_adapter(Headed(), tmp_path)(x), model(x))
    else:
        with pytest.raises(AdapterError, match=r"was trained with bias=.*load it with PEFT"):
            osora.load_adapter(Headed(), tmp_path)


# -- refused ---------------------------------------------------------------------------------------------------------


def refused(
    folder: Path, match: str, error: type[Exception] = AdapterError, make=tiny_llama, low: bool = False
) -> None:
    """Loading fails as it should, and the model is the very one it was."""
    model, ids = make(), token_ids()
    wish = logits(model, ids)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match):
        PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(logits(model, ids), wish) and not hasattr(model, "peft_config")


def another() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[7, 11] += 1e-3
    return model


@low_memory
@both
def test_another_base(save_basis, low, tmp_path):
    adapted(save_basis=save_basis).save_pretrained(tmp_path)
    refused(tmp_path, r"base weight model\.layers\.1\.mlp\.up_proj is not the one", make=another, low=low)
    refused(tmp_path, r"layers\.1\.\S+, which this model does not have", make=lambda: tiny_llama(layers=1), low=low)
    refused(tmp_path, r"is \[56, 32\], this model's is \[48, 32\]", make=lambda: tiny_llama(intermediate_size=48))


@low_memory
def test_damaged_tensors(low, saved):
    """Each as the file is opened, or as its values arrive; never later."""
    name = "model.layers.1.mlp.down_proj"
    original = load_file(saved / FILES[1])

    def damage(change) -> Path:
        folder = saved.with_name("damaged")
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        found = {k: t.clone() for k, t in original.items()}
        change(found)
        save_file(found, folder / FILES[1])
        return folder

    for change, words in (
        (lambda t: t.pop(key(name, "s")), "lacks 1 tensors"),
        (lambda t: t.update(more=torch.zeros(2)), "1 tensors .* does not name"),
        (lambda t: t.update({key(name, "o"): torch.zeros(31)}), r"must have shape \[32\], got \[31\]"),
        (lambda t: t[key(name, "o")].__setitem__(3, float("nan")), "holds NaN"),
        (lambda t: t[key(name, "s")].__setitem__(3, float("inf")), "must hold finite"),
        (lambda t: t[key(name, "o")].__setitem__(3, 0.25), r"o, s, S0 of \S+down_proj are damaged"),
        (lambda t: t[key(name, "S0")].__setitem__(0, 0.25), r"o, s, S0 of \S+down_proj are damaged"),
        (lambda t: t[key(name, "U")].__setitem__((3, 1), 0.25), r"U, V of \S+down_proj are damaged"),
    ):
        refused(damage(change), words, low=low)
    path = damage(lambda t: None) / FILES[1]
    path.write_bytes(path.read_bytes()[:-40])
    refused(path.parent, "is damaged, or no safetensors file", low=low)


@low_memory
@pytest.mark.parametrize("alpha", [2.9, None, 6.0])
def test_another_scale_of_sorsa(alpha, low, tmp_path):
    """It is an option, so that tensors and digests are all right."""
    model = move(get_peft_model(tiny_llama(), SorsaConfig(r=4, tol=1e-4, alpha=3.0)))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low)
    edit(tmp_path, lambda c: c.update(alpha=alpha))
    refused(tmp_path, "delta_sketch off by .*its options were changed", low=low)


@low_memory
def test_other_options(low, tmp_path):
    adapted(initial_o=0.5).save_pretrained(tmp_path / "good")
    for options, words in (
        ({"initial_o": 0.6}, "delta_sketch off by .*its options were changed"),
        ({"side": "input"}, r"must have shape|delta_sketch off by"),
        ({"alpha": 2.0}, "osora has no option alpha"),
        ({"train": "all"}, "train must be"),
        ({"dropout": 10**400}, "dropout"),
    ):
        folder = shutil.copytree(tmp_path / "good", tmp_path / "copy", dirs_exist_ok=True)
        edit(folder, lambda c, options=options: c.update(options))
        refused(folder, words, low=low)


def test_damaged_configurations(saved, tmp_path):
    for change, words in (
        (lambda c: c["osora"].update(format_version=3), "has format_version 3"),
        (lambda c: c.pop("osora"), 'has no block "osora"'),
        (lambda c: described(c)[3].update(rank=4), "must have shape"),
        (lambda c: described(c)[3].update(weight_sha256="0" * 64), "is not the one this adapter was trained on"),
        (lambda c: described(c)[3].update(values_sha256="0" * 64), "are damaged, or not those"),
        (lambda c: described(c).pop(), "does not name"),
    ):
        folder = shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True)
        edit(folder, change)
        refused(folder, words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pickle_is_neither_written_nor_read(saved, tmp_path):
    before = contents(saved)
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(ValueError, match="osora's adapters are never pickled"):
            PeftModel.from_pretrained(tiny_llama(), saved).save_pretrained(folder, safe_serialization=False)
    assert contents(saved) == before and not (tmp_path / "new").exists()
    lora = get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))  # another method's business
    lora.save_pretrained(tmp_path / "lora", safe_serialization=False)
    assert (tmp_path / "lora" / "adapter_model.bin").is_file()
    torch.save(load_file(saved / FILES[1]), saved / "adapter_model.bin")
    (saved / FILES[1]).unlink()
    refused(saved, "adapter_model.bin is a pickle, which osora never reads", error=FileNotFoundError)


def test_a_basis_that_cannot_be_computed_again(tmp_path):
    adapted(save_basis=False).save_pretrained(tmp_path)
    edit(tmp_path, lambda config: described(config)[9].update(basis_sketch=[9.0] * 4))
    refused(tmp_path, "the basis computed again is not the adapter's")


def test_a_second_adapter_that_is_refused_leaves_the_first(saved, tmp_path):
    model, ids = PeftModel.from_pretrained(tiny_llama(), saved), token_ids()
    wish = logits(model, ids)
    shutil.copytree(saved, tmp_path / "bad")
    edit_tensors(tmp_path / "bad", lambda t: t[key("model.layers.0.mlp.up_proj", "o")].fill_(float("inf")))
    with pytest.raises(AdapterError, match="must hold finite"):
        model.load_adapter(tmp_path / "bad", "second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model, ids), wish)
    assert all(set(layer.adapters) == {"default"} for layer in layers(model))
    model.load_adapter(saved, "second")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_base_in_another_dtype(dtype, saved):
    ids = token_ids()
    wish = logits(PeftModel.from_pretrained(tiny_llama(), saved), ids).double()
    if dtype == torch.float64:  # which holds the same values
        model = PeftModel.from_pretrained(tiny_llama().to(dtype), saved)
    else:
        with pytest.warns(RuntimeWarning, match="14 base weights were rounded to another dtype"):
            model = PeftModel.from_pretrained(tiny_llama().to(dtype), saved)
    error = (logits(model, ids).double() - wish).norm() / wish.norm()
    assert error < {torch.bfloat16: 0.05, torch.float64: 1e-5}[dtype]  # as natively: two layers of bfloat16


def test_a_diverged_adapter_is_not_saved(saved):
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    layers(model)[-1].deltas("default")[0].data[2] = float("inf")
    before = contents(saved)
    with pytest.raises(ValueError, match=r"down_proj\.o has NaN or infinite values"):
        model.save_pretrained(saved)
    assert contents(saved) == before  # which is a good adapter


def test_a_failed_write_leaves_the_old_files(saved, monkeypatch):
    """Half of the tensors are written when the disk is full."""
    model = move(PeftModel.from_pretrained(tiny_llama(), saved))
    before = contents(saved)

    def half(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk is full")

    monkeypatch.setattr("peft.peft_model.safe_save_file", half)
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(saved)
    monkeypatch.undo()
    assert contents(saved) == before
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(saved, selected_adapters=["no"])
    model.save_pretrained(saved, is_main_process=False)
    assert contents(saved) == before


def test_saved_over_the_file_that_its_tensors_are_mapped_from(saved):
    """low_cpu_mem_usage leaves the tensors in the file: written in place, it would be cut off under them."""
    model, ids = PeftModel.from_pretrained(tiny_llama(), saved, low_cpu_mem_usage=True), token_ids()
    wish = logits(model, ids)
    model.save_pretrained(saved)
    assert torch.equal(logits(model, ids), wish)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), saved), ids), wish)


def test_the_card_is_kept_and_the_modes_are_those_of_new_files(saved):
    card = saved / "README.md"
    card.write_text(card.read_text() + "\nwritten by a person\n")
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    model.add_adapter("legal", OsoraConfig(r=3))
    mask = os.umask(0o027)
    try:
        model.save_pretrained(saved)
    finally:
        os.umask(mask)
    assert "written by a person" in card.read_text()
    assert set(contents(saved)) == {place + name for place in ("", "legal/") for name in ("README.md", *FILES)}
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o640}
    assert (saved / "legal").stat().st_mode & 0o777 == 0o750


def test_a_configuration_alone_is_a_configuration(tmp_path):
    config = OsoraConfig(r=7, target_modules=["q_proj", "k_proj"], save_basis=False)
    config.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILES[0]]
    assert OsoraConfig.from_pretrained(tmp_path) == config == PeftConfig.from_pretrained(tmp_path)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["OSORA"] is OsoraConfig


@pytest.mark.parametrize("text", ["[]", "{}", "3", '"osora"', "{", ""])
def test_a_configuration_that_is_no_object_is_not_taken_for_the_defaults(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        OsoraConfig.from_pretrained(tmp_path)
