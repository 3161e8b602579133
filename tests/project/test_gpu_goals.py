# SPDX-License-Identifier: Apache-2.0
"""What bench/gpu_report.py says of the goals: from lines that the benchmarks really write, on a card that is none."""

import json
import subprocess
import sys

import pytest
from cards import Card, pretend
from root import ROOT

for package in ("peft", "rich", "transformers"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("default")  # of PEFT, our peer
CARD = {"gpu": {"name": "a card"}}


@pytest.fixture(scope="module")
def lines(bench, tmp_path_factory):
    """Of every benchmark with a goal, in small, renamed to the sizes that the goals are about."""
    folder = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as change:
        pretend(change, bench, Card(cache=20_000))
        change.setenv("OSORA_RESULTS_JSONL", str(folder / "results.jsonl"))
        quick = ["--preset", "quick", "--threads", "1", "--dtypes", "bfloat16", "--peers", "frozen", "osora", "lora"]
        more = ["--shapes", "96x64", "--rows", "24", "--ranks", "4", "--output", str(folder)]
        assert bench("linear").main([*quick, *more]) == 0
        words = [
            "--device",
            "cpu",
            "--scale",
            "64",
            "--blocks",
            "1",
            "--rows",
            "4",
            "--rank",
            "8",
            "--repetitions",
            "1",
        ]
        assert bench("llama").main([*words, "--output", str(folder)]) == 0
        profile = bench("gpu_profile")
        change.setattr(profile, "SHAPES", {"cpu": [(96, 64)]})
        change.setattr(profile, "BATCHES", {"cpu": (2,)})
        profile.decompositions("cpu")
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in found:
        case = line.get("case", {})
        if line["benchmark"] == "profile":
            line["gpu"] = "a card"
            case |= {"svd": "4096x4096", "batch": 32, "rank": 64}
        elif line["benchmark"] == "llama":
            case |= {"matrices": 224} if "matrices" in case else {}
            case |= {"linears": 224} if "linears" in case else {}
            case |= {"rows": 8192} if "rows" in case else {}
        elif "shape" in case:
            case["shape"] |= {"d": 4096, "k": 4096}
            case["n"] = 8192
            for row in case["peers"]:
                row["rank"] = row["rank"] and 64
        elif "adapters" in case:
            case |= {"d": 4096, "k": 4096, "rank": 64}
        if "machine" in line:
            line["machine"] |= CARD
    return found


def by_goal(judgements):
    return {facts["goal"]: facts for facts in judgements}


def test_every_goal_is_read_from_what_the_benchmarks_write(bench, lines):
    found = by_goal(bench("gpu_goals").judged(lines))
    missing = [goal for goal, facts in found.items() if facts["measured"] is None]
    assert missing == ["SVD of 4096×4096 in 32s, r = 128, bfloat16"]  # the rehearsal has one rank
    assert {facts["how"] for goal, facts in found.items() if "over" in goal} == {"graph"}
    linear = next(line["case"] for line in lines if "shape" in line.get("case", {}))
    ours = next(row for row in linear["peers"] if row["peer"] == "osora")
    over = next(facts for goal, facts in found.items() if goal.endswith("backward, over frozen") and "4096" in goal)
    assert over["measured"] == ours["graph_over_frozen"]["median"] and over["met"] == (over["measured"] <= 1.2)
    lora = next(row for row in linear["peers"] if row["peer"] == "lora")
    over = next(facts for goal, facts in found.items() if goal.endswith("over PEFT LoRA"))
    assert over["measured"] == lora["graph_osora_over_this"]["median"]


def test_without_a_graph_it_is_what_the_host_queued(bench, lines):
    text = json.dumps(lines).replace('"graph_over_frozen"', '"lost"')
    found = by_goal(bench("gpu_goals").judged(json.loads(text)))
    hows = {facts["how"] for goal, facts in found.items() if goal.endswith("over frozen")}
    assert hows == {"queued"}


def test_a_rehearsal_is_no_measurement(bench, lines):
    text = json.dumps(lines).replace(json.dumps(CARD["gpu"]), "null").replace('"a card"', "null")
    assert {facts["measured"] for facts in bench("gpu_goals").judged(json.loads(text))} == {None}


def test_other_sizes_are_not_taken_for_the_goals(bench, lines):
    for old, new in (('"n": 8192', '"n": 512'), ('"d": 4096', '"d": 1024'), ("bfloat16", "float32")):
        found = by_goal(bench("gpu_goals").judged(json.loads(json.dumps(lines).replace(old, new))))
        assert next(facts for goal, facts in found.items() if "over PEFT LoRA" in goal)["measured"] is None, new
    found = bench("gpu_goals").judged(json.loads(json.dumps(lines).replace("224", "14")))
    assert sum(facts["measured"] is None for facts in found) == 3


def test_the_report_prints_them(lines, tmp_path):
    write = lambda lines: (tmp_path / "results.jsonl").write_text(  # noqa: E731
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    command = [sys.executable, str(ROOT / "bench/gpu_report.py"), str(tmp_path), "--goals"]
    write([])
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count(": not measured\n") == 8 and "met" not in shown.lower().replace("not measured", "")
    write([line for line in lines if line["benchmark"] != "llama"])
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(line.endswith("not measured") for line in shown) == 4
    (svd,) = (line for line in shown if "r = 64, bfloat16: at most 4 ms each:" in line)
    assert "products with W" in svd and svd.rpartition(": ")[2] in ("met", "NOT MET")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [facts["measured"] is None for facts in report["goals"]].count(True) == 4
