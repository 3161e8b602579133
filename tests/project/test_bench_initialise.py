# SPDX-License-Identifier: Apache-2.0
"""bench/initialise.py checks the basis before it times, refuses a wrong one, and projects by the schedule."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from benches import assert_complete, only_result, quick, spoil_sigma

from osora.files.basis import BasisFolder
from osora.initialisation import work
from osora.initialisation.schedule import Job, schedule, units
from osora.model import decompose

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT and transformers, our peers


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    """A checkpoint of the size of --quick, made once."""
    folder = tmp_path_factory.mktemp("bench")
    made = bench("initialise_checkpoint").checkpoint(folder, bench("initialise_checkpoint").Recipe(2, 64))
    assert made.bytes == sum(path.stat().st_size for path in made.folder.glob("model-*"))
    return folder


def words(folder, output, *more):
    return quick(output, "--folder", str(folder), *more)


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_what_it_says(bench, folder):
    from transformers import AutoModelForCausalLM

    module = bench("initialise_checkpoint")
    made = module.checkpoint(folder, module.Recipe(2, 64))
    assert len(list(made.folder.glob("model-*-of-00003.safetensors"))) == 3
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.dtype == torch.bfloat16 and bool(model(torch.arange(6)[None]).logits.isfinite().all())
    weights = {name: m.weight for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(weights) == 14 and {tuple(w.shape) for w in weights.values()} == set(made.known)
    moved = []
    for weight in weights.values():
        known = made.known[tuple(weight.shape)]
        true = torch.tensor(known.sigma, dtype=torch.float64)
        off = (torch.linalg.svdvals(weight.detach().double()) - true).abs().max()
        moved.append(float(off) / known.rounding)
        assert 0 < known.rounding < 0.01 * known.sigma[0]
    assert 0.02 < max(moved) <= 1
    same_shape = [weight for weight in weights.values() if weight.shape == (64, 64)]
    assert len(same_shape) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


def test_the_checkpoint_has_the_shapes_of_llama(bench, folder):
    sizes = bench("initialise_checkpoint").Recipe(1).linears()
    by_name = {shape.name: shape for shape in bench("initialise_project").SHAPES}
    assert [(d, k) for d, k, _ in sizes.values()] == [job.shape for job in by_name["8 B"].jobs(64)[:7]]
    assert sum(job.shape[0] * job.shape[1] for job in by_name["8 B"].jobs(64)) == 6_979_321_856
    assert sum(job.shape[0] * job.shape[1] for job in by_name["70 B"].jobs(64)) == 68_451_041_280
    assert sum(job.shape[0] * job.shape[1] for job in by_name["405 B"].jobs(64)) == 401_646_551_040


def test_a_checkpoint_is_made_once_for_each_recipe(bench, folder, monkeypatch):
    module = bench("initialise_checkpoint")
    monkeypatch.setattr(module, "_write", lambda *a: pytest.fail("it was made again"))
    module.checkpoint(folder, module.Recipe(2, 64))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        module.checkpoint(folder, module.Recipe(2, 64, seed=1))


# -- checked, then measured --------------------------------------------------------------------------------------------


def test_initialise_checks_and_then_compares(bench, folder, tmp_path, capsys):
    assert bench("initialise").main(words(folder, tmp_path)) == 0
    result = only_result(tmp_path)
    assert_complete(result, "initialise")
    found = result["results"]
    assert found["checked"]["layers"] == 14 and 0 < found["checked"]["sigma_error_over_rounding"] <= 1
    assert set(found["seconds"]) == {"initialise", "attach", "one", "two", "pissa_niter_16", "reuse", "read"}
    for name, (above, below) in bench("initialise").RATIOS.items():
        pair = (found["seconds"][part]["median"] for part in (above, below))
        assert found["ratios"][name]["median"] == pytest.approx(next(pair) / next(pair))
    assert found["pipeline"]["reading"] > 0 and 0 <= found["pipeline"]["hidden"] <= 1
    memory = found["memory"]
    assert 10**8 < memory["after_imports_bytes"] <= memory["peak_bytes"] < 10**10
    assert found["rates"]["seconds_per_operation"] == pytest.approx(
        found["pipeline"]["computing"] / found["plan"]["operations"]
    )
    assert len(found["projections"]) == 9 and all(facts["projected"] for facts in found["projections"])
    assert found["goals"] == []  # of a tiny model
    shown = capsys.readouterr().out
    assert "14 layers" in shown and "bit for bit" in shown and "no figures" in shown and "PROJECTED" not in shown
    # The checkpoint stays, and nothing else does.
    assert [path.name for path in folder.iterdir()] == ["llama3-8b-2-blocks-by-64"]


def refused(bench, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench("initialise_work"), "together", lambda *a: pytest.fail("it was timed"))
    assert bench("initialise").main(words(folder, tmp_path)) == 1
    shown = capsys.readouterr()
    assert "ratio" not in shown.out and list(tmp_path.iterdir()) == []
    return shown.err


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda item: dataclasses.replace(item, V=item.V.roll(1, 0)), "its residual is"),
        (lambda item: dataclasses.replace(item, S=item.S * 1.05), "times what rounding to bfloat16 allows"),
        (lambda item: dataclasses.replace(item, U=1.1 * item.U, V=1.1 * item.V), "orthonormal only to 2.1e-01"),
    ],
)
def test_initialise_refuses_a_wrong_basis(bench, folder, tmp_path, capsys, monkeypatch, spoil, complaint):
    right = work.decompose

    def wrong(weights, rank, **options):
        found = right(weights, rank, **options)
        return [spoil(item) if item.name.endswith("0.mlp.up_proj") else item for item in found]

    monkeypatch.setattr(work, "decompose", wrong)
    shown = refused(bench, folder, tmp_path, capsys, monkeypatch)
    assert re.search(rf"layers\.0\.mlp\.up_proj: .*{re.escape(complaint)}", shown)
    assert re.search(r"layers\.0\.mlp\.up_proj: (U|S0|V) of the basis is not what osora\.attach has", shown)


def test_initialise_refuses_a_basis_that_attach_does_not_have(bench, folder, tmp_path, capsys, monkeypatch):
    right = decompose.decompose

    def other(weights, rank, **options):
        return [
            spoil_sigma(item) if item.name.endswith("1.mlp.down_proj") else item
            for item in right(weights, rank, **options)
        ]

    monkeypatch.setattr(decompose, "decompose", other)
    shown = refused(bench, folder, tmp_path, capsys, monkeypatch)
    assert "layers.1.mlp.down_proj: S0 of the basis is not what osora.attach has on the loaded model" in shown
    assert shown.count("of the basis") == 1


def test_runs_must_make_the_same_basis(bench):
    module = bench("initialise")
    run = lambda *prints: [[{"fingerprint": each} for each in prints]]  # noqa: E731
    module.check_same({"initialise": run("a"), "one": run("b"), "two": run("b", "b")}, "a")
    for found in (
        {"initialise": run("c"), "one": run("b"), "two": run("b", "b")},
        {"initialise": run("a"), "one": run("b"), "two": run("b", "c")},
    ):
        with pytest.raises(module.Refused, match="not every run made the same basis"):
            module.check_same(found, "a")


def test_a_process_that_fails_is_told(bench, folder, tmp_path):
    module = bench("initialise_work")
    task = module.Task("initialise", str(tmp_path / "nothing"), 8, 1e-3, 0, 1, basis=str(tmp_path / "basis"))
    with pytest.raises(RuntimeError, match="is no folder"):
        module.together([task])


# -- goals and projections ---------------------------------------------------------------------------------------------


def test_goals_are_judged(bench):
    module = bench("initialise")
    ratios = {"initialise / attach": 1.06, "two / one": 0.55, "reuse / attach": 0.1}
    results = {
        "ratios": {name: {"median": value} for name, value in ratios.items()},
        "pipeline": {"hidden": 0.89},
        "memory": {"peak_bytes": 1.2e9},
    }
    found = module.judged(results)
    assert [facts["met"] for facts in found] == [False, True, True, False, True]
    lines = [module.verdict(facts) for facts in found]
    assert lines[0] == "initialise over attach on the loaded model: at most 1.05 x: 1.06 x: NOT MET"
    assert lines[3] == "share of reading and writing that is hidden: at least 0.9: 0.89: NOT MET"
    assert lines[4].endswith("at most 1.2 GB: 1.2 GB: met")


def test_projections_are_those_of_the_schedule(bench):
    module = bench("initialise_project")
    rates = module.Rates(2, 1e-11, 1e-9, 1e9)
    shape = module.Shape("small", 3, 256, 512, 64)
    jobs = shape.jobs(128)
    assert Job((64, 256), 64, torch.bfloat16) in jobs and len(jobs) == 21  # no rank above a width
    parts = units(jobs)
    costs = [sum(jobs[i].flops for i in unit) for unit in parts]
    assert module.project(shape, 1, 128, rates)["arithmetic_seconds"] == pytest.approx(1e-11 * sum(costs))
    of_three = module.project(shape, 3, 128, rates)
    slowest = max(sum(costs[i] for i in members) for members in schedule(costs, 3))
    assert of_three["arithmetic_seconds"] == pytest.approx(1e-11 * slowest)
    assert of_three["efficiency"] == pytest.approx(sum(costs) / 3 / slowest) and of_three["efficiency"] <= 1
    # Reading is what takes the time where it is slower.
    slow = module.project(shape, 1, 128, dataclasses.replace(rates, seconds_per_byte=1.0))
    assert (
        slow["seconds"]
        == slow["reading_seconds"]
        == slow["bytes"]
        == 2 * 3 * (2 * 256**2 + 2 * 64 * 256 + 3 * 512 * 256)
    )
    assert slow["disk_bytes_per_second"] == pytest.approx(1)


def test_more_processes_take_less_time(bench):
    module = bench("initialise_project")
    found = module.projections(64, module.Rates(2, 1e-11, 1e-9, 1e9))
    for name in ("8 B", "70 B", "405 B"):
        seconds = [facts["seconds"] for facts in found if facts["model"] == name]
        assert (
            len(seconds) == 3
            and seconds[0] / 8 <= seconds[1] < seconds[0]
            and seconds[0] / 64 <= seconds[2] < seconds[1]
        )
    assert [row[0] for row in module.rows(found)][:2] == ["8 B, 1 process", "8 B, 8 processes"]
    assert [module.duration(seconds) for seconds in (9, 90, 7200)] == ["9 s", "1.5 min", "2 h"]


def test_table_of_a_full_run(bench, capsys):
    """Goals and assumptions are shown where the run was no --quick."""
    module, work_ = bench("initialise"), bench("initialise_work")
    process = {"began": 0.0, "ended": 2.0, "cpu_seconds": 3.0, "anonymous_peak": 10**9, "anonymous_before": 4 * 10**8}
    times = {"reading": 1.0, "computing": 2.0, "writing": 0.5, "whole": 2.1, "hidden": 0.93}
    found = {name: [[process | {"times": times, "bytes": 10**9}]] for name in work_.KINDS}
    found |= {"one": found["initialise"], "two": [[process, process | {"ended": 3.0}]]}
    plan = SimpleNamespace(flops=1e12, bytes_read=2 * 10**9, bytes_written=10**7, memory=10**8)
    results = module.evaluate(found, {}, plan, 64, 2)
    assert results["ratios"]["two / one"]["median"] == 1.5  # from the first beginning to the last end
    results["goals"] = module.judged(results)
    module.show(results, quick=False)
    shown = capsys.readouterr().out
    assert shown.count("NOT MET") == 2 and shown.count(": met") == 3
    assert "PROJECTED" in shown and "405 B, 64 processes" in shown and "The projections assume that" in shown
    assert "2 such cores" in shown
    json.dumps(results)


@pytest.mark.parametrize(
    "more, why", [(["--rank", "0"], "--rank must be at least 1"), (["--rank", "2000"], "1024 rows")]
)
def test_options_are_checked(bench, capsys, more, why):
    with pytest.raises(SystemExit) as stopped:
        bench("initialise").main(more)
    assert stopped.value.code == 2 and why in capsys.readouterr().err


def test_the_memory_is_that_of_no_file(bench):
    module = bench("initialise_work")
    with module.Peak() as peak:
        before = module.anonymous()
        held = torch.ones(2**24)
        del held
        module.threading.Event().wait(3 * module.SAMPLES)
    assert peak.bytes >= before > 10**7


def test_the_kept_basis_is_one(bench, folder, tmp_path):
    """What the check makes is a basis like any other."""
    module, make = bench("initialise_work"), bench("initialise_checkpoint")
    made = make.checkpoint(folder, make.Recipe(2, 64))
    task = module.Task("initialise", str(made.folder), 8, 1e-3, 0, 1, basis=str(tmp_path / "basis"))
    facts, wrong = module.check(made, task)
    assert wrong == [] and facts["fingerprint"] == BasisFolder(tmp_path / "basis").fingerprint
    assert facts["bytes"] > module.plan(task).bytes_written > 0
