# SPDX-License-Identifier: Apache-2.0
"""An adapter with a kept basis that comes when FSDP2 has sharded the base already, on two processes."""

import re
from pathlib import Path

import pytest
import torch
from helpers import move_adapter, tiny_gpt2, tiny_llama, token_ids
from processes import on_processes
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import osora
from osora import adapted_layers
from osora.files.info import adapter_info
from osora.layers import known_base, sharded

CONFIGS = {
    "osora": osora.OsoraConfig(r=3),
    "sorsa": osora.SorsaConfig(r=3, gamma=0.3),
    "s alone": osora.OsoraConfig(r=2, train="s", target_modules=r".*(k_proj|down_proj|c_attn|c_proj)"),
}
BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CASES = [(base, method) for base in BASES for method in CONFIGS]
STEPS, ACCUMULATED = 3, 3


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return move_adapter(model)


def shard(model: nn.Module, **options: object) -> nn.Module:
    for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batches() -> list[Tensor]:
    torch.manual_seed(4)
    return [token_ids(4) for _ in range(STEPS * ACCUMULATED)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(model: nn.Module, rank: int | None = None, penalty: bool = False, clip: float = 1e-2) -> list[Tensor]:
    """Its trained tensors; the gradients are clipped, so that they must be reduced before the step."""
    trained = osora.adapter_parameters(model)
    optimiser, ids = torch.optim.SGD(trained, lr=20.0), iter(batches())
    for _ in range(STEPS):
        optimiser.zero_grad()
        for _ in range(ACCUMULATED):
            mine = next(ids)
            loss = loss_of(model, mine if rank is None else mine.chunk(2)[rank]) / ACCUMULATED
            (loss + osora.orthonormality(model) / ACCUMULATED if penalty else loss).backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimiser.step()
    return [sharded.whole(p).clone() for p in trained]


# -- on two processes --------------------------------------------------------------------------------------------------


def trained_late(rank: int, folder: Path) -> dict[object, object]:
    found: dict[object, object] = {}
    gather, gathered = sharded.whole, []
    for base, method in CASES:
        model = shard(BASES[base]())
        known_base.sharded.whole = lambda tensor: gathered.append(1) or gather(tensor)  # of base weights
        osora.attach(model, CONFIGS[method], basis=folder / f"{base} basis")
        assert all(layer.base_layer.weight.to_local().numel() for layer in adapted_layers(model).values())
        moved(model)
        found[base, method] = train(model, rank)
        gathered.clear()
        osora.save_adapter(model, folder / f"{base} {method}")
        sharded.whole = gather
        found[base, method, "gathered"] = len([each for each in gathered if each])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return found


def other_ways(rank: int, folder: Path) -> dict[str, list[Tensor]]:
    """The penalty in the loss; a model that has been trained before; several dimensions of a mesh; a part unused."""
    found = {}
    model = moved(osora.attach(shard(tiny_llama()), CONFIGS["sorsa"], basis=folder / "llama basis"))
    found["penalty in the loss"] = train(model, rank, penalty=True)

    model = shard(tiny_llama())
    loss_of(model, batches()[0].chunk(2)[rank]).backward()
    model.zero_grad()
    osora.attach(model, CONFIGS["osora"], basis=folder / "llama basis")
    found["after a backward"] = train(moved(model), rank)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    model = osora.attach(shard(tiny_llama(), mesh=mesh), CONFIGS["osora"], basis=folder / "llama basis")
    found["copies of shards"] = train(moved(model), rank)
    return found


def unused(rank: int, folder: Path) -> list[Tensor | None]:
    """Gradients where one process has no use for a layer, and another layer is of no use to anybody."""
    model = moved(osora.attach(shard(tiny_llama()), CONFIGS["osora"], basis=folder / "llama basis"))
    layers = list(adapted_layers(model).values())
    layers[0].enabled = rank == 0
    layers[1].enabled = False
    try:  # a backward that fails leaves nothing behind
        with torch.enable_grad():
            handle = layers[-1].U.new_zeros(1, requires_grad=True)
            handle.register_hook(lambda _: 1 / 0)
            (loss_of(model, batches()[0]) + handle.sum()).backward()
    except ZeroDivisionError:
        pass
    model.zero_grad()
    loss_of(model, batches()[1].chunk(2)[rank]).backward()
    return [p.grad for layer in layers[:3] for p in layer.trained("default")]


def without_a_head(rank: int, folder: Path) -> dict[str, object]:
    """A model whose modules have other names than the basis's; and its whole state."""
    model = tiny_llama().model
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    osora.attach(model, CONFIGS["osora"], basis=folder / "llama basis")
    gather, gathered = sharded.whole, []
    sharded.whole = lambda tensor: gathered.append(1) or gather(tensor)
    osora.save_adapter(moved(model), folder / "without a head")
    sharded.whole = gather
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    base = {name: layer.base_layer for name, layer in adapted_layers(model).items()}
    osora.detach(model)
    assert all(model.get_submodule(name) is layer for name, layer in base.items())
    assert all(p.requires_grad for p in model.parameters())
    return {"gathered": len(gathered), "state": state}


def in_half(rank: int, folder: Path) -> dict[str, list[Tensor]]:
    """Mixed precision, and layers computed again in the backward, one backward within the other."""
    found = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = osora.attach(shard(tiny_llama(), mp_policy=policy), CONFIGS["osora"], basis=folder / "llama basis")
    found["mixed precision"] = train(moved(model), rank)
    for reentrant in (False, True):
        model = tiny_llama()
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = osora.attach(shard(model), CONFIGS["osora"], basis=folder / "llama basis")
        model.enable_input_require_grads()
        found[f"checkpointed, {reentrant}"] = train(moved(model), rank)
    return found


def said_of(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(rank: int, folder: Path) -> dict[str, str]:
    said, basis, config = {}, folder / "llama basis", CONFIGS["osora"]

    def attach(model: nn.Module, **options: object) -> str:
        says = said_of(lambda: osora.attach(model, options.pop("config", config), **options))
        assert not adapted_layers(model) and any(p.requires_grad for p in model.parameters())
        return says

    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-4
    said["changed"] = attach(shard(changed), basis=basis)
    said["no basis"] = attach(shard(tiny_llama()))
    said["dtype"] = attach(shard(tiny_llama(dtype=torch.bfloat16)), basis=basis)
    said["different"] = attach(shard(tiny_llama()), basis=folder / ("llama basis", "wider basis")[rank])
    said["one fails"] = attach(shard(tiny_llama()), basis=folder / ("llama basis", "broken basis")[rank])
    said["missing"] = attach(shard(tiny_llama()), basis=folder / "partial basis", missing="compute")
    said["whole modules"] = attach(
        shard(tiny_llama(tied=False)), basis=basis, config=osora.OsoraConfig(r=3, modules_to_save=["lm_head"])
    )
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "plan"))
    for case, dim in {"tensor parallel": None, "both, by columns": 0, "both, by rows": 1}.items():
        parallel = tiny_llama()
        for name, module in list(parallel.named_modules()):
            if name.endswith("q_proj"):
                values = distribute_tensor(module.weight.detach(), grid["plan"], [Shard(dim or 0)])
                module.weight = nn.Parameter(values)
        said[case] = attach(parallel if dim is None else shard(parallel, mesh=grid["data"]), basis=basis)
    model = osora.attach(shard(tiny_llama()), config, basis=basis)
    said["merge"] = said_of(lambda: osora.merge(model))
    return said


def everything(rank: int, folder: str) -> dict[str, object]:
    tasks = (trained_late, other_ways, unused, without_a_head, in_half, refusals)
    found = {}
    for task in tasks:
        found[task.__name__] = task(rank, Path(folder))
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("late")
    for base, make in BASES.items():
        make().save_pretrained(folder / base)
        osora.initialise(folder / base, folder / f"{base} basis", osora.OsoraConfig(r=4), progress=False)
    osora.initialise(folder / "llama", folder / "wider basis", osora.OsoraConfig(r=5), progress=False)
    osora.initialise(folder / "llama", folder / "broken basis", osora.OsoraConfig(r=4), progress=False)
    max((folder / "broken basis").glob("*.safetensors")).unlink()
    some = osora.OsoraConfig(r=4, target_modules=["q_proj"])
    osora.initialise(folder / "llama", folder / "partial basis", some, progress=False)
    return folder, on_processes(tmp_path_factory.mktemp("processes"), everything, str(folder))


def alone(folder: Path, base: str, method: str) -> nn.Module:
    return moved(osora.attach(BASES[base](), CONFIGS[method], basis=folder / f"{base} basis"))


@pytest.mark.parametrize(("base", "method"), CASES)
def test_two_processes_train_and_save_what_one_would(runs, tmp_path, base, method):
    folder, found = runs
    model = alone(folder, base, method)
    before = [p.detach().clone() for p in osora.adapter_parameters(model)]
    wish = train(model)
    assert max(float((a - b).abs().max()) for a, b in zip(before, wish, strict=True)) > 1e-2
    for run in found:
        for now, then in zip(run["trained_late"][base, method], wish, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-5)
        assert run["trained_late"][base, method, "gathered"] == 0
    osora.save_adapter(model, tmp_path)
    saved = adapter_info(folder / f"{base} {method}")
    assert saved.modules == adapter_info(tmp_path).modules
    loaded, ids = osora.load_adapter(BASES[base](), folder / f"{base} {method}"), batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "method"),
    [("penalty in the loss", "sorsa"), ("after a backward", "osora"), ("copies of shards", "osora")],
)
def test_other_ways_are_one_process_too(runs, way, method):
    folder, found = runs
    wish = train(alone(folder, "llama", method), penalty="penalty" in way)
    for run in found:
        for now, then in zip(run["other_ways"][way], wish, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-5)


def test_a_layer_that_one_process_does_not_use(runs):
    one, other = (run["unused"] for run in runs[1])
    for mine, theirs in zip(one, other, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert one[0] is not None and one[2] is None and one[3] is None and one[4] is not None


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("changed", "BasisError: the weight of model.layers.1.mlp.up_proj is not the one that .* is a basis of"),
        ("no basis", r"cannot be decomposed there: .* or give attach a basis of it that was made on disk \(basis="),
        ("dtype", r"the weight of model.layers.0.self_attn.q_proj is not .* \(float32 there, bfloat16 here\)"),
        ("different", "RuntimeError: attach was given one thing in process . and another in process ."),
        ("one fails", "FileNotFoundError.* is missing"),
        ("missing", "q_proj|k_proj.weight is sharded over processes, and cannot be decomposed there"),
        ("whole modules", "lm_head.weight is sharded over processes, and cannot be copied there"),
        ("tensor parallel", "split by a tensor parallel plan"),
        ("both, by columns", "q_proj.weight is sharded over processes, and cannot be decomposed there"),
        ("both, by rows", "q_proj.weight is sharded over processes, and cannot be decomposed there"),
        ("merge", "cannot be merged there"),
    ],
)
def test_what_is_refused_on_each_process(runs, case, says):
    for run in runs[1]:
        assert re.search(says, run["refusals"][case]), run["refusals"][case]


def test_all_learn_that_one_process_has_failed(runs):
    first, second = (run["refusals"]["one fails"] for run in runs[1])
    assert first.startswith("RuntimeError: attach failed in process 1: FileNotFoundError")
    assert second.startswith("FileNotFoundError")


def test_other_names_than_the_basis_has(runs, tmp_path):
    folder, found = runs
    model = osora.attach(tiny_llama().model, CONFIGS["osora"], basis=folder / "llama basis")
    osora.save_adapter(moved(model), tmp_path)
    mine, theirs = (adapter_info(each).modules for each in (tmp_path, folder / "without a head"))
    assert mine == theirs and mine[0].name == "layers.0.self_attn.q_proj"
    osora.load_adapter(tiny_llama().model, folder / "without a head")
    for run in found:
        assert run["without_a_head"]["gathered"] == 0
    state = found[0]["without_a_head"]["state"]
    assert state.keys() == model.state_dict().keys()
    for key, wish in model.state_dict().items():
        torch.testing.assert_close(state[key], wish, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("way", "off"), [("mixed precision", 2e-2), ("checkpointed, False", 1e-5), ("checkpointed, True", 1e-5)]
)
def test_lower_precision_and_checkpointing(runs, way, off):
    folder, found = runs
    wish = train(alone(folder, "llama", "osora"))
    mine, theirs = (run["in_half"][way] for run in found)
    for one, other, then in zip(mine, theirs, wish, strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32
        torch.testing.assert_close(one, then, rtol=off, atol=off)
