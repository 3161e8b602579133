# SPDX-License-Identifier: Apache-2.0
"""An adapter with a kept basis on the meta device, before there are weights: alone, and under FSDP2."""

import re
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama, token_ids
from processes import on_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import osora
from osora import adapted_layers
from osora.files.info import adapter_info
from osora.layers import sharded

CONFIGS = {
    "osora": osora.OsoraConfig(r=3),
    "sorsa": osora.SorsaConfig(r=3, gamma=0.3),
    "energy": osora.OsoraConfig(r=4, rank_for_energy=0.3, rank_pattern={".*(down_proj|c_proj)": 1}),
}
BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def on_meta(base: str) -> nn.Module:
    plain = BASES[base]()
    with torch.device("meta"):
        return type(plain)(plain.config).train(plain.training)


def renamed(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """A plain model's weights by their names in an adapted one."""
    places, found = {name: f"{name}.base_layer" for name in adapted_layers(model)}, {}
    for key, value in plain.state_dict().items():
        module, _, last = key.rpartition(".")
        found[f"{places.get(module, module)}.{last}"] = value
    return found


def load(model: nn.Module, plain: nn.Module) -> None:
    """The weights, and the buffers that no state dict has."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, renamed(model, plain), options=options)
    for name, buffer in plain.named_buffers():
        model.get_buffer(name).copy_(buffer)


def filled(base: str, method: str, basis: Path) -> nn.Module:
    model = osora.attach(on_meta(base), CONFIGS[method], basis=basis).to_empty(device="cpu")
    load(model, BASES[base]())
    return osora.restore_basis(model, basis)


def in_memory(base: str, method: str, basis: Path) -> nn.Module:
    return osora.attach(BASES[base](), CONFIGS[method], basis=basis)


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return move_adapter(model)


def train(model: nn.Module, rank: int | None = None) -> list[Tensor]:
    torch.manual_seed(4)
    optimiser = torch.optim.SGD(osora.adapter_parameters(model), lr=0.5)
    for _ in range(3):
        ids = token_ids(4)
        mine = ids if rank is None else ids.chunk(2)[rank]
        optimiser.zero_grad()
        model(input_ids=mine, labels=mine, use_cache=False).loss.backward()
        optimiser.step()
    return [sharded.whole(p).clone() for p in osora.adapter_parameters(model)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for base, make in BASES.items():
        make().save_pretrained(folder / base)
        osora.initialise(folder / base, folder / f"{base} basis", osora.OsoraConfig(r=4), progress=False)
    osora.initialise(folder / "llama", folder / "other basis", osora.OsoraConfig(r=5), progress=False)
    return folder


# -- alone -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_it_is_the_adapter_of_the_model_in_memory(folder, tmp_path, base, method):
    basis, ids = folder / f"{base} basis", token_ids(2)
    model, wish = (make(base, method, basis) for make in (filled, in_memory))
    assert model(input_ids=ids).logits.equal(BASES[base]()(input_ids=ids).logits)
    mine, theirs = adapted_layers(model), adapted_layers(wish)
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert layer.certificate == theirs[name].certificate
        for kind, tensor in theirs[name].state_dict().items():
            assert torch.equal(layer.state_dict()[kind], tensor), (name, kind)
    for now, then in zip(train(moved(model)), train(moved(wish)), strict=True):
        assert torch.equal(now, then)
    osora.save_adapter(model, tmp_path)
    loaded = osora.load_adapter(BASES[base](), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_may_take_the_place_of_those_on_meta(folder):
    basis, plain = folder / "llama basis", tiny_llama()
    model = osora.attach(on_meta("llama"), CONFIGS["osora"], basis=basis)
    model.load_state_dict(renamed(model, plain), assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq
    osora.restore_basis(model, basis)
    for now, wish in zip(train(moved(model)), train(moved(in_memory("llama", "osora", basis))), strict=True):
        assert torch.equal(now, wish)


@pytest.mark.parametrize("use", ["forward", "weight", "save", "merge", "export", "together"])
def test_nothing_is_done_without_numbers(folder, tmp_path, use):
    model = osora.attach(on_meta("llama"), CONFIGS["osora"], basis=folder / "llama basis").to_empty(device="cpu")
    layer = next(iter(adapted_layers(model).values()))
    uses = {
        "forward": lambda: layer(torch.ones(1, layer.in_features)),
        "weight": lambda: layer.weight,
        "save": lambda: osora.save_adapter(model, tmp_path / "saved"),
        "merge": lambda: osora.merge(model),
        "export": lambda: osora.export_lora(model, tmp_path / "saved"),
        "together": lambda: osora.set_execution(model, "split", together=True),
    }
    with pytest.raises(RuntimeError, match=r"load the base weights, then call osora\.restore_basis"):
        uses[use]()
    assert not (tmp_path / "saved").exists() and not layer.merged


def test_another_base_is_found_out_and_the_right_one_cures_it(folder):
    basis, changed = folder / "llama basis", tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-6
    model = osora.attach(on_meta("llama"), CONFIGS["osora"], basis=basis).to_empty(device="cpu")
    load(model, changed)
    with pytest.raises(osora.BasisError, match=r"layers\.1\.mlp\.up_proj is not the one"):
        osora.restore_basis(model, basis)
    with pytest.raises(RuntimeError, match="restore_basis"):
        model(input_ids=token_ids(1))
    load(model, tiny_llama())
    osora.restore_basis(model, basis)
    with pytest.raises(ValueError, match="has its basis"):
        osora.restore_basis(model, basis)


def test_what_restore_basis_refuses(folder):
    basis = folder / "llama basis"
    with pytest.raises(ValueError, match="no osora adapter"):
        osora.restore_basis(tiny_llama(), basis)
    with pytest.raises(ValueError, match="has its basis"):
        osora.restore_basis(in_memory("llama", "osora", basis), basis)
    model = osora.attach(on_meta("llama"), CONFIGS["osora"], basis=basis)
    with pytest.raises(
        osora.BasisError, match=r"is not the basis that the adapter was attached with \(that was .*llama"
    ):
        osora.restore_basis(model, folder / "other basis")
    with pytest.raises(ValueError, match="is on the meta device and has no values: load the weights first"):
        osora.restore_basis(model, basis)
    model.to_empty(device="cpu").to(torch.bfloat16)
    for layer in adapted_layers(model).values():
        layer.U = layer.U.float()
    with pytest.raises(osora.BasisError, match=r"is in torch\.bfloat16 now"):
        osora.restore_basis(model, basis)


def test_attach_on_meta_checks_what_it_can(folder):
    config = osora.OsoraConfig(r=3, target_modules=["lm_head", "q_proj"])
    with torch.device("meta"):
        untied = type(tiny_llama())(tiny_llama(tied=False).config)
    with pytest.raises(osora.BasisError, match="has no layer lm_head"):
        osora.attach(untied, config, basis=folder / "llama basis")
    with pytest.raises(ValueError, match="meta"):
        osora.attach(untied, config, basis=folder / "llama basis", missing="compute")
    with pytest.raises(ValueError, match="meta"):
        osora.attach(on_meta("llama"))
    with pytest.raises(osora.BasisError, match="has rank 4 for"):
        osora.attach(on_meta("llama"), osora.OsoraConfig(r=5), basis=folder / "llama basis")


# -- on two processes --------------------------------------------------------------------------------------------------


def sharded_from_meta(base: str, method: str, basis: Path) -> nn.Module:
    model = osora.attach(on_meta(base), CONFIGS[method], basis=basis)
    for block in model.transformer.h if base == "gpt2" else model.model.layers:
        fully_shard(block)
    return fully_shard(model).to_empty(device="cpu")


def everything(rank: int, folder: str) -> dict[object, object]:
    found: dict[object, object] = {}
    gather, gathered = sharded.whole, []
    for base in BASES:
        for method in CONFIGS:
            basis = Path(folder, f"{base} basis")
            model = sharded_from_meta(base, method, basis)
            load(model, BASES[base]())
            osora.restore_basis(model, basis)
            assert all(hasattr(p, "full_tensor") for p in osora.adapter_parameters(model))
            like = osora.adapter_parameters(moved(in_memory(base, method, basis)))
            with torch.no_grad():
                for mine, value in zip(osora.adapter_parameters(model), like, strict=True):
                    assert not mine.full_tensor().any()
                    mine.copy_(distribute_tensor(value.detach(), mine.device_mesh, mine.placements))
            found[base, method] = train(model, rank)
            sharded.whole = lambda tensor: gathered.append(1) or gather(tensor)
            osora.save_adapter(model, Path(folder, f"{base} {method}"))
            sharded.whole = gather
    found["gathered"] = len(gathered)
    changed, model = tiny_llama(), sharded_from_meta("llama", "osora", Path(folder, "llama basis"))
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-4
    load(model, changed)
    try:
        osora.restore_basis(model, Path(folder, "llama basis"))
    except osora.BasisError as error:
        found["changed"] = str(error)
    return found


def test_two_processes_train_and_save_what_one_would(folder, tmp_path):
    runs = on_processes(tmp_path, everything, str(folder))
    for base in BASES:
        for method in CONFIGS:
            wish = train(moved(in_memory(base, method, folder / f"{base} basis")))
            for run in runs:
                for now, then in zip(run[base, method], wish, strict=True):
                    torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-5)
            osora.load_adapter(BASES[base](), folder / f"{base} {method}")
            assert adapter_info(folder / f"{base} {method}").modules
    assert all(run["gathered"] == 0 and re.search("up_proj is not the one", run["changed"]) for run in runs)
