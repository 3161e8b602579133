# SPDX-License-Identifier: Apache-2.0
"""save_adapter and load_adapter: what comes back, in which file, and on which base."""

import hashlib
import json
import os
import re
import stat
import struct
import warnings
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from processes import run_program
from safetensors.torch import load_file
from saved_adapters import FILES, adapted, both, described, edit, key, refused
from torch import Tensor, nn

import osora
from osora import OsoraConfig, adapted_layers, load_adapter, save_adapter
from osora.files import load as checkpoint


def state(model: nn.Module) -> dict[str, Tensor]:
    keys = ("o", "s", "S0", "U", "V")
    return {f"{n}.{k}": getattr(layer, k).detach() for n, layer in adapted_layers(model).items() for k in keys}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter with its basis, for a fresh tiny_llama()."""
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


# -- round trips -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])
def test_round_trip(make, save_basis, tmp_path):
    model, ids = adapted(make, dropout=0.25, rank_pattern={r".*\.0\..*": 3}), token_ids()
    save_adapter(model, tmp_path / "a" / "b", save_basis=save_basis)
    other = make()
    assert load_adapter(other, str(tmp_path / "a" / "b")) is other
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    first, second = state(model), state(other)
    assert list(first) == list(second)
    for name in first:
        exact = save_basis or name.endswith((".o", ".s", ".S0"))
        assert torch.equal(first[name], second[name]) if exact else True, name
    trainable = [n for n, p in other.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    modules = [(m.name, m.shape, m.rank, m.method, m.converged) for m in osora.summary(model).modules]
    assert modules == [(m.name, m.shape, m.rank, m.method, m.converged) for m in osora.summary(other).modules]
    osora.detach(other)
    assert torch.equal(logits(other, ids), logits(make(), ids))


def test_a_new_process_gives_the_same_logits(tmp_path):
    """Other memory, other hash seed: nothing of this process may be needed."""
    model, ids = adapted(), token_ids()
    for save_basis in (True, False):
        save_adapter(model, tmp_path / str(save_basis), save_basis=save_basis)
    torch.save((ids, logits(model, ids)), tmp_path / "wish")
    program = """
import sys, torch, osora, helpers
ids, wish = torch.load(sys.argv[1] + "/wish")
for name in ("True", "False"):
    model = osora.load_adapter(helpers.tiny_llama(), sys.argv[1] + "/" + name)
    print(float((helpers.logits(model, ids) - wish).abs().max()))
"""
    basis, no_basis = map(float, run_program(tmp_path, program, tmp_path).split())
    assert basis < 1e-5 and no_basis < 1e-5


def test_saving_again_gives_the_same_bytes(tmp_path):
    model = adapted()
    for name in ("a", "b"):
        save_adapter(model, tmp_path / name)
    load_adapter(other := tiny_llama(), tmp_path / "a")
    save_adapter(other, tmp_path / "c")
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / FILES[1]).read_bytes() == (tmp_path / "c" / FILES[1]).read_bytes()


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a")
    save_adapter(osora.merge(model), tmp_path / "b")
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_new_adapter_replaces_an_old_one(saved):
    model, ids = adapted(r=3), token_ids()
    save_adapter(model, saved)
    assert torch.equal(logits(load_adapter(tiny_llama(), saved), ids), logits(model, ids))
    assert sorted(os.listdir(saved)) == ["README.md", *FILES]


@both
def test_ranks_by_energy(save_basis, tmp_path):
    """The ranks in the file count; and a basis computed again is the leading part of the same run, bit for bit."""
    model, ids = adapted(r=16, rank_for_energy=0.6, rank_pattern={"q_proj": 9}), token_ids()
    ranks = {name: layer.rank for name, layer in adapted_layers(model).items()}
    assert len(set(ranks.values())) > 2 and max(ranks.values()) < 16
    save_adapter(model, tmp_path, save_basis=save_basis)
    config = json.loads((tmp_path / FILES[0]).read_text())
    assert config["rank_for_energy"] == 0.6 and config["r"] == 16
    assert {module["name"]: module["rank"] for module in described(config)} == ranks
    assert {name: load_file(tmp_path / FILES[1])[key(name, "S0")].numel() for name in ranks} == ranks
    other = load_adapter(tiny_llama(), tmp_path)
    assert {name: layer.rank for name, layer in adapted_layers(other).items()} == ranks
    for name, value in state(model).items():
        assert torch.equal(state(other)[name], value), name
    assert torch.equal(logits(other, ids), logits(model, ids))
    modules = [(m.name, m.rank, m.max_residual) for m in osora.summary(model).modules]
    assert modules == [(m.name, m.rank, m.max_residual) for m in osora.summary(other).modules]
    save_adapter(other, tmp_path / "again", save_basis=save_basis)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@both
def test_the_stored_rank_counts_whatever_the_energy_says_now(save_basis, tmp_path):
    """Of another machine, whose last digit chose another rank; or of a hand that changed r."""
    model, ids = adapted(r=16, rank_for_energy=0.6), token_ids()
    save_adapter(model, tmp_path, save_basis=save_basis)
    for change in ({"rank_for_energy": 0.2}, {"rank_for_energy": 1.0}, {"r": 3}, {"r": 10**9}):
        edit(tmp_path, lambda config, change=change: config.update(change))
        other = load_adapter(tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
        assert [m.rank for m in osora.summary(other).modules] == [m.rank for m in osora.summary(model).modules]


@both
def test_an_adapter_from_before_rank_for_energy_loads(save_basis, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, save_basis=save_basis)
    edit(tmp_path, lambda config: config.pop("rank_for_energy"))
    other = load_adapter(tiny_llama(), tmp_path)
    assert all(torch.equal(state(other)[name], value) for name, value in state(model).items())


def test_max_memory_of_loading(tmp_path):
    """It is about computing a basis again: a stored one needs none, but a wrong value is wrong all the same."""
    model = adapted()
    save_adapter(model, tmp_path / "whole")
    save_adapter(model, tmp_path / "small", save_basis=False)
    load_adapter(tiny_llama(), tmp_path / "whole", max_memory=1)
    load_adapter(tiny_llama(), tmp_path / "small", max_memory=2**40)
    for folder, bad, words in (
        ("small", 1, r"q_proj\.weight \[32, 32\] takes .*max_memory is 1"),
        ("whole", 0, "1 .. "),
    ):
        other = tiny_llama()
        with pytest.raises(ValueError, match=words):
            load_adapter(other, tmp_path / folder, max_memory=bad)
        assert not adapted_layers(other)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@both
def test_a_shared_module(save_basis, tmp_path):
    model, x = adapted(Shared, r=3), torch.randn(4, 6)
    save_adapter(model, tmp_path, save_basis=save_basis)
    other = load_adapter(Shared(), tmp_path)
    assert other.first is other.second
    torch.testing.assert_close(other(x), model(x))
    osora.detach(other)
    assert type(other.first) is nn.Linear and other.first is other.second


# -- the base --------------------------------------------------------------------------------------------------------


@both
def test_another_base_is_refused(save_basis, tmp_path):
    save_adapter(adapted(), tmp_path, save_basis=save_basis)

    def other_seed() -> nn.Module:
        model = tiny_llama()
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        return model

    refused(tmp_path, r"base weight model\.layers\.0\.\S+ is not the one this adapter was trained on", make=other_seed)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_element_changed_by_one_unit_is_refused(dtype, save_basis, tmp_path):
    model = move_adapter(osora.attach(tiny_llama(dtype=dtype), OsoraConfig(r=5, tol=1e-4)))
    save_adapter(model, tmp_path, save_basis=save_basis)

    def changed() -> nn.Module:
        model = tiny_llama(dtype=dtype)
        weight = model.model.layers[1].mlp.up_proj.weight.data
        weight[7, 11] = torch.nextafter(weight[7, 11], torch.tensor(9.0, dtype=dtype))
        return model

    refused(tmp_path, r"base weight model\.layers\.1\.mlp\.up_proj is not the one", make=changed)


@pytest.mark.parametrize("now", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_in_another_dtype(now, saved):
    model, ids = tiny_llama().to(now), token_ids()
    wish = logits(load_adapter(tiny_llama(), saved), ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(model, saved)
    if now != torch.float64:  # which holds the same values
        (warning,) = caught
        assert re.match("14 base weights were rounded to another dtype .*float32 then", str(warning.message))
        assert warning.category is RuntimeWarning and warning.filename == __file__
    layer = next(iter(adapted_layers(model).values()))
    assert layer.U.dtype == now and layer.S0.dtype == layer.o.dtype == (
        torch.float64 if now == torch.float64 else torch.float32
    )
    error = (logits(model, ids).double() - wish.double()).norm() / wish.norm()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[now]


def test_a_16_bit_base_in_float32_is_the_same_base(tmp_path):
    model = move_adapter(osora.attach(tiny_llama(dtype=torch.bfloat16), OsoraConfig(r=5)))
    save_adapter(model, tmp_path)
    other = load_adapter(tiny_llama(dtype=torch.bfloat16).float(), tmp_path)  # no warning: every value is equal
    for name, value in state(model).items():
        assert torch.equal(state(other)[name], value.float())


def test_another_base_in_another_dtype_is_refused(saved):
    def almost() -> nn.Module:
        model = tiny_llama()
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.05)
        return model.bfloat16()

    refused(saved, "is not the one", make=almost)


def test_another_architecture_is_refused(saved):
    refused(saved, r"layers\.1\.\S+, which this model does not have", make=lambda: tiny_llama(layers=1))
    refused(
        saved,
        r"\S+mlp.gate_proj is \[56, 32\], this model's is \[48, 32\]",
        make=lambda: tiny_llama(intermediate_size=48),
    )
    refused(saved, "which this model does not have", make=tiny_bert)


@both
def test_a_model_with_an_adapter_is_refused(save_basis, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, save_basis=save_basis)
    before = {name: value.clone() for name, value in state(model).items()}
    with pytest.raises(ValueError, match="has an osora adapter already"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


# -- without a basis -------------------------------------------------------------------------------------------------


def test_a_loose_tolerance_without_basis_warns(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"tol=0.001: another machine may find .*OsoraConfig\(tol=1e-4\)") as caught:
        save_adapter(adapted(tol=1e-3), tmp_path, save_basis=False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("sketch", ["delta_sketch", "basis_sketch"])
def test_a_rebuilt_basis_that_is_another_is_refused(sketch, tmp_path):
    """As another machine, torch or seed could give."""
    save_adapter(adapted(), tmp_path, save_basis=False)
    edit(
        tmp_path, lambda config: described(config)[9].update({sketch: [v + 0.05 for v in described(config)[9][sketch]]})
    )
    refused(tmp_path, rf"layers\.1\.self_attn\.v_proj: the basis computed again is not the adapter's \({sketch} off by")


def test_a_rebuilt_basis_of_other_signs_or_order_is_refused(tmp_path, monkeypatch):
    """The sketch is over the function: flipping (u, v) together changes nothing, swapping two triplets does."""
    model, ids = adapted(), token_ids()
    save_adapter(model, tmp_path, save_basis=False)
    real = checkpoint.decompose_targets

    def altered(change):
        def decompose(*args, **options):
            for target, factors in real(*args, **options):
                change(factors)
                yield target, factors

        return decompose

    def flip(factors):
        factors.U[:, 1].neg_()
        factors.V[:, 1].neg_()
        factors.S.mul_(1 + 1e-6)  # as other rounding would; the stored values are the ones that count

    def swap(factors):
        for t in (factors.U, factors.V):
            t[:, :2] = t[:, [1, 0]]

    monkeypatch.setattr(checkpoint, "decompose_targets", altered(flip))
    other = load_adapter(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    for layer, saved in zip(adapted_layers(other).values(), adapted_layers(model).values(), strict=True):
        assert torch.equal(layer.S0, saved.S0)
    monkeypatch.setattr(checkpoint, "decompose_targets", altered(swap))
    refused(tmp_path, "basis computed again is not the adapter's")


# -- the files -------------------------------------------------------------------------------------------------------


def test_what_is_in_the_files(tmp_path):
    model = adapted()
    for save_basis, kinds in ((True, ["o", "s", "S0", "U", "V"]), (False, ["o", "s", "S0"])):
        save_adapter(model, tmp_path, save_basis=save_basis)
        assert sorted(os.listdir(tmp_path)) == ["README.md", *FILES]
        layers = adapted_layers(model)
        assert set(load_file(tmp_path / FILES[1])) == {key(name, kind) for name in layers for kind in kinds}
        config = json.loads((tmp_path / FILES[0]).read_text())
        block = config.pop("osora")
        assert block["format_version"] == 2 and block["save_basis"] == save_basis
        assert [module["name"] for module in block["modules"]] == list(layers)
        options = {name: config.pop(name) for name in OsoraConfig().to_dict()}
        assert OsoraConfig.from_dict(options) == OsoraConfig(r=5, tol=1e-4)
        assert config == {
            "peft_type": "OSORA",
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
            },
            "base_model_name_or_path": None,
            "revision": None,
            "task_type": None,
            "inference_mode": True,
            "save_basis": save_basis,
        }


def test_a_digest_by_the_document(saved):
    """As docs/format.md says it, in other words than the code's."""
    tensors, module = load_file(saved / FILES[1]), described(json.loads((saved / FILES[0]).read_text()))[0]
    digest = hashlib.sha256()
    for kind, shape in (("o", "32"), ("s", "5"), ("S0", "5")):
        digest.update(f"{module['name']}|{kind}|{shape}|".encode())
        digest.update(struct.pack(f"<{shape}f", *tensors[key(module["name"], kind)].tolist()))
    assert digest.hexdigest() == module["values_sha256"]


def test_the_basis_is_stored_in_the_dtype_of_the_base(tmp_path):
    model = move_adapter(osora.attach(tiny_llama(dtype=torch.bfloat16), OsoraConfig(r=5)))
    save_adapter(model, tmp_path)
    for name, tensor in load_file(tmp_path / FILES[1]).items():
        assert tensor.dtype == (torch.bfloat16 if name.endswith(("_U", "_V")) else torch.float32)


def test_files_can_be_read_by_others(saved):
    """As any file of this user: what the umask allows, not mkstemp's 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for name in FILES:
        assert stat.S_IMODE((saved / name).stat().st_mode) == 0o666 & ~mask


class Llama2Shapes(nn.Module):
    """The linears of Llama-2-7B, a thirty-second of each, with their real names and number."""

    def __init__(self, share: int = 32) -> None:
        super().__init__()
        h, m = 4096 // share, 11008 // share
        shapes = dict(q_proj=(h, h), k_proj=(h, h), v_proj=(h, h), o_proj=(h, h))
        mlp = dict(gate_proj=(m, h), up_proj=(m, h), down_proj=(h, m))

        def block(shapes: dict[str, tuple[int, int]]) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(k, d, bias=False) for name, (d, k) in shapes.items()})

        layers = [nn.ModuleDict({"self_attn": block(shapes), "mlp": block(mlp)}) for _ in range(32)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(layers)})


def test_the_file_without_basis_is_o_and_s_and_three_percent(tmp_path):
    """Llama-2-7B at r = 64. Its o, s and σ are counted; the header is that of the same names, with longer numbers."""
    model = osora.attach(Llama2Shapes(), OsoraConfig(r=2, tol=1e-4, target_modules="all-linear"))
    save_adapter(model, tmp_path, save_basis=False)
    path, layers = tmp_path / FILES[1], adapted_layers(model)
    small = 4 * sum(layer.out_features + 2 * layer.rank for layer in layers.values())
    digits = 2 * 2 + 2 * 2  # an offset below 10⁷ instead of 10⁵, twice a tensor; a longer shape
    header = path.stat().st_size - small + digits * 3 * len(layers)
    o_and_s = 4 * sum(32 * layer.out_features + 64 for layer in layers.values())
    assert o_and_s == 4 * 32 * (4 * 4096 + 2 * 11008 + 4096 + 7 * 64) and len(layers) == 224
    whole = o_and_s + 4 * 64 * len(layers) + header
    assert whole <= 1.03 * o_and_s, f"{whole} bytes are {whole / o_and_s:.4f} of o and s"
