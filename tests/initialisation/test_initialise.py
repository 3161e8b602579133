# SPDX-License-Identifier: Apache-2.0
"""A basis from a checkpoint on disk is what attach on the loaded model would compute, or an error says why."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import Stack, contents, factors_of, make_basis, on_meta, same_factors, write_checkpoint
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn

import osora
from osora.initialisation.layers import SourceModel

CONFIG = osora.OsoraConfig(r=4)
TWELVE = (
    "Llama", "Qwen3", "Gemma", "Phi3", "GPT2", "Bloom", "Mixtral", "T5", "Bert", "ViT", "Whisper", "Llama, tied"
)  # fmt: skip


def loaded(family: str, folder: Path, **options: object) -> nn.Module:
    return type(FAMILIES[family].model()).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in TWELVE else pytest.mark.slow) for f in FAMILIES])
def test_what_comes_from_the_disk_is_what_attach_computes(family, tmp_path):
    FAMILIES[family].model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    done = osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, progress=False)
    there = osora.attach(loaded(family, tmp_path / "base"), CONFIG, basis=tmp_path / "basis")
    assert same_factors(osora.attach(loaded(family, tmp_path / "base"), CONFIG), there)
    assert done.layers == len(done.computed) == len(osora.adapted_layers(there)) and done.kept == 0
    with torch.no_grad():
        run = FAMILIES[family].run
        assert torch.equal(run(loaded(family, tmp_path / "base")), run(there))
    assert osora.check_basis(tmp_path / "basis", tmp_path / "base", sample=None).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["T5", "GPT2"])
def test_the_dtype_is_the_one_that_the_model_is_loaded_in(family, dtype, tmp_path):
    """T5 keeps its wo in float32 where the model is float16; an explicit dtype is taken for all."""
    FAMILIES[family].model().to(dtype).save_pretrained(tmp_path / "base")
    osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, progress=False)
    computed = osora.attach(loaded(family, tmp_path / "base"), CONFIG)
    assert same_factors(computed, osora.attach(loaded(family, tmp_path / "base"), CONFIG, basis=tmp_path / "basis"))
    osora.initialise(tmp_path / "base", tmp_path / "wide", CONFIG, dtype="float32", progress=False)
    wide = osora.attach(loaded(family, tmp_path / "base", dtype=torch.float32), CONFIG, basis=tmp_path / "wide")
    assert same_factors(osora.attach(loaded(family, tmp_path / "base", dtype=torch.float32), CONFIG), wide)


def test_which_layers_and_ranks(tmp_path):
    FAMILIES["Llama"].model().save_pretrained(tmp_path / "base")
    config = osora.SorsaConfig(
        r=5, target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.1\.mlp.*", rank_pattern={"down_proj": 99}
    )
    osora.initialise(tmp_path / "base", tmp_path / "basis", config, progress=False)
    computed = osora.attach(loaded("Llama", tmp_path / "base"), config)
    assert same_factors(computed, osora.attach(loaded("Llama", tmp_path / "base"), config, basis=tmp_path / "basis"))
    plan = osora.plan_initialisation(tmp_path / "base", tmp_path / "other", config)
    assert {layer.name: layer.target.rank for layer in plan.layers} == {
        name: layer.rank for name, layer in osora.adapted_layers(computed).items()
    }
    assert "3 layers" in str(plan) and not (tmp_path / "other").exists()


def test_a_head_that_the_checkpoint_lacks_is_left_out_as_attach_does(tmp_path):
    import transformers

    FAMILIES["Bert"].model().save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base/config.json").read_text()) | {
        "architectures": ["BertForSequenceClassification"]
    }
    (tmp_path / "base/config.json").write_text(json.dumps(settings))
    with pytest.warns(RuntimeWarning, match="does not have classifier"):
        osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, progress=False)
    with pytest.warns(RuntimeWarning, match="classifier"):
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
        osora.attach(model, CONFIG, basis=tmp_path / "basis")
    # the same checkpoint without a head has one prefix less before its names
    plain = transformers.BertModel.from_pretrained(tmp_path / "base")
    osora.attach(plain, CONFIG, basis=tmp_path / "basis")
    assert len(osora.adapted_layers(plain)) == len(osora.adapted_layers(model))


def test_a_rule_that_makes_two_weights_of_one_tensor(tmp_path):
    """transformers cuts Dinov2's stored `weights_in` in two as it loads."""
    import transformers

    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = transformers.Dinov2Config(**options, use_swiglu_ffn=True)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base/model.safetensors")
    osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, progress=False)
    model = transformers.Dinov2Model.from_pretrained(tmp_path / "base")
    there = osora.attach(transformers.Dinov2Model.from_pretrained(tmp_path / "base"), CONFIG, basis=tmp_path / "basis")
    assert same_factors(osora.attach(model, CONFIG), there)
    made = [layer.name for layer in plan_layers(tmp_path / "base") if layer.origin.rule is not None]
    names = {f"{name}.weight" for name in osora.adapted_layers(there)}
    assert made or names <= set(stored), "either a rule was followed, or this transformers stores them as they are"


def plan_layers(base: Path) -> list:
    return list(osora.plan_initialisation(base, base / "none", CONFIG).layers)


def test_the_hubs_cache(tmp_path):
    """A model's folder there has links to files of other names, and a reference to a snapshot."""
    FAMILIES["Llama"].model().save_pretrained(tmp_path / "base")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    for folder in (blobs, snapshot, tmp_path / "models--a--b/refs"):
        folder.mkdir(parents=True)
    (tmp_path / "models--a--b/refs/main").write_text("0123")
    for number, path in enumerate(sorted((tmp_path / "base").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    first = osora.initialise(tmp_path / "models--a--b", tmp_path / "one", CONFIG, progress=False)
    second = osora.initialise(snapshot, tmp_path / "two", CONFIG, progress=False)
    assert first.fingerprint == second.fingerprint and contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_module_of_ones_own(shards, tmp_path):
    """Names are the module's; where no config.json says what it is, the tree is given."""
    write_checkpoint(Stack(), tmp_path / "base", shards)
    with pytest.raises(ValueError, match=r"has no config.json .* give the model"):
        osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, progress=False)
    osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)
    assert same_factors(osora.attach(Stack(), CONFIG), osora.attach(Stack(), CONFIG, basis=tmp_path / "basis"))
    names = {path.name for path in (tmp_path / "basis").iterdir()}
    wanted = {f"{name}.safetensors" for name in factors_of(osora.attach(Stack(), CONFIG))} | {"basis.json"}
    assert names == wanted, "nothing else is left"


def test_layers_whose_names_are_no_file_names(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            for name in ("a//b", "A", "a", "é", "x" * 300, "con"):
                self.add_module(name, nn.Linear(5, 6))

    folder = make_basis(Odd(), tmp_path, osora.OsoraConfig(r=2))
    assert same_factors(
        osora.attach(Odd(), osora.OsoraConfig(r=2)), osora.attach(Odd(), osora.OsoraConfig(r=2), basis=folder)
    )
    files = [path.name for path in folder.iterdir()]
    assert len({name.lower() for name in files}) == len(files) == 7 and all(name.isascii() for name in files)


def test_the_same_bytes_with_one_part_or_three(tmp_path):
    write_checkpoint(Stack(blocks=5), tmp_path / "base")
    osora.initialise(tmp_path / "base", tmp_path / "one", CONFIG, model=on_meta(blocks=5), progress=False)
    counts = []
    for part in ("1/3", "2/3", "3/3"):  # the first finds nobody else at work and takes it all
        done = osora.initialise(
            tmp_path / "base", tmp_path / "three", CONFIG, model=on_meta(blocks=5), part=part, progress=False
        )
        counts.append(len(done.computed))
    assert counts == [15, 0, 0] and contents(tmp_path / "one") == contents(tmp_path / "three")


# -- refused ----------------------------------------------------------------------------------------------------------


def fails(tmp_path: Path, match: str, error: type[Exception] = ValueError, **options: object) -> None:
    options = {"model": on_meta(), "config": CONFIG} | options
    with pytest.raises(error, match=match):
        osora.initialise(tmp_path / "base", tmp_path / "basis", progress=False, **options)


def test_wrong_arguments(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    fails(tmp_path, "part must be", part="4/3")
    fails(tmp_path, "threads must be at least 1", threads=0)
    fails(tmp_path, 'dtype must be "auto" or one of', dtype="int8")
    fails(tmp_path, "unconverged must be", unconverged="perhaps")
    fails(tmp_path, "max_memory", max_memory=-1)
    for expiry in (0, -1, "a", True):
        fails(tmp_path, "claim_expiry must be a positive number", claim_expiry=expiry)
    for device in ("meta", "mps", "nope"):
        fails(tmp_path, 'device must be "cpu" or a CUDA device', device=device)
    for config in ({"r": 4}, 4):
        fails(tmp_path, "config must be an osora.OsoraConfig", TypeError, config=config)
    with pytest.raises(TypeError, match=r"out must be a folder's name, as in initialise\(base, out, config\)"):
        osora.initialise(tmp_path / "base", CONFIG, tmp_path / "basis")
    fails(tmp_path, "takes .* bytes to decompose .* and max_memory is 1000", max_memory=1000)
    fails(tmp_path, "no module matches", config=osora.OsoraConfig(target_modules=["nothing"]))
    assert not (tmp_path / "basis").exists(), "all that is refused before any work"


def test_a_checkpoint_that_is_not_this_models(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    fails(
        tmp_path, r"has no tensor for blocks.3.up.weight, .* and 1 more: is it another model", model=on_meta(blocks=6)
    )
    fails(tmp_path, r"blocks.0.up.weight of .* is \[25, 12\], and blocks.0.up.weight of its model \[33, 16\]",
          model=on_meta(width=16))  # fmt: skip


def test_weights_that_cannot_be_decomposed(tmp_path):
    model = Stack()
    with torch.no_grad():
        model.blocks[1]["side"].weight[2, 3] = float("nan")
    write_checkpoint(model, tmp_path / "base")
    fails(tmp_path, "blocks.1.side.weight has NaN or infinite entries")
    assert len(list((tmp_path / "basis").glob("*.safetensors"))) < 9


def test_quantised_checkpoints(tmp_path):
    FAMILIES["Llama"].model().save_pretrained(tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    fails(tmp_path, r"is quantised \(gptq\)", model=None)
    write_checkpoint(Stack(), tmp_path / "ints", 1)
    tensors = load_file(tmp_path / "ints/model.safetensors")
    tensors["blocks.0.up.weight"] = tensors["blocks.0.up.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "ints/model.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.up.weight of .* is I8, a quantised weight"):
        osora.initialise(tmp_path / "ints", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)


def test_a_model_that_transformers_does_not_know(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    for settings in ({}, {"model_type": "nobody's"}, {"model_type": "llama", "architectures": ["No_such"]}, "[", []):
        (tmp_path / "base/config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
        fails(tmp_path, "config.json", model=None)


def test_a_folder_that_is_in_use(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    (tmp_path / "basis").mkdir()
    (tmp_path / "basis/notes.txt").write_text("mine")
    fails(tmp_path, "holds notes.txt", FileExistsError)
    assert contents(tmp_path / "basis") == {"notes.txt": b"mine"}
    (tmp_path / "basis/notes.txt").unlink()
    osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)
    before = contents(tmp_path / "basis")
    fails(tmp_path, "rank 4 there, 5 asked for", osora.BasisError, config=osora.OsoraConfig(r=5))
    fails(tmp_path, "tol 0.001 there, 0.0001 asked for", osora.BasisError, config=osora.OsoraConfig(r=4, tol=1e-4))
    fails(tmp_path, "seed 0 there, 1 asked for", osora.BasisError, config=osora.OsoraConfig(r=4, seed=1))
    fails(tmp_path, "dtype float32 there, float64 asked for", osora.BasisError, dtype="float64")
    fails(tmp_path, "of 9 layers, 3 are asked for", osora.BasisError,
          config=osora.OsoraConfig(r=4, target_modules=["up"]))  # fmt: skip
    assert contents(tmp_path / "basis") == before
    write_checkpoint(Stack(seed=4), tmp_path / "changed")
    with pytest.raises(osora.BasisError, match=r"is of another base: blocks.0.up.weight"):
        osora.initialise(tmp_path / "changed", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)
    with pytest.raises(FileExistsError, match="is a file"):
        osora.initialise(tmp_path / "base", tmp_path / "base/model.safetensors.index.json", CONFIG, model=on_meta())


def test_the_other_method_asks_for_the_same_basis(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    one = osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)
    again = osora.initialise(
        tmp_path / "base", tmp_path / "basis", osora.SorsaConfig(r=4), model=on_meta(), progress=False
    )
    assert again.fingerprint == one.fingerprint and again.kept == 9 and not again.computed


def test_a_layer_without_a_certificate(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    strict = osora.OsoraConfig(r=4, tol=1e-14)
    fails(tmp_path, "reached no certificate", osora.ConvergenceError, config=strict, unconverged="raise")
    with pytest.warns(RuntimeWarning, match="reached no certificate"):
        done = osora.initialise(tmp_path / "base", tmp_path / "basis", strict, model=on_meta(), progress=False)
    assert len(done.unconverged) == 9
    with pytest.warns(RuntimeWarning, match="reached no certificate"):
        osora.attach(Stack(), strict, basis=tmp_path / "basis")
    with pytest.raises(osora.ConvergenceError):
        osora.attach(Stack(), strict, basis=tmp_path / "basis", unconverged="raise")


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_cut_short_or_gone_while_it_is_read(tmp_path):
    folder, tree = write_checkpoint(Stack(blocks=6), tmp_path / "base"), on_meta(blocks=6)
    shard = folder / "model-00001-of-00002.safetensors"
    whole, header = shard.read_bytes(), 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    seen: list[str] = []
    each = {
        name.replace(".", r"\."): 1 + n % 8 for n, name in enumerate(factors_of(osora.attach(Stack(blocks=6), CONFIG)))
    }
    config = osora.OsoraConfig(r=4, rank_pattern=each)  # of many kinds: so many units

    def spoil(name: str, done: int, of: int) -> None:
        seen.append(name)
        if done == 2:
            shard.write_bytes(whole[: header + 9]) if cut else shard.unlink()

    for cut, words in ((True, "ends within|is cut short"), (False, "cannot be read for")):
        out = tmp_path / f"basis-{cut}"
        seen.clear()
        with pytest.raises(ValueError, match=f"model-00001-of-00002.safetensors ({words})"):
            osora.initialise(folder, out, config, model=tree, progress=False, on_layer=spoil)
        kept = {path.name for path in out.glob("*.safetensors")}
        assert {f"{name}.safetensors" for name in seen} == kept and not (out / "basis.json").exists()
        shard.write_bytes(whole)
        done = osora.initialise(folder, out, config, model=tree, progress=False)
        assert done.kept == len(kept) and len(done.computed) == 18 - len(kept)
    assert contents(tmp_path / "basis-True") == contents(tmp_path / "basis-False")


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv[3])
from checkpoints import on_meta
import osora
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    osora.initialise(sys.argv[1], sys.argv[2], osora.OsoraConfig(r=4), model=on_meta(), progress=False)
except OSError as error:
    print("OSError", error)
"""


def test_a_disk_that_is_full(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    support = str(Path(__file__).parents[1] / "support")
    for limit in (500, 1700):  # bytes: not even what is asked for can be written; not all of the layers can
        out = tmp_path / f"basis-{limit}"
        words = [sys.executable, "-c", FULL, str(tmp_path / "base"), str(out), support, str(limit)]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert said.startswith("OSError") and "cannot be written" in said, said
        assert not (out / "basis.json").exists()
        done = osora.initialise(tmp_path / "base", out, CONFIG, model=on_meta(), progress=False)
        assert done.kept + len(done.computed) == 9
    assert contents(tmp_path / "basis-500") == contents(tmp_path / "basis-1700")


def test_a_disk_that_is_going_to_be_full(tmp_path, monkeypatch):
    write_checkpoint(Stack(), tmp_path / "base")
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 1, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    fails(tmp_path, "the basis takes .* GB left: take a smaller r", OSError)


def test_memory_is_a_few_weights(tmp_path):
    """A checkpoint of 24 weights of 2 MB: what is held beside the program is less than a third of it."""
    program = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
from checkpoints import on_meta
import osora
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
tree, config = on_meta(blocks=12, width=512), osora.OsoraConfig(r=4, target_modules=["up", "down"])
osora.truncated_svd(torch.randn(1025, 512), 4, unconverged="warn")
before, most = anonymous(), 0
def look(*_):
    global most
    most = max(most, anonymous())
osora.initialise(sys.argv[1], sys.argv[2], config, model=tree, progress=False, on_layer=look)
print(most - before)
"""
    if not Path("/proc/self/status").exists() or "RssAnon" not in Path("/proc/self/status").read_text():
        pytest.skip("no RssAnon in /proc/self/status on this system")
    write_checkpoint(Stack(blocks=12, width=512), tmp_path / "base")
    support = str(Path(__file__).parents[1] / "support")
    words = [sys.executable, "-c", program, str(tmp_path / "base"), str(tmp_path / "basis"), support]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
    plan = osora.plan_initialisation(
        tmp_path / "base", tmp_path / "none", osora.OsoraConfig(r=4, target_modules=["up", "down"]),
        model=on_meta(blocks=12, width=512),
    )  # fmt: skip
    # 2 MB x 3 in units of eight weights, the arrays of two threads; an allocator keeps some of what was freed
    assert grown < plan.memory + 32 * 2**20, (grown, plan.memory)


def test_a_plan_says_what_will_be_read_and_written(tmp_path):
    write_checkpoint(Stack(), tmp_path / "base")
    plan = osora.plan_initialisation(tmp_path / "base", tmp_path / "basis", CONFIG, model=on_meta())
    osora.initialise(tmp_path / "base", tmp_path / "basis", CONFIG, model=on_meta(), progress=False)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "basis").glob("*.safetensors"))
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (tmp_path / "basis").glob("*.safetensors")
    )
    assert plan.bytes_written == on_disk - headers
    assert plan.bytes_read == sum(4 * p.numel() for n, p in Stack().named_parameters() if n.endswith("weight"))
    assert plan.flops > 0 and plan.memory > 3 * 4 * 25 * 12 and len(plan.units) == 3


def test_reading_keeps_no_second_copy_and_turns_nothing(tmp_path):
    """What is read has the layout of a loaded weight, so that a decomposition has its bits."""
    model = Stack()
    source = SourceModel(
        osora.files.base_folder.BaseFolder(write_checkpoint(model, tmp_path / "base")), CONFIG, on_meta()
    )
    for layer in source.layers:
        module = source.read(layer)
        there = model.get_submodule(layer.name)
        assert torch.equal(module.weight, there.weight) and module.weight.stride() == there.weight.stride()
        assert module.weight.untyped_storage().nbytes() == module.weight.nbytes
        assert layer.target.module.weight.is_meta, "the tree keeps no values"


def test_warnings_are_few(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_basis(Stack(), tmp_path, CONFIG)
