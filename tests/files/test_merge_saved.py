# SPDX-License-Identifier: Apache-2.0
"""Merging on disk gives the bits of merging in memory, and touches nothing else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, run_python, tiny_gpt2, tiny_llama, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_adapters import both
from torch import Tensor, nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig, merge_saved

MODELS: dict[str, Callable[..., nn.Module]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def prepared(
    tmp_path: Path, make=tiny_llama, dtype=torch.float32, *, shard="50GB", save_basis=True, method=OsoraConfig, **config
):
    """base/ and adapter/ in tmp_path; the merged model."""
    make(dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = osora.attach(make(dtype=dtype), method(**({"r": 5, "tol": 1e-4} | config)))
    move_adapter(model, 0.2)
    osora.save_adapter(model, tmp_path / "adapter", save_basis=save_basis)
    return osora.merge(model)


def same(folder: Path, model: nn.Module) -> None:
    """The folder's model is the merged one, bit for bit."""
    ids = token_ids()
    loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    if model.dtype == torch.float32:  # elsewhere the rotary embedding's buffers are cast in one of them
        assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))
    wish = osora.detach(model, merged=True).state_dict()
    got = loaded.state_dict()
    assert wish.keys() == got.keys() and all(torch.equal(got[key], wish[key]) for key in wish)


@both
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_bits_of_merging_in_memory(kind, shard, save_basis, tmp_path):
    model = prepared(tmp_path, MODELS[kind], shard=shard, save_basis=save_basis)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2 or shard == "50GB"
    seen = []
    result = merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", on_weight=lambda *n: seen.append(n))
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(before)
    base, out = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert {key for key in base if not torch.equal(base[key], out[key])} == set(result.merged)
    assert seen == [(i + 1, len(result.merged)) for i in range(len(result.merged))]
    assert not result.left_out and "config.json" in result.copied
    for path in (tmp_path / "base").glob("*.safetensors"):  # the metadata too
        with safe_open(path, "pt") as old, safe_open(tmp_path / "out" / path.name, "pt") as new:
            assert old.metadata() == new.metadata() and old.keys() == new.keys()
    same(tmp_path / "out", model)


@pytest.mark.parametrize("method", [OsoraConfig, SorsaConfig])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, method, tmp_path):
    model = prepared(tmp_path, tiny_gpt2, dtype, method=method)
    merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    same(tmp_path / "out", model)


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize(
    "options",
    [{"train": "s"}, {"train": "o"}, {"side": "input"}, {"initial_o": 0.5}, {"side": "input", "initial_o": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("kind", MODELS)
def test_ablations(kind, options, save_basis, tmp_path):
    model = prepared(tmp_path, MODELS[kind], save_basis=save_basis, **options)
    merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base, out = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert any(not torch.equal(base[key], out[key]) for key in base)
    same(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # transformers' own
def test_an_adapter_that_peft_wrote(tmp_path):
    """Also the biases that it trained are more than a weight's change: refused."""
    peft = pytest.importorskip("peft")
    from osora.peft import OsoraConfig as PeftConfig

    tiny_gpt2().save_pretrained(tmp_path / "base")
    for bias in ("none", "all"):
        base = type(tiny_gpt2()).from_pretrained(tmp_path / "base").eval()
        model = peft.get_peft_model(base, PeftConfig(r=4, tol=1e-4, initial_o=0.5, init_weights=False, bias=bias))
        model.save_pretrained(tmp_path / bias)
    with pytest.raises(AdapterError, match="trained with bias='all'"):
        merge_saved(tmp_path / "base", tmp_path / "all", tmp_path / "out")
    merge_saved(tmp_path / "base", tmp_path / "none", tmp_path / "out")
    same(tmp_path / "out", osora.merge(osora.load_adapter(tiny_gpt2(), tmp_path / "none")))


def test_a_base_in_another_dtype_is_merged_as_load_adapter_does_it(tmp_path):
    prepared(tmp_path)
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.warns(RuntimeWarning, match="rounded to another dtype"):
        merge_saved(tmp_path / "half", tmp_path / "adapter", tmp_path / "out")
    with pytest.warns(RuntimeWarning, match="rounded to another dtype"):
        model = osora.load_adapter(tiny_llama(dtype=torch.bfloat16), tmp_path / "adapter")
    same(tmp_path / "out", osora.merge(model))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    tensors = {change(key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("direction", ["without prefix", "another prefix", "one more"])
def test_a_checkpoint_whose_names_have_another_prefix(direction, tmp_path):
    """GPT-2 on the hub has no `transformer.`; a model with a head has one that its base model's checkpoint lacks."""
    model = prepared(tmp_path, tiny_gpt2)
    change = {
        "without prefix": lambda key: key.removeprefix("transformer."),
        "another prefix": lambda key: key.replace("transformer.", "language_model.model."),
        "one more": lambda key: f"module.{key}",
    }[direction]
    rename(tmp_path / "base", change)
    result = merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert result.merged[0] == change("transformer.h.0.attn.c_attn.weight")
    merged, wish = tensors_of(tmp_path / "out"), osora.detach(model, merged=True).state_dict()
    assert all(torch.equal(tensor, wish[key]) for key, tensor in wish.items() if change(key) in merged)
    assert all(torch.equal(merged[change(key)], wish[key]) for key in wish if key != "lm_head.weight")


def test_two_places_for_an_adapter_are_refused(tmp_path):
    prepared(tmp_path, tiny_gpt2)
    path = tmp_path / "base/model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    both_places = {f"{kind}.{key}": tensor.clone() for key, tensor in tensors.items() for kind in ("text", "vision")}
    save_file(both_places, path)
    with pytest.raises(AdapterError, match=r"several sets of weights .* could be text.* or vision"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


class Square(nn.Module):
    """Square layers: whether they are stored as [in, out] shows in their numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(5)
        self.a, self.b = nn.Linear(7, 7), Conv1D(7, 7)
        nn.init.normal_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_layers_stored_either_way(dtype, tmp_path):
    """Also where the base was rounded since, and no digest fits."""
    model = move_adapter(osora.attach(Square(), OsoraConfig(r=3)), 0.3)
    osora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(Square().to(dtype).state_dict(), tmp_path / "base/model.safetensors")
    plain = Square().to(dtype)
    if dtype == torch.float32:
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        osora.load_adapter(plain, tmp_path / "adapter")
    else:
        with pytest.warns(RuntimeWarning, match="rounded"):
            merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        with pytest.warns(RuntimeWarning, match="rounded"):
            osora.load_adapter(plain, tmp_path / "adapter")
    wish = osora.detach(plain, merged=True).state_dict()
    out = tensors_of(tmp_path / "out")
    assert all(torch.equal(out[key], wish[key]) for key in wish)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_wrong_base_is_refused_and_nothing_is_written(tmp_path):
    prepared(tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[3, 4] += 1e-3
    other.save_pretrained(tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.v_proj is not the one this adapter was trained on"):
        merge_saved(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        AdapterError, match=r"the adapter is for model\.layers\.0\.self_attn\.q_proj, and .* has no weight"
    ):
        merge_saved(tmp_path / "gpt2", tmp_path / "adapter", tmp_path / "out")
    tiny_llama(hidden_size=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj is \[32, 32\], .* is \[48, 48\]"):
        merge_saved(tmp_path / "wide", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "gpt2", "wide"])


def damage_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        path = base / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def truncate(base: Path) -> None:
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def twice(base: Path) -> None:
    path = sorted(base.glob("*.safetensors"))[-1]
    save_file({"model.norm.weight": torch.ones(32)} | load_file(path), path)
    other = sorted(base.glob("*.safetensors"))[0]
    save_file({"model.norm.weight": torch.ones(32)} | load_file(other), other)


NORM = "model.norm.weight"
BAD_BASES = {
    "a shard is gone": (lambda base: sorted(base.glob("*.safetensors"))[1].unlink(), "which is no file beside it"),
    "a shard is cut": (truncate, "is no readable safetensors file"),
    "a path": (damage_index(lambda m: m.update({NORM: "../base/" + m[NORM]})), "names '../base/.*no file beside it"),
    "a wrong shard": (
        damage_index(lambda m: m.update({NORM: next(v for v in m.values() if v != m[NORM])})),
        "says that model.norm.weight is in .* and it is not",
    ),
    "an unknown tensor": (damage_index(lambda m: m.update(more=m[NORM])), "says that more is in .* and it is not"),
    "a number": (damage_index(lambda m: m.update({NORM: 3})), "names '3', which is no file"),
    "twice": (twice, "is in .* and in "),
    "no map": (lambda base: (base / "model.safetensors.index.json").write_text("[]"), "has no weight_map"),
    "no JSON": (lambda base: (base / "model.safetensors.index.json").write_text("{" * 9), "is not valid JSON"),
    "two": (
        lambda base: shutil.copy(base / "model.safetensors.index.json", base / "other.safetensors.index.json"),
        "has several checkpoints",
    ),
}


@pytest.mark.parametrize("damage", BAD_BASES)
def test_damaged_bases(damage, tmp_path):
    prepared(tmp_path, shard="20KB")
    change, message = BAD_BASES[damage]
    change(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_pickled_or_quantised_base_is_refused(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "base/model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {name: tensors[name].to(dtype)}, path)
        with pytest.raises(AdapterError, match=rf"{name} of .* is (I8|F8_E4M3), a quantised weight"):
            merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    path.rename(tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ValueError, match="reads no pickled weights"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        merge_saved(tmp_path / "nowhere", tmp_path / "adapter", tmp_path / "out")


def test_out_is_never_overwritten(tmp_path, monkeypatch):
    prepared(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out/mine")
    with pytest.raises(ValueError, match="is within the base's folder"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "base/out")
    (tmp_path / "out/mine").unlink()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"^\. is the working directory, whose place no other folder can take"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", ".")
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
        with pytest.raises(FileExistsError, match="out is where a file system is mounted"):
            merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")  # an empty one is taken
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("culprit", ["copyfile", "sync", "replace", "overflow"])
def test_a_failed_merge_leaves_nothing(culprit, tmp_path, monkeypatch):
    prepared(tmp_path, dtype=torch.float16)
    error: type[Exception] = OSError

    def fail(*_):
        raise OSError("disk is full")

    if culprit == "copyfile":
        monkeypatch.setattr(osora.merge_saved.__globals__["shutil"], "copyfile", fail)
    elif culprit == "sync":
        monkeypatch.setitem(osora.merge_saved.__globals__, "sync", fail)
    elif culprit == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        error = ValueError
        model = osora.attach(tiny_llama(dtype=torch.float16), OsoraConfig(r=5))
        model.model.layers[1].mlp.up_proj.o.data.fill_(1e6)
        osora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(error, match=r"disk is full|layers\.1\.mlp\.up_proj: merging gives NaN or infinite"):
        merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_is_taken_over(tmp_path):
    """Weights in other formats would be the base's still."""
    model = prepared(tmp_path)
    base = tmp_path / "base"
    taken = ["LICENSE", "tokenizer.json", "chat_templates/tool.jinja"]
    left = ["pytorch_model.bin", "onnx/model.onnx", "README.md", ".git/config", "consolidated.safetensors",
            "pytorch_model.bin.index.json", "adapter_config.json"]  # fmt: skip
    for name in (*taken, *left):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    result = merge_saved(base, tmp_path / "adapter", tmp_path / "out")
    assert set(taken) <= set(result.copied) and sorted(left) == sorted(result.left_out)
    assert all((tmp_path / "out" / name).read_text() == name for name in taken)
    assert not any((tmp_path / "out" / name).exists() for name in left)
    assert (tmp_path / "out").stat().st_mode & 0o777 == base.stat().st_mode & 0o777
    same(tmp_path / "out", model)


def test_the_files_of_the_hubs_cache_are_links(tmp_path):
    model = prepared(tmp_path)
    (tmp_path / "blobs").mkdir()
    for path in list((tmp_path / "base").iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    same(tmp_path / "out", model)


MEMORY = """
import resource, sys, threading, time
from pathlib import Path
import torch, osora
base, adapter, out = sys.argv[1:]
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in l)
before, most = anonymous(), 0
def watch(done, of):
    global most
    most = max(most, anonymous() - before)
osora.merge_saved(base, adapter, out, on_weight=watch)
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_the_model_is_never_held(tmp_path):
    """96 MB of weights in 24 layers; what is held beside the mapped files is one weight in float32, and the adapter."""

    class Deep(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))

    torch.manual_seed(2)
    model = Deep()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    osora.attach(model, OsoraConfig(r=2, tol=10.0), unconverged="warn")
    osora.save_adapter(move_adapter(model), tmp_path / "adapter")
    held = int(run_python(MEMORY, tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    assert held < 48 * 2**20  # a few copies of one weight of 4 MB, and what libraries take at first use
