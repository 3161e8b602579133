# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed itself on two processes, on the CPU: ZeRO 1, 2 and 3. `make deepspeed` installs it for these tests."""

import os
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama, token_ids
from processes import on_processes
from torch import Tensor, distributed, nn

import osora
from osora import adapted_layers
from osora.files.info import adapter_info
from osora.layers import known_base, sharded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed has a folder of its own: make deepspeed"),
]
STAGES = [1, 2, 3]
GAMMA = 0.3
CONFIGS = {
    "osora": osora.OsoraConfig(r=3),
    "sorsa": osora.SorsaConfig(r=3, gamma=GAMMA),
    "sorsa, paper": osora.SorsaConfig(r=3, gamma=GAMMA, regularizer="paper"),
    "gpt2": osora.OsoraConfig(r=3),
}
STEPS, ACCUMULATED = 3, 2


def base_of(case: str) -> nn.Module:
    return tiny_gpt2() if case == "gpt2" else tiny_llama()


def adapted(case: str) -> nn.Module:
    torch.manual_seed(3)
    return move_adapter(osora.attach(base_of(case), CONFIGS[case]))


def batches() -> list[Tensor]:
    torch.manual_seed(4)
    return [token_ids(4) for _ in range(STEPS * ACCUMULATED)]


def engine_of(model: nn.Module, stage: int, persist: int = 0):
    """The weights in parts from the first number on, unless ``persist`` leaves small ones whole."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persist},
        "gradient_clipping": 0.0,  # 1 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimiser = torch.optim.SGD(osora.adapter_parameters(model), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimiser, config=settings, dist_init_required=False)[0]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_by_deepspeed(model: nn.Module, stage: int, rank: int, penalty: bool, persist: int = 0) -> None:
    engine = engine_of(model, stage, persist)
    for ids in batches():
        loss = loss_of(engine, ids.chunk(2)[rank])
        if penalty:
            loss = loss + osora.orthonormality(model)
        engine.backward(loss)
        engine.step()


def train_alone(model: nn.Module) -> None:
    optimiser, ids = torch.optim.SGD(osora.adapter_parameters(model), lr=0.5), iter(batches())
    for _ in range(STEPS):
        optimiser.zero_grad()
        for _ in range(ACCUMULATED):
            (loss_of(model, next(ids)) / ACCUMULATED).backward()
        optimiser.step()  # with the penalty, once


def values(model: nn.Module) -> list[Tensor]:
    return [sharded.whole(p).clone() for p in osora.adapter_parameters(model)]


# -- on the processes --------------------------------------------------------------------------------------------------


def without_the_penalty(stage: int, rank: int) -> str:
    model = adapted("sorsa")
    before = values(model)
    try:
        train_by_deepspeed(model, stage, rank, penalty=False)
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
        return str(error)
    return "trained"


def refusals(model: nn.Module, folder: Path) -> dict[str, str]:
    """What ZeRO 3 leaves no weight for."""
    said = {}
    for use, call in {
        "merged": lambda: osora.merge(model),
        "exported": lambda: osora.export_lora(model, folder / "lora"),
        "restored": lambda: osora.restore_adapter(model, folder / "3-osora"),
        "decomposed": lambda: osora.add_adapter(model, "b", osora.OsoraConfig(r=2)),
    }.items():
        try:
            call()
        except ValueError as error:
            said[use] = str(error)
    return said


def made_in_parts(folder: Path) -> nn.Module:
    """A model that from_pretrained makes in parts."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    settings = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    model = AutoModelForCausalLM.from_pretrained(folder)
    del settings
    assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
    return model


def without_a_basis(folder: Path) -> str:
    model = made_in_parts(folder / "llama")
    try:
        osora.attach(model, osora.OsoraConfig(r=3))
    except ValueError as error:
        assert not adapted_layers(model)
        return str(error)
    return "attached"


def with_a_basis(rank: int, folder: Path, case: str) -> nn.Module:
    """Attached where no process has a whole weight, moved, trained, saved."""
    base = "gpt2" if case == "gpt2" else "llama"
    model = osora.attach(made_in_parts(folder / base), CONFIGS[case], basis=folder / f"{base} basis")
    assert all(layer.base_layer.weight.numel() == 0 and layer.known for layer in adapted_layers(model).values())
    assert not any(hasattr(p, "ds_id") for p in osora.adapter_parameters(model))
    torch.manual_seed(3)
    train_by_deepspeed(move_adapter(model), 3, rank, "sorsa" in case)
    osora.save_adapter(model, folder / f"basis {case}")
    return model


def refused_with_a_basis(folder: Path) -> dict[str, str]:
    """Another base; and a model that an engine has taken."""
    said, model = {}, made_in_parts(folder / "changed")
    engine = engine_of(adapted("osora"), 3).module
    osora.detach(engine)
    for case, each in {"changed": model, "initialised": engine}.items():
        try:
            osora.attach(each, CONFIGS["osora"], basis=folder / "llama basis")
        except ValueError as error:
            said[case] = f"{type(error).__name__}: {error}"
        assert not adapted_layers(each)
    return said


def everything(rank: int, folder: str, port: int) -> dict[object, object]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    found: dict[object, object] = {}
    gather, gathered = sharded.whole, []
    known_base.sharded.whole = lambda tensor: gathered.append(1) or gather(tensor)  # of base weights
    for stage in STAGES:
        for case in CONFIGS:
            model = adapted(case)
            train_by_deepspeed(model, stage, rank, "sorsa" in case)
            found[stage, case] = values(model)
            gathered.clear()
            if stage == 3 or rank == 0:  # below ZeRO 3 the parameters are whole everywhere
                osora.save_adapter(model, Path(folder, f"{stage}-{case}"))
            found[stage, case, "gathered"] = len(gathered)
            distributed.barrier()
        found[stage, "refused"] = without_the_penalty(stage, rank)
    known_base.sharded.whole = gather
    model = adapted("osora")
    train_by_deepspeed(model, 3, rank, False, persist=10_000)  # as by default: small parameters stay whole
    found["persisted"] = values(model)
    found["refusals"] = refusals(model, Path(folder))
    found["from_pretrained"] = without_a_basis(Path(folder))
    for case in CONFIGS:
        sharded.whole = lambda tensor: gathered.append(1) or gather(tensor)
        gathered.clear()
        model = with_a_basis(rank, Path(folder), case)
        sharded.whole = gather
        found["basis", case], found["basis", case, "gathered"] = values(model), len(gathered)
    found["refused with a basis"] = refused_with_a_basis(Path(folder))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("saved")
    for base, make in {"llama": tiny_llama, "gpt2": tiny_gpt2}.items():
        make().save_pretrained(folder / base)
        osora.initialise(folder / base, folder / f"{base} basis", osora.OsoraConfig(r=4), progress=False)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-4
    changed.save_pretrained(folder / "changed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return folder, on_processes(tmp_path_factory.mktemp("processes"), everything, str(folder), port)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_and_save_what_one_would(runs, stage, case):
    """SORSA's penalty in the loss, and once a step, whatever is accumulated."""
    folder, found = runs
    model = adapted(case)
    before = values(model)
    train_alone(model)
    for run in found:
        for now, wish in zip(run[stage, case], values(model), strict=True):
            torch.testing.assert_close(now, wish, rtol=1e-5, atol=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(before, values(model), strict=True)) > 1e-2
    loaded, ids = osora.load_adapter(base_of(case), folder / f"{stage}-{case}"), batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_no_base_weight_is_gathered_to_save(runs, stage, case):
    assert all(not run[stage, case, "gathered"] for run in runs[1])
    assert adapter_info(runs[0] / f"{stage}-{case}").modules


@pytest.mark.parametrize("stage", STAGES)
def test_a_penalty_that_is_not_in_the_loss_is_refused_and_nothing_moves(runs, stage):
    for run in runs[1]:
        assert "add osora.orthonormality(model) to the loss" in run[stage, "refused"]


def test_parameters_that_stay_whole(runs):
    model = adapted("osora")
    train_alone(model)
    for now, wish in zip(runs[1][0]["persisted"], values(model), strict=True):
        torch.testing.assert_close(now, wish, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", ["merged", "exported", "restored", "decomposed"])
def test_what_needs_a_whole_weight_is_refused(runs, use):
    for run in runs[1]:
        assert f"sharded over processes, and cannot be {use} there" in run["refusals"][use]


def test_a_model_made_in_parts_is_refused_with_the_cure(runs):
    for run in runs[1]:
        assert "cannot be decomposed there: attach the adapter before the model is sharded" in run["from_pretrained"]
        assert "HfDeepSpeedConfig" in run["from_pretrained"]


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_made_in_parts_trains_and_saves_with_a_basis_as_one_process(runs, tmp_path, case):
    folder, found = runs
    base = "gpt2" if case == "gpt2" else "llama"
    model = osora.attach(base_of(case), CONFIGS[case], basis=folder / f"{base} basis")
    torch.manual_seed(3)
    train_alone(move_adapter(model))
    for run in found:
        for now, wish in zip(run["basis", case], values(model), strict=True):
            torch.testing.assert_close(now, wish, rtol=1e-5, atol=1e-5)
    osora.save_adapter(model, tmp_path)
    mine, theirs = (adapter_info(each).modules for each in (tmp_path, folder / f"basis {case}"))
    assert mine == theirs
    loaded, ids = osora.load_adapter(base_of(case), folder / f"basis {case}"), batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_with_a_basis_no_base_weight_is_gathered(runs, case):
    assert all(run["basis", case, "gathered"] == 0 for run in runs[1])


def test_what_a_basis_does_not_cure(runs):
    for run in runs[1]:
        said = run["refused with a basis"]
        assert said["changed"].startswith("BasisError: the weight of model.layers.1.mlp.up_proj is not the one that")
        assert "cannot be decomposed there: attach the adapter before the model is sharded" in said["initialised"]
