# SPDX-License-Identifier: Apache-2.0
"""ΔΣ, ΔD and ΔΘ against dense float64 decompositions, near-equal singular values included, and their files."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from helpers import move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from safetensors.torch import save_file

import osora
from osora.analysis.weights import Weights
from osora.files.whole import write_json

# Two decompositions in float64, each with residuals of at most 1e-8, of matrices whose relative gaps are above 1e-3:
# vectors within 1e-5, so cosines near 1 within 1e-10, and other overlaps within 1e-5.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_matrix(d=23, k=17, dtype=torch.float64):
    return torch.randn(d, k, dtype=torch.float64).to(dtype)


def by_lapack(before, after, rank):
    """The three formulas as the docstring has them, subspace by subspace, from dense decompositions."""
    (U0, S0, V0), (U1, S1, V1) = (torch.linalg.svd(w.double(), full_matrices=False) for w in (before, after))
    V0, V1 = V0.T, V1.T
    cosines = [(U0 * U1).sum(0).abs()[:rank], (V0 * V1).sum(0).abs()[:rank]]
    gaps0, gaps1 = (S - torch.cat([S[1:], S.new_zeros(1)]) for S in (S0, S1))
    turned = whole = 0.0
    for j in range(1, rank + 1):
        gap = min(gaps0[j - 1], gaps1[j - 1])
        for first, second in ((U0, U1), (V0, V1)):
            angles = torch.linalg.svdvals(first[:, :j].T @ second[:, :j]).clamp(max=1).acos()
            turned += float(gap * angles.sin().square().sum()) / 2
        whole += float(j * gap)
    return (S0 - S1).abs()[:rank].mean().item(), 1 - sum(c.mean().item() for c in cosines) / 2, turned / whole


def with_values(S, d=12, k=9):
    U = torch.linalg.qr(torch.randn(d, len(S), dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(k, len(S), dtype=torch.float64))[0]
    return U, V, (U * S) @ V.T


@pytest.mark.parametrize("rank", [1, 5, 17, None])
@pytest.mark.parametrize(("d", "k"), [(23, 17), (17, 23), (17, 17)])
def test_it_is_the_dense_formulas(d, k, rank):
    before = random_matrix(d, k)
    for size in (1e-3, 0.3, 10.0):
        after = before + size * random_matrix(d, k)
        found = osora.weight_change(before, after, rank=rank)
        wish = by_lapack(before, after, 17 if rank is None else rank)
        assert found.rank == (rank or 17)
        torch.testing.assert_close(
            torch.tensor([found.sigma, found.direction, found.angle]), torch.tensor(wish), **CLOSE
        )
        assert found.relative == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_lose_nothing(dtype):
    before, after = random_matrix(dtype=dtype), random_matrix(dtype=dtype)
    found, exact = (osora.weight_change(*pair, rank=4) for pair in ((before, after), (before.double(), after.double())))
    assert found == exact


def test_no_change_is_exactly_none():
    weight = random_matrix(dtype=torch.float32)
    assert osora.weight_change(weight, weight.clone()) == osora.WeightChange("weight", 17, 0.0, 0.0, 0.0, 0.0)
    zero = torch.zeros(4, 3)
    assert osora.weight_change(zero, zero + 0).relative == 0


def test_scaling_turns_nothing():
    """W_t = c W_0: ΔD = ΔΘ = 0, ΔΣ = |c − 1| mean σ."""
    before = random_matrix()
    found = osora.weight_change(before, -1.5 * before, rank=6)
    S = torch.linalg.svdvals(before)[:6]
    assert found.sigma == pytest.approx(0.5 * S.mean().item(), rel=1e-9)
    assert found.direction < 1e-9 and found.angle < 1e-9  # square of an error of 1e-8 over a gap, and rounding


def test_two_independent_matrices_share_no_directions():
    found = osora.weight_change(random_matrix(300, 200), random_matrix(300, 200), rank=3)
    assert found.direction > 0.8 and found.angle > 0.9
    assert found.direction <= 1 and found.angle <= 1


@pytest.mark.parametrize("place", [1, 2, 3])
def test_near_equal_singular_values(place):
    """A rotation by 45° in a plane of two near-equal values changes W by nothing, and ΔD by much. ΔΘ stays.

    ``place`` 3 is the border of the rank that is compared.
    """
    gap, rank = 1e-6, 3
    S = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    S[place] = S[place - 1] - gap
    U, V, before = with_values(S)
    turn = torch.eye(5, dtype=torch.float64)
    half = math.sqrt(0.5)
    turn[place - 1 : place + 1, place - 1 : place + 1] = torch.tensor([[half, -half], [half, half]])
    after = (U @ turn * S) @ (V @ turn).T
    assert (after - before).norm() < 2 * gap
    found = osora.weight_change(before, after, rank=rank)
    assert found.direction > 0.09  # one or two of three vectors have turned by 45°
    assert found.angle < gap  # gap / Σ j g_j, times at most 1
    assert found.sigma < gap
    wish = by_lapack(before, after, rank)
    # the vectors of both are right to 1e-8 over a relative gap of 2e-7, which bounds nothing; ΔΘ does not care
    assert abs(found.angle - wish[2]) < gap


def test_the_angle_moves_continuously_where_the_direction_jumps():
    """Two values cross, step by step: every step changes W, and ΔΘ, by little."""
    U, V, before = with_values(torch.tensor([5.0, 3.01, 3.0, 1.0], dtype=torch.float64))
    steps = []
    for moved in torch.linspace(0, 0.02, 40, dtype=torch.float64):
        S = torch.tensor([5.0, 3.01, 3.0, 1.0], dtype=torch.float64)
        S[2] += moved
        steps.append(osora.weight_change(before, (U * S) @ V.T, rank=3))
    jumps = {
        field: max(abs(getattr(b, field) - getattr(a, field)) for a, b in pairwise(steps))
        for field in ("direction", "angle")
    }
    assert jumps["direction"] == pytest.approx(2 / 3, abs=1e-6)  # two of three vectors are exchanged at once
    assert jumps["angle"] < 1e-3


def test_equal_values_everywhere_have_no_direction():
    Q = torch.linalg.qr(random_matrix(8, 8))[0]
    found = osora.weight_change(Q, -2 * torch.eye(8, dtype=torch.float64))
    assert 0 <= found.angle <= 1 and found.sigma == pytest.approx(1)


@pytest.mark.parametrize(
    ("before", "after", "error", "match"),
    [
        (torch.ones(3, 4), torch.ones(4, 3), ValueError, r"one shape.*\[3, 4\] and \[4, 3\]"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), ValueError, "two matrices"),
        (torch.ones(3), torch.ones(3), ValueError, "must be a matrix"),
        (torch.ones(3, 4), torch.full((3, 4), math.nan), ValueError, "NaN"),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4), TypeError, "int32"),
    ],
)
def test_bad_matrices_are_refused(before, after, error, match):
    with pytest.raises(error, match=match):
        osora.weight_change(before, after)


@pytest.mark.parametrize("rank", [0, -1, True, 2.0])
def test_bad_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="rank must be a positive int"):
        osora.weight_change(torch.ones(3, 4), torch.zeros(3, 4), rank=rank)


# -- models ------------------------------------------------------------------------------------------------------------


def numbers(changes):
    return sorted((c.name, c.rank, c.sigma, c.direction, c.angle, c.relative) for c in changes)


@pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_an_adapter_is_compared_with_its_base(make, config):
    """Now, merged, against a copy and against a state_dict: always the same numbers, to the rounding of merging."""
    original, model = make(), make()
    move_adapter(osora.attach(model, config(r=4)))
    found = osora.weight_changes(model, rank=4, modules=list(names := [*osora.adapted_layers(model)]))
    assert [change.name for change in found] == names and all(change.sigma > 0 for change in found)
    for name, change in zip(names, found, strict=True):
        layer = model.get_submodule(name)
        base = Weights(original)[name]
        delta = layer.delta_weight().t() if make is tiny_gpt2 else layer.delta_weight()
        torch.testing.assert_close(Weights(model)[name], base + delta, rtol=0, atol=0)
        assert by_lapack(base, base + delta, 4)[0] == pytest.approx(change.sigma, rel=1e-5)
    assert numbers(osora.weight_changes(original, model, rank=4, modules=names)) == numbers(found)
    osora.merge(model)
    assert numbers(osora.weight_changes(model, rank=4, modules=names)) == numbers(found)
    osora.unmerge(model)
    with osora.disabled(model):
        assert all(change.sigma == 0 for change in osora.weight_changes(original, model, rank=4, modules=names))


def test_modules_without_an_adapter_have_not_changed():
    model = move_adapter(osora.attach(tiny_llama(), osora.OsoraConfig(r=4, target_modules=["q_proj"])))
    for change in osora.weight_changes(model, rank=2):
        assert (change.sigma > 0) == change.name.endswith("q_proj")


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints(tmp_path, shards):
    """Folders of saved models, in shards or not, against the models themselves."""
    first, second = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    wish = osora.weight_changes(first, second, rank=3, modules=r".*_proj")
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(tmp_path / name, max_shard_size=10**9 if shards == 1 else 40_000)
    assert len(list((tmp_path / "first").glob("*.safetensors"))) >= shards
    found = osora.weight_changes(tmp_path / "first", str(tmp_path / "second"), rank=3, modules=r".*_proj")
    assert numbers(found) == numbers(wish) and len(found) == 14
    assert numbers(osora.weight_changes(first.state_dict(), second, rank=3, modules=r".*_proj")) == numbers(wish)
    whole = osora.weight_changes(tmp_path / "first", tmp_path / "second", rank=1)
    assert "model.embed_tokens" in [change.name for change in whole]
    assert math.isclose(found.mean.angle, sum(c.angle for c in found) / 14)


def test_a_model_of_conv1d_against_its_checkpoint(tmp_path):
    """GPT-2 stores weights as [in, out]: a square one must not be compared with its transpose."""
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    names = r".*\.(c_attn|c_proj|c_fc)"
    for other in (tmp_path, {name: tensor.clone() for name, tensor in model.state_dict().items()}):
        found = osora.weight_changes(other, model, modules=names)
        assert len(found) == 8 and all(change.relative == change.sigma == 0 for change in found)
    move_adapter(osora.attach(model, osora.SorsaConfig(r=4)))
    assert numbers(osora.weight_changes(tmp_path, model, modules=names)) == numbers(
        osora.weight_changes(model, modules=names)
    )


def test_a_weight_that_was_zero(tmp_path):
    """Its change has no relative size, and JSON no infinity: null, and nothing of a long training is lost."""
    model = tiny_llama()
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    recorder = osora.ChangeRecorder(model, rank=2, modules=["up_proj"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_()
    recorder.record(1)
    recorder.save(tmp_path / "changes.json")
    (record,) = json.loads((tmp_path / "changes.json").read_text())
    assert [module["relative"] for module in record["modules"]] == [None, 0.0] and record["mean"]["relative"] is None
    assert recorder.records[0].mean.relative == math.inf


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for the old name
def test_peft_adapters():
    peft = pytest.importorskip("peft")
    original, model = tiny_llama(), tiny_llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert all(change.relative == 0 for change in osora.weight_changes(original, wrapped, rank=2))  # B starts at zero
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    found = osora.weight_changes(original, wrapped, rank=2)
    assert {c.name.rpartition(".")[2] for c in found if c.sigma} == {"q_proj", "down_proj"}
    assert numbers(osora.weight_changes(wrapped, rank=2, modules=["q_proj"])) == numbers(
        c for c in found if c.name.endswith("q_proj")
    )
    merged = wrapped.merge_and_unload()
    for one, other in zip(osora.weight_changes(original, merged, rank=2), found, strict=True):
        assert one.sigma == pytest.approx(other.sigma, rel=1e-4, abs=1e-6)  # a merged weight is rounded to float32
    dora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA adapter, which is no sum"):
        osora.weight_changes(original, dora, rank=2)


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"no matrix matches modules=\['nope'\].*q_proj"):
        osora.weight_changes(model, tiny_llama(), modules=["nope"])
    with pytest.raises(ValueError, match="no matrix has the same name"):
        osora.weight_changes(model, tiny_bert())
    with pytest.raises(ValueError, match="no linear layers"):
        osora.weight_changes(torch.nn.LayerNorm(3), model)
    for alone in (model, model.state_dict()):  # each would be compared with itself
        with pytest.raises(ValueError, match="before must be a model with an adapter"):
            osora.weight_changes(alone)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        osora.weight_changes(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="holds no checkpoint in safetensors files"):
        osora.weight_changes(tmp_path, model)
    save_file({"a.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors is no readable safetensors file"):
        osora.weight_changes(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    for index in (
        "[]",
        '{"weight_map": {"a.weight": "../model.safetensors"}}',
        '{"weight_map": {"a.weight": "none.safetensors"}}',
    ):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"has no weight_map|which is no file beside it"):
            osora.weight_changes(tmp_path, model)


def test_an_index_left_behind_is_not_read(tmp_path):
    """A checkpoint in one file beside the index and the shards of an older one: transformers reads the file."""
    first, second = tiny_llama(), tiny_llama(layers=1)
    first.save_pretrained(tmp_path / "old", max_shard_size=40_000)
    second.save_pretrained(tmp_path / "new")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "old/model.safetensors")
    assert not any(".layers.1." in name for name in Weights(tmp_path / "old"))


# -- along training ----------------------------------------------------------------------------------------------------


def train(model, steps, recorder):
    optimizer = torch.optim.AdamW(osora.adapter_parameters(model), lr=1e-2)
    ids = token_ids()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        recorder.record(step)


def test_a_recorder_follows_the_training(tmp_path):
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    recorder = osora.ChangeRecorder(model, rank=4, modules=["q_proj", "down_proj"])
    assert recorder.record(0).mean == osora.WeightChange("mean", 4, 0.0, 0.0, 0.0, 0.0)
    train(model, 3, recorder)
    assert [record.step for record in recorder.records] == [0, 1, 2, 3]
    relative = [record.mean.relative for record in recorder.records]
    assert relative == sorted(relative) and relative[-1] > relative[0]
    at_once = osora.weight_changes(model, rank=4, modules=["q_proj", "down_proj"])
    assert numbers(recorder.records[-1]) == numbers(at_once)
    recorder.save(tmp_path / "changes.json")
    read = json.loads((tmp_path / "changes.json").read_text())
    assert read == [record.to_dict() for record in recorder.records]
    assert read[3]["modules"][0]["name"] == "model.layers.0.self_attn.q_proj" and read[3]["mean"]["sigma"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["changes.json"]


def test_a_recorder_sees_full_fine_tuning():
    model = tiny_llama()
    recorder = osora.ChangeRecorder(model, rank=2, modules=["up_proj"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    first, second = recorder.record(1)
    assert first.sigma == 0 and second.relative == pytest.approx(1)


def test_trainer_calls_the_recorder(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=2))
    recorder = osora.ChangeRecorder(model, rank=2, modules=["q_proj"], every=2)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(5)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[recorder.callback()]).train()
    assert [record.step for record in recorder.records] == [2, 4, 5]
    assert recorder.records[-1].mean.sigma > 0


def test_a_recorder_refuses_nonsense():
    with pytest.raises(ValueError, match="every must be a positive number of steps, got 0"):
        osora.ChangeRecorder(tiny_llama(), every=0)
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj has NaN"):
        osora.ChangeRecorder(broken)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures(tmp_path, ending):
    pytest.importorskip("matplotlib")
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    recorder = osora.ChangeRecorder(model, rank=4, modules=["q_proj"])
    recorder.record(0)
    train(model, 2, recorder)
    osora.plot_changes(tmp_path / f"changes.{ending}", {"OSoRA": recorder.records, "again": recorder.records})
    found = osora.plot_spectra(tmp_path / f"spectra.{ending}", model, title="tiny")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for name in ("changes", "spectra"):
        assert (tmp_path / f"{name}.{ending}").read_bytes().startswith(starts[ending])
    assert len(list(tmp_path.iterdir())) == 2
    for name, values in found.items():
        wish = torch.linalg.svdvals(Weights(model)[name].double())
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), wish, rtol=1e-5, atol=1e-5)
    assert len(found) == 15  # 14 linears and the output head


def test_colours_follow_the_model_and_not_the_file(tmp_path):
    """Layer 10 of a file comes before its layer 2; each has as many points here as its rank."""
    pytest.importorskip("matplotlib")
    tensors = {f"layers.{place}.proj.weight": torch.randn(rank, 5) for place, rank in ((0, 2), (10, 4), (2, 3))}
    osora.plot_spectra(tmp_path / "x.svg", tensors)
    picture = (tmp_path / "x.svg").read_text()
    lines = re.findall(r'<path d="(M[^"]*)" clip-path="[^"]*" style="fill: none; stroke: (#\w+)', picture)
    shades = [colour for path, colour in lines if path.count("L") in (1, 2, 3) and colour != "#b0b0b0"]
    points = [path.count("L") + 1 for path, colour in lines if colour in shades]
    assert points[-3:] == [2, 3, 4] and len(set(shades[-3:])) == 3
    assert ">first<" in re.sub(r"<!-- (\w+) -->", r">\1<", picture)


def test_pictures_refuse_nonsense(tmp_path):
    pytest.importorskip("matplotlib")
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"cannot be written as 'x\.doc'"):
        osora.plot_spectra(tmp_path / "x.doc", model, rank=1)
    with pytest.raises(ValueError, match="no runs"):
        osora.plot_changes(tmp_path / "x.png", {})
    with pytest.raises(ValueError, match="'a' needs records with steps"):
        osora.plot_changes(tmp_path / "x.png", {"a": [osora.weight_changes(model, model, rank=1, modules=["q_proj"])]})
    with pytest.raises(ValueError, match="rank must be a positive int"):
        osora.plot_spectra(tmp_path / "x.png", model, rank=0)
    assert not list(tmp_path.iterdir())


def test_json_is_written_whole_and_without_nan_unless_it_is_allowed(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "ö"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n "a": "ö"\n}\n'
    write_json(path, [float("nan")], allow_nan=True)
    assert math.isnan(json.loads(path.read_text(encoding="utf-8"))[0])
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
