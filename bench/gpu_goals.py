# SPDX-License-Identifier: Apache-2.0
"""What the project wants of a card, and what the lines of results.jsonl say of it: met, not met, or not measured.

A ratio is that of a captured graph's replays where there is one, else of what the host has queued, and says which.
Needs nothing but Python.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]
Measured = tuple[float, str] | None  # and how it was measured


@dataclass(frozen=True)
class Goal:
    """A number that should be no larger than `most`."""

    about: str
    most: float
    unit: str
    benchmark: str
    of: Callable[[Case], Measured]


def ratio(facts: Case, graph: str, queued: str) -> Measured:
    """The median of a ratio."""
    for name, how in ((graph, "graph"), (queued, "queued")):
        if isinstance(facts.get(name), dict):
            return facts[name]["median"], how
    return None


def decomposed(rank: int) -> Callable[[Case], Measured]:
    """Milliseconds for each of 32 matrices."""

    def of(case: Case) -> Measured:
        about = {"svd": "4096x4096", "dtype": "bfloat16", "rank": rank, "batch": 32}
        if any(case.get(name) != value for name, value in about.items()) or "ms_each" not in case:
            return None
        share = case.get("share_of_products")
        return case["ms_each"], "" if share is None else f"products with W {100 * share:.0f} % of it"

    return of


def attached(case: Case) -> Measured:
    if case.get("part") != "attach" or case.get("matrices") != 224:
        return None
    return case["seconds"]["median"], f"worst residual {case['worst_residual']:.1e}, {case['unconverged']} unconverged"


def layer(name: str, peer: str, *ratios: str) -> Callable[[Case], Measured]:
    """Of bench/linear.py's case at 4096×4096."""

    def of(case: Case) -> Measured:
        shape = case.get("shape") or {}
        if (shape.get("d"), shape.get("k"), case.get("n"), case.get("dtype")) != (4096, 4096, 8192, "bfloat16"):
            return None
        rows = [row for row in case["peers"] if row["peer"] == peer and row["rank"] == 64]
        return ratio(rows[0], *ratios) if rows else None

    return of


def of_llama(part: str, *ratios: str) -> Callable[[Case], Measured]:
    def of(case: Case) -> Measured:
        full = case.get("linears") == 224 if part == "decode" else case.get("rows") == 8192
        if case.get("part") != part or not full:
            return None
        return ratio(case["peers"].get("osora", {}), *ratios)

    return of


def many(case: Case) -> Measured:
    about = {"adapters": 64, "rows": 64, "d": 4096, "k": 4096, "rank": 64, "dtype": "bfloat16"}
    if any(case.get(name) != value for name, value in about.items()):
        return None
    (row,) = (row for row in case["peers"] if row["peer"] == "multi")
    return ratio(row, "graph_over_one", "over_one")


STEP = "4096×4096, 8192 rows, r = 64, bfloat16, forward and backward"
GOALS = (
    Goal("224 linears of Llama-2-7B attached, r = 64", 1.0, "s", "llama", attached),
    Goal("SVD of 4096×4096 in 32s, r = 64, bfloat16", 4.0, "ms each", "profile", decomposed(64)),
    Goal("SVD of 4096×4096 in 32s, r = 128, bfloat16", 6.0, "ms each", "profile", decomposed(128)),
    Goal(f"{STEP}, over frozen", 1.20, "x", "linear", layer("step", "osora", "graph_over_frozen", "over_frozen")),
    Goal(
        f"{STEP}, over PEFT LoRA",
        0.9,
        "x",
        "linear",
        layer("step", "lora", "graph_osora_over_this", "osora_over_this"),
    ),
    Goal(
        "a block of Llama-2-7B, 8192 rows, forward and backward, over frozen",
        1.12,
        "x",
        "llama",
        of_llama("block", "graph_over_frozen", "queued_over_frozen"),
    ),
    Goal(
        "a token through 224 linears, over frozen",
        1.15,
        "x",
        "llama",
        of_llama("decode", "graph_over_frozen", "queued_over_frozen"),
    ),
    Goal("64 adapters in a batch of 64 rows, over one adapter", 1.15, "x", "linear", many),
)


def judged(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was measured last on a card, None where nothing was; a rehearsal on a CPU is nothing."""
    found: dict[Goal, Measured] = {}
    on_card: dict[str, bool] = {}
    for line in lines:
        name = line.get("benchmark")
        if "machine" in line:  # a run's first line
            on_card[name] = bool((line["machine"] or {}).get("gpu"))
        if not isinstance(line.get("case"), dict) or not (line.get("gpu") or on_card.get(name)):
            continue
        for goal in GOALS:
            if goal.benchmark == name and (measured := goal.of(line["case"])) is not None:
                found[goal] = measured
    judgements = []
    for goal in GOALS:
        measured = found.get(goal)
        facts: dict[str, Any] = {"goal": goal.about, "at_most": goal.most, "unit": goal.unit, "measured": None}
        if measured is not None:
            facts |= {"measured": measured[0], "how": measured[1], "met": measured[0] <= goal.most}
        judgements.append(facts)
    return judgements


def table(judgements: Iterable[dict[str, Any]]) -> str:
    """For reading."""
    lines = []
    for facts in judgements:
        verdict = "not measured"
        if facts["measured"] is not None:
            how = f" ({facts['how']})" if facts["how"] else ""
            verdict = f"{facts['measured']:.3g} {facts['unit']}{how}: {'met' if facts['met'] else 'NOT MET'}"
        lines.append(f"{facts['goal']}: at most {facts['at_most']:g} {facts['unit']}: {verdict}")
    return "\n".join(lines)
