# SPDX-License-Identifier: Apache-2.0
"""What is saved is what loads: any adapter's name, any state dict that is given, whatever lies beside the adapter."""

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from pefts import OsoraConfig, adapted, layers, move, peft, quiet
from processes import run_program
from safetensors.torch import load_file
from saved_adapters import FILES
from torch import nn

import osora
from osora import AdapterError
from osora.peft import SorsaConfig

pytestmark = quiet
every_method = pytest.mark.parametrize("config", [OsoraConfig, SorsaConfig], ids=["osora", "sorsa"])
every_family = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shaken(model: nn.Module, step: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=step)
    return model


# -- names -----------------------------------------------------------------------------------------------------------


@every_method
@every_family
@pytest.mark.parametrize("names", [("default", "0"), ("0", "1", "b"), ("weight", "default"), ("model", "h", "layer")])
def test_adapters_named_as_parts_of_paths(names, make, config, tmp_path):
    """ "0" is in every path of a list of layers, "model" in that of every Llama's layer, "weight" ends most keys."""
    model = get_peft_model(make(), config(r=4), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(r=3, seed=len(name)))
    wishes, ids = {}, token_ids()
    for name in names:
        model.set_adapter(name)
        wishes[name] = logits(shaken(model).eval(), ids)
    model.save_pretrained(tmp_path)
    for name in names:
        folder = tmp_path / name if name != "default" else tmp_path
        for called in ("default", *names):
            other = PeftModel.from_pretrained(make(), folder, adapter_name=called)
            assert torch.equal(logits(other, ids), wishes[name])
        assert torch.equal(logits(osora.load_adapter(make(), folder), ids), wishes[name])


def test_a_small_adapter_of_such_a_name_leaves_the_good_file(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    wish, ids = contents(tmp_path), token_ids()
    model.add_adapter("0", OsoraConfig(r=4))
    model.save_pretrained(tmp_path)
    assert contents(tmp_path)[FILES[1]] == wish[FILES[1]]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), logits(model, ids))


def test_an_adapter_named_as_the_others_whole_module(tmp_path):
    """Their whole modules, too, are told apart by whole parts."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))

    model = get_peft_model(net(), OsoraConfig(r=2, target_modules="0", modules_to_save=["1.1"]))
    model.add_adapter("1", OsoraConfig(r=2, target_modules="0", modules_to_save=["1.1"]))
    x, wishes = torch.randn(4, 8), {}
    for name in ("default", "1"):
        model.set_adapter(name)
        wishes[name] = shaken(model)(x).detach()
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("1", tmp_path / "1")):
        assert torch.equal(PeftModel.from_pretrained(net(), folder)(x), wishes[name])


class Prefixed(nn.Module):
    """Its modules begin as our tensors do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.osora_head, self.sorsa_s0 = nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sorsa_s0(self.osora_head(self.body(x).relu()))


@every_method
@pytest.mark.parametrize("whole", [["osora_head"], ["sorsa_s0"], ["osora_head", "sorsa_s0"]])
def test_whole_modules_with_our_prefix(whole, config, tmp_path):
    if Version(peft.__version__) < Version("0.21"):
        with pytest.raises(ValueError, match=r"takes \w+ for a tensor of \w+'s, by its name"):
            get_peft_model(Prefixed(), config(r=2, target_modules=["body"], modules_to_save=whole))
        return
    x = torch.randn(4, 8)
    model = shaken(get_peft_model(Prefixed(), config(r=2, target_modules=["body"], modules_to_save=whole)))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Prefixed(), tmp_path)(x), model(x))
    assert sum(f".{name}." in key for key in load_file(tmp_path / FILES[1]) for name in whole) == 2 * len(whole)


@pytest.mark.parametrize("whole", ["osora_s", "S0", "0"])
def test_whole_modules_whose_names_end_as_our_containers_do(whole):
    """PEFT compares ends, so that it would wrap the adapter's own tensors."""

    def net() -> nn.Module:
        model = Prefixed()
        model.add_module(whole, nn.Linear(3, 3))
        return model

    base = net()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=rf"'{whole}' is also the end of body\.osora_|, by its name"):
        get_peft_model(base, OsoraConfig(r=2, target_modules=["body"], modules_to_save=[whole]))
    assert dict(base.named_modules()) == before


# -- a state dict that is given --------------------------------------------------------------------------------------


def renamed(prefix: str, state: dict) -> dict:
    return {prefix + key.removeprefix("base_model.model."): value for key, value in state.items()}


STATES = {
    "all": lambda model: model.state_dict(),
    "parameters": lambda model: {k: p for k, p in model.named_parameters() if "osora_" in k or "sorsa_" in k},
    "in training": lambda model: {k: p for k, p in model.named_parameters() if p.requires_grad},
    "of DDP": lambda model: {f"module.{k}": t for k, t in model.state_dict().items()},
    "of torch.compile": lambda model: {f"_orig_mod.{k}": t for k, t in model.state_dict().items()},
    "of the bare model": lambda model: renamed("", model.state_dict()),
    "of FSDP": lambda model: {
        k.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."): t for k, t in model.state_dict().items()
    },
    "gathered by PEFT": lambda model: peft.get_peft_model_state_dict(model),
}


@every_method
@pytest.mark.parametrize("state", STATES)
def test_what_is_given_is_what_is_saved(state, config, tmp_path):
    """The best weights so far are kept, training goes on, and the best are saved."""
    model, ids = shaken(get_peft_model(tiny_llama(), config(r=4))), token_ids()
    best = {key: tensor.detach().clone() for key, tensor in STATES[state](model).items()}
    wish = logits(model.eval(), ids)
    now = logits(shaken(model), ids)
    model.save_pretrained(tmp_path, state_dict=best)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), wish)
    assert torch.equal(logits(osora.load_adapter(tiny_llama(), tmp_path), ids), wish)
    assert torch.equal(logits(model, ids), now) and not torch.equal(now, wish)


@every_method
@every_family
@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_in_other_dtypes(dtype, save_basis, make, config, tmp_path):
    """The file's tensors are in the format's dtypes, with the copies' values."""
    model = shaken(get_peft_model(make(), config(r=4, tol=1e-4, save_basis=save_basis)))
    copies = {k: t.to(dtype) for k, t in model.state_dict().items() if "sora_" in k or "sorsa_" in k}
    model.save_pretrained(tmp_path, state_dict=copies)
    file = load_file(tmp_path / FILES[1])
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}
    for key, tensor in copies.items():
        assert torch.equal(file[key.replace(".default", "")], tensor.float())
    other = PeftModel.from_pretrained(make(), tmp_path)
    live = {k: t.float() for k, t in copies.items()}
    model.load_state_dict(live, strict=False)
    torch.testing.assert_close(logits(other, ids := token_ids()), logits(model.eval(), ids), rtol=1e-4, atol=1e-4)


@every_method
def test_an_average_of_weights(config, tmp_path):
    model = shaken(get_peft_model(tiny_llama(), config(r=4)))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        average.update_parameters(shaken(model))
    model.save_pretrained(tmp_path, state_dict=average.module.state_dict())
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(other, ids := token_ids()), logits(average.module.eval(), ids))


def test_what_is_beside_the_adapter_is_taken_from_it_too(tmp_path):
    def make():
        return tiny_bert()

    config = OsoraConfig(r=3, target_modules=["query"], modules_to_save=["transform"], bias="osora_only")
    model, ids = shaken(get_peft_model(make(), config)), token_ids()
    best, wish = {k: t.clone() for k, t in model.state_dict().items()}, logits(model.eval(), ids)
    shaken(model)
    model.save_pretrained(tmp_path, state_dict=best)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path), ids), wish)


def missing_one(model: nn.Module) -> dict:
    state = dict(model.state_dict())
    del state[next(key for key in state if key.endswith("osora_s.default.weight"))]
    return state


def with_first(model: nn.Module, change) -> dict:
    state = dict(model.state_dict())
    key = next(key for key in state if key.endswith("osora_o.default.weight"))
    return state | {key: change(state[key])}


REFUSED = {
    "one is missing": (missing_one, r"lacks 1 of the 28 tensors that the adapter 'default' trains.*osora_s"),
    "nothing of it": (lambda model: {}, "lacks 28 of the 28"),
    "another adapter's": (
        lambda model: {k.replace(".default", ".other"): t for k, t in model.state_dict().items()},
        "lacks 28 of the 28",
    ),
    "a piece": (lambda model: with_first(model, lambda t: t[:0]), "sharded over processes"),
    "another shape": (
        lambda model: with_first(model, lambda t: t[:-1]),
        r"has shape \[31\].*has \[32\]",
    ),
    "numbers": (lambda model: with_first(model, lambda t: 3.0), "as a float, and not as a tensor"),
    "integers": (lambda model: with_first(model, lambda t: t.long()), "must be floating-point"),
    "no values": (lambda model: with_first(model, lambda t: t.to("meta")), "meta device"),
    "NaN": (lambda model: with_first(model, lambda t: t * float("nan")), "has NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_completed_is_refused_before_anything_is_written(case, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "good")
    before = contents(tmp_path / "good")
    state, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=words):
        model.save_pretrained(tmp_path / "good", state_dict=state(model))
    assert contents(tmp_path / "good") == before


def test_an_adapter_that_rests_is_the_models(tmp_path):
    """Of several adapters the one in training is given, as by a loop that keeps what has a gradient."""
    model = adapted()
    model.add_adapter("resting", OsoraConfig(r=3))
    move(model, "resting")
    state = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path, state_dict=state)
    for name, folder in (("default", tmp_path), ("resting", tmp_path / "resting")):
        model.set_adapter(name)
        other = PeftModel.from_pretrained(tiny_llama(), folder)
        assert torch.equal(logits(other, ids := token_ids()), logits(model, ids))
    part = dict(list(state.items())[:3])
    with pytest.raises(ValueError, match=r"lacks 25 of the 28 tensors that the adapter 'default' trains"):
        model.save_pretrained(tmp_path, state_dict=part)


def test_what_FSDP_has_gathered(tmp_path):
    """The live parameters are in pieces, the base weights too: all is of the state dict, or refused in words."""
    program = """
import os, sys, torch
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
import torch.distributed as dist, peft, helpers, osora.peft
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
ids = helpers.token_ids()
for kind in (osora.peft.OsoraConfig, osora.peft.SorsaConfig):
    model = peft.get_peft_model(helpers.tiny_llama(tied=False), kind(r=4, init_weights=False)).eval()
    wish = helpers.logits(model, ids)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    state = model.state_dict()
    full = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}
    adapter = {key: t for key, t in full.items() if "base_layer" not in key}
    folder = sys.argv[1] + "/" + kind.__name__
    pieces = peft.get_peft_model_state_dict(model)  # as accelerate asks for them
    print(sum(hasattr(t, "full_tensor") for t in pieces.values()) == sum(p.requires_grad for p in model.parameters()))
    for given in (None, state, adapter):
        try:
            model.save_pretrained(folder, state_dict=given)
        except ValueError as error:
            print("is sharded over processes" in str(error))
    model.save_pretrained(folder, state_dict=full)
    other = peft.PeftModel.from_pretrained(helpers.tiny_llama(tied=False), folder)
    print(torch.equal(helpers.logits(other, ids), wish))
dist.destroy_process_group()
"""
    assert run_program(tmp_path, program, tmp_path).split()[-10:] == ["True"] * 10


@every_method
@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="transformers wants a newer PEFT")
def test_transformers_own_way(config, tmp_path, monkeypatch):
    """``model.add_adapter`` and ``model.save_pretrained`` of transformers, with a state dict as Trainer gives it."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")  # wants one that is not out
    model = tiny_llama()
    model.add_adapter(config(r=4), "0")
    best = {key: tensor.clone() for key, tensor in shaken(model).state_dict().items()}
    wish = logits(model, ids := token_ids())
    shaken(model)
    model.save_pretrained(tmp_path, state_dict=best)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), wish)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), logits(model, ids))


def test_other_methods_are_as_before(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    state = {key: p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}
    wish = logits(model.eval(), ids := token_ids())
    shaken(model)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), ids), wish)


# -- embeddings ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def resized(request, tmp_path):
    """A model from a checkpoint whose vocabulary grew, with other new rows each time."""
    transformers = pytest.importorskip("transformers")
    tiny_llama(tied=request.param).save_pretrained(tmp_path / "base")
    seeds = iter(range(100))

    def make() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(next(seeds))
        model.resize_token_embeddings(120, mean_resizing=False)
        return model.eval()

    return make


grown = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


@grown
@every_method
def test_resized_embeddings(resized, config, tmp_path):
    model, ids = shaken(get_peft_model(resized(), config(r=4))), torch.randint(120, (2, 9))
    model.save_pretrained(tmp_path / "adapter")
    wish = logits(model.eval(), ids)
    for low in (False, True):
        other = PeftModel.from_pretrained(resized(), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert torch.equal(logits(other, ids), wish)
    best = {key: tensor.detach().clone() for key, tensor in model.named_parameters() if tensor.requires_grad}
    model.save_pretrained(tmp_path / "given", state_dict=best)
    assert torch.equal(logits(PeftModel.from_pretrained(resized(), tmp_path / "given"), ids), wish)
    model.load_adapter(tmp_path / "adapter", "default")  # over the one that is there
    assert torch.equal(logits(model.eval(), ids), wish)


@grown
def test_a_refused_adapter_takes_its_embeddings_with_it(resized, tmp_path):
    model, ids = shaken(get_peft_model(resized(), OsoraConfig(r=4))), torch.randint(120, (2, 9))
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / FILES[0]
    config = json.loads(path.read_text())
    config["osora"]["modules"][3]["values_sha256"] = "0" * 64
    path.write_text(json.dumps(config))
    for low in (False, True):
        base = resized()
        wish = logits(base, ids)
        with pytest.raises(AdapterError, match="are damaged"):
            PeftModel.from_pretrained(base, tmp_path / "a", low_cpu_mem_usage=low)
        assert torch.equal(logits(base, ids), wish)


@grown
def test_a_file_has_the_other_tensors_that_it_names(resized, tmp_path):
    from saved_adapters import edit_tensors

    model = get_peft_model(resized(), OsoraConfig(r=4))
    model.save_pretrained(tmp_path / "a")
    named = json.loads((tmp_path / "a" / FILES[0]).read_text())["osora"]["others"]
    assert "base_model.model.model.embed_tokens.weight" in named
    edit_tensors(tmp_path / "a", lambda tensors: tensors.pop(named[-1]))
    with pytest.raises(AdapterError, match=rf"lacks 1 tensors, the first of which is {named[-1]}"):
        PeftModel.from_pretrained(resized(), tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.update({named[-1]: torch.ones(2), "more": torch.ones(2)}))
    with pytest.raises(AdapterError, match=r"has 1 tensors adapter_config\.json does not name, the first is more"):
        PeftModel.from_pretrained(resized(), tmp_path / "a")


# -- read back before anything is replaced ---------------------------------------------------------------------------


@every_method
def test_what_would_not_load_replaces_nothing(config, tmp_path, monkeypatch):
    """A writer that rounds, say: the file that is there stays."""
    import peft.peft_model as writer

    model = shaken(get_peft_model(tiny_llama(), config(r=4)))
    model.save_pretrained(tmp_path)
    before, save_file = contents(tmp_path), writer.safe_save_file
    monkeypatch.setattr(
        writer, "safe_save_file", lambda t, p, **o: save_file({k: v.bfloat16() for k, v in t.items()}, p, **o)
    )
    with pytest.raises(AdapterError, match=r"cannot be loaded again, and nothing was replaced: .*are damaged"):
        shaken(model).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@every_method
def test_values_whose_change_overflows(config, tmp_path):
    """Each is finite, but not their products: one message, before anything is written."""
    model = get_peft_model(tiny_llama(), config(r=4))
    with torch.no_grad():
        for layer in layers(model):
            for parameter in layer.deltas("default"):
                parameter.fill_(3e38)
    with pytest.raises(ValueError, match=r"q_proj: its change of the weight overflows: the adapter is not saved"):
        model.save_pretrained(tmp_path / "adapter")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
