# SPDX-License-Identifier: Apache-2.0
"""Saving where no process has a whole weight, by FSDP2 on two processes; and the fingerprints that this rests on."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama, token_ids
from processes import on_processes
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import osora
from osora import adapted_layers
from osora.files.info import adapter_info
from osora.layers import fingerprint, known_base, sharded

CONFIGS = {"osora": osora.OsoraConfig(r=3), "sorsa": osora.SorsaConfig(r=3, gamma=0.3)}
BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}  # of GPT-2 a weight is stored as [in, out]


def adapted(base: str, method: str) -> nn.Module:
    torch.manual_seed(3)
    return move_adapter(osora.attach(BASES[base](), CONFIGS[method]))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def shard(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, ids: Tensor) -> None:
    optimiser = torch.optim.SGD(osora.adapter_parameters(model), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()


def batch() -> Tensor:
    torch.manual_seed(4)
    return token_ids(4)


# -- on two processes --------------------------------------------------------------------------------------------------


def save_each(rank: int, folder: str) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """What was gathered for each save."""
    gathered: list[tuple[int, ...]] = []
    gather = sharded.whole
    for module in (sharded, known_base.sharded):
        module.whole = lambda tensor: gathered.append(tuple(tensor.shape)) or gather(tensor)
    found = {}
    for base in BASES:
        for method in CONFIGS:
            model = shard(adapted(base, method))
            train(model, batch().chunk(2)[rank])
            gathered.clear()
            osora.save_adapter(model, Path(folder, f"{base}-{method}"))
            assert Path(folder, f"{base}-{method}", "adapter_config.json").exists()  # on every process, when it returns
            found[base, method] = list(gathered)
    return found


def save_changed(rank: int, folder: str) -> list[tuple[int, ...]]:
    """The base changes when it is sharded already, behind the back of every counter of changes."""
    model = shard(adapted("llama", "osora"))
    layer = next(iter(adapted_layers(model).values()))
    layer.base_layer.weight.to_local().data.mul_(1.5)
    gathered, gather = [], sharded.whole
    known_base.sharded.whole = lambda tensor: gathered.append(tuple(tensor.shape)) or gather(tensor)
    osora.save_adapter(model, Path(folder, "changed"))
    sharded.whole = gather
    return gathered


def save_alone(rank: int, folder: str) -> str:
    model = shard(adapted("llama", "osora"))
    sharded.PATIENCE = timedelta(seconds=1)
    message = ""
    if rank == 0:
        try:
            osora.save_adapter(model, Path(folder, "alone"))
        except RuntimeError as error:
            message = str(error)
    sharded.PATIENCE = timedelta(seconds=60)
    distributed.barrier()
    osora.save_adapter(model, Path(folder, "after all"))  # the next one works
    return message


def save_where_the_first_cannot(rank: int, folder: str) -> str:
    model = shard(adapted("llama", "osora"))
    where = Path(folder, "file")
    if rank == 0:
        where.write_text("in the way", encoding="utf-8")
    distributed.barrier()
    try:
        osora.save_adapter(model, where)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def attach_late(rank: int) -> dict[str, str]:
    """Adapters that come too late, for FSDP2 and for tensor parallel plans."""
    mesh, said = init_device_mesh("cpu", (2,)), {}
    fsdp, parallel = shard(tiny_llama()), tiny_llama()
    for name, module in list(parallel.named_modules()):
        if name.endswith("q_proj"):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
    for name, model in (("fsdp", fsdp), ("tensor parallel", parallel)):
        try:
            osora.attach(model, CONFIGS["osora"])
        except ValueError as error:
            said[name] = str(error)
        assert not any(parameter.grad_fn for parameter in model.parameters()) and not adapted_layers(model)
    return said


def everything(rank: int, folder: str) -> dict[str, object]:
    found = {"late": attach_late(rank)}
    gather = sharded.whole
    for task in (save_each, save_changed, save_alone, save_where_the_first_cannot):
        found[task.__name__] = task(rank, folder)
        sharded.whole = gather
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    return folder, on_processes(tmp_path_factory.mktemp("processes"), everything, str(folder))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_two_processes_save_what_one_would(runs, tmp_path, base, method):
    folder, found = runs
    model = adapted(base, method)
    train(model, batch())
    osora.save_adapter(model, tmp_path)
    ours = adapter_info(folder / f"{base}-{method}").modules
    for mine, theirs in zip(ours, adapter_info(tmp_path).modules, strict=True):
        assert mine == theirs
    loaded = osora.load_adapter(BASES[base](), folder / f"{base}-{method}")
    ids = batch()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    # no base weight was gathered: what was attached in a process group is known by its fingerprint
    bases = {tuple(layer.base_layer.weight.shape) for layer in adapted_layers(model).values()}
    for run in found:
        assert run["save_each"][base, method] == [] or not bases & set(run["save_each"][base, method])


def test_a_base_that_changed_since_is_gathered_and_described_as_it_is(runs):
    folder, found = runs
    assert all(len(run["save_changed"]) == 1 for run in found)  # that one weight, and no other
    with pytest.raises(osora.AdapterError, match="is not the one this adapter was trained on"):
        osora.load_adapter(tiny_llama(), folder / "changed")
    model = tiny_llama()
    name = next(iter(adapter_info(folder / "changed").modules)).name
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1.5)
    osora.load_adapter(model, folder / "changed")


def test_a_lone_process_is_told_that_all_must_save(runs):
    folder, (first, second) = runs
    assert "process 0 has waited 1 seconds in save_adapter for process 1" in first["save_alone"]
    assert "each of them must call it, not the first alone" in first["save_alone"]
    assert second["save_alone"] == "" and not (folder / "alone").exists() and (folder / "after all").exists()


def test_all_learn_that_the_first_could_not_write(runs):
    _, (first, second) = runs
    assert first["save_where_the_first_cannot"].startswith(("FileExistsError", "NotADirectoryError"))
    assert "RuntimeError: save_adapter failed in process 0: " in second["save_where_the_first_cannot"]


def test_an_adapter_that_comes_too_late_is_refused(runs):
    for run in runs[1]:
        assert "attach the adapter before the model is sharded" in run["late"]["fsdp"]
        assert "split by a tensor parallel plan" in run["late"]["tensor parallel"]
        assert "without tp_plan" in run["late"]["tensor parallel"]


# -- the fingerprints, in one process ----------------------------------------------------------------------------------


def count(monkeypatch, name: str) -> list[str]:
    calls, real = [], getattr(fingerprint, name)
    monkeypatch.setattr(fingerprint, name, lambda *args: calls.append(name) or real(*args))
    return calls


def test_a_weight_is_hashed_once(tmp_path, monkeypatch):
    model = adapted("llama", "osora")
    hashed = count(monkeypatch, "weight_evidence")
    osora.save_adapter(model, tmp_path / "first")
    assert len(hashed) == len(adapted_layers(model))
    osora.save_adapter(model, tmp_path / "second")
    osora.merge(model)
    osora.save_adapter(model, tmp_path / "merged")  # the kept base is meant, not the merged weight
    assert len(hashed) == len(adapted_layers(model))
    modules = [adapter_info(tmp_path / name).modules for name in ("first", "second", "merged")]
    assert modules[0] == modules[1] == modules[2]


def test_a_loaded_adapter_knows_its_base(tmp_path, monkeypatch):
    osora.save_adapter(adapted("llama", "sorsa"), tmp_path / "first")
    model = osora.load_adapter(tiny_llama(), tmp_path / "first")
    hashed, sketched = count(monkeypatch, "weight_digest"), count(monkeypatch, "weight_evidence")
    osora.save_adapter(model, tmp_path / "second")
    assert hashed == sketched == []
    assert adapter_info(tmp_path / "first").modules == adapter_info(tmp_path / "second").modules


def by_data(weight: Tensor) -> None:
    weight.data[0, 0] += 1e-3  # torch counts no change


def by_rows(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0).clone())


def by_state(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(weight + torch.randn_like(weight))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("change", [by_data, by_rows, by_state])
def test_no_stale_fingerprint_is_written(tmp_path, base, change):
    model = adapted(base, "osora")
    osora.save_adapter(model, tmp_path / "before")
    name, layer = list(adapted_layers(model).items())[1]
    change(layer.base_layer.weight)
    osora.save_adapter(model, tmp_path / "after")
    before, after = ({m.name: m for m in adapter_info(tmp_path / w).modules} for w in ("before", "after"))
    assert {n for n in before if before[n] != after[n]} == {name}
    plain = BASES[base]()
    with pytest.raises(osora.AdapterError, match="is not the one"):
        osora.load_adapter(plain, tmp_path / "after")
    plain.get_submodule(name).weight.data.copy_(layer.base_layer.weight.data)
    osora.load_adapter(plain, tmp_path / "after")


def test_a_cast_base_is_described_in_its_new_dtype(tmp_path):
    model = adapted("llama", "osora")
    osora.save_adapter(model, tmp_path / "before")
    model.to(torch.bfloat16)
    osora.save_adapter(model, tmp_path / "after")
    assert {module.dtype for module in adapter_info(tmp_path / "after").modules} == {"bfloat16"}
    osora.load_adapter(tiny_llama().to(torch.bfloat16), tmp_path / "after")


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 3), (33, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_tells_each_entry(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    wish = fingerprint.checksum(weight)
    assert fingerprint.checksum(weight.t().contiguous().t()) == wish
    for row in range(shape[0]):
        other = weight.clone()
        other[row, -1] += 0.5
        assert fingerprint.checksum(other) != wish
    if shape[0] > 1:
        assert fingerprint.checksum(weight.flip(0)) != wish
        assert fingerprint.checksum(weight.flatten().roll(1).view(shape)) != wish


def test_one_of_several_processes_takes_fingerprints_at_attach(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert all(layer.known is not None for layer in adapted_layers(adapted("llama", "osora")).values())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert all(layer.known is None for layer in adapted_layers(adapted("llama", "osora")).values())
