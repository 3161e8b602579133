# SPDX-License-Identifier: Apache-2.0
"""osora.estimate: its counts against what torch's profiler sees, its sums, and what docs/performance.md says of it."""

import re
import warnings

import pytest
import torch
from documents import blocks
from helpers import linear_case, tiny_gpt2, tiny_llama
from root import ROOT

import osora
from osora import ops
from osora.model.cost import Cost, Work, linear_cost
from osora.ops import materialised

PERFORMANCE = ROOT / "docs/performance.md"
PLANS = ("frozen", "split", "materialised")
SHAPES = [(64, 48, 40, 8), (7, 30, 50, 4), (1, 16, 16, 2)]  # n, k, d, r


def function_of(plan: str):
    return {
        "frozen": lambda x, weight, bias, *_: torch.nn.functional.linear(x, weight, bias),
        "split": ops.linear,
        "materialised": materialised.linear_materialised,
    }[plan]


def profiled_flops(function) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    counted, total = {"aten::mm", "aten::addmm", "aten::addmm_"}, 0
    # 2 a b c of [a, c] times [c, b], from the shapes: the profiler itself does not know addmm_. h and P are written by
    # mm with an out, which comes last among the shapes (csrc/torch/linear/products.cpp).
    for event in profile.events():
        if event.name not in counted or any(inside(event, other) for other in profile.events()):
            continue
        left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
        total += 2 * left[0] * left[1] * right[1]
    return total


def inside(event, other) -> bool:
    """Whether this product was called by another one, which counts it."""
    parent = event.cpu_parent
    return parent is other and other.name in {"aten::mm", "aten::addmm", "aten::addmm_"}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("n, k, d, r", SHAPES)
def test_operations_are_those_that_run(n, k, d, r, plan):
    """Products of the forward, the backward, and (apart) of making the weight; in float64, where all are torch's."""
    trained = ["x"] if plan == "frozen" else ["x", "s", "o"]
    case = linear_case((n,), k, d, r, torch.float64, bias=False).trainable(*trained)
    cost = linear_cost(n, k, d, r, torch.float64, plan)
    function = function_of(plan)
    if plan == "materialised":
        sources = (case.weight, case.U, case.V, case.S0, case.s, case.o)
        assert profiled_flops(lambda: materialised.refresh(*sources)) == cost.refresh.flops
        materialised.linear_materialised(*case.arguments)
    else:
        assert cost.refresh == Work()
    kept = []
    assert profiled_flops(lambda: kept.append(function(*case.arguments))) == cost.forward.flops
    dy = torch.randn(n, d, dtype=torch.float64)
    assert profiled_flops(lambda: kept[0].backward(dy)) == cost.backward.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_floor_of_the_split_plan(dtype):
    """Forward and backward over the frozen layer: 1 + r (2k + 3d) / (2 k d) of its operations."""
    n, k, d, r = 512, 96, 80, 16
    costs = {plan: linear_cost(n, k, d, r, dtype, plan).step.flops for plan in PLANS}
    assert costs["frozen"] == 4 * n * k * d
    assert costs["split"] * 2 * k * d == costs["frozen"] * (2 * k * d + r * (2 * k + 3 * d))
    assert costs["materialised"] == costs["frozen"] + 2 * n * r * (k + d) + 2 * d * k * r


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory(dtype):
    n, k, d, r = 512, 96, 80, 16
    split, kept = (linear_cost(n, k, d, r, dtype, plan) for plan in PLANS[1:])
    assert split.saved == kept.saved == n * r * dtype.itemsize and linear_cost(n, k, d, r, dtype, "frozen").saved == 0
    assert split.memory == 0 and kept.memory == d * k * dtype.itemsize


def test_bytes_of_the_frozen_layer():
    n, k, d = 5, 3, 4
    cost = linear_cost(n, k, d, 1, torch.bfloat16, "frozen")
    assert cost.forward.bytes == cost.backward.bytes == 2 * (n * k + k * d + n * d)
    assert cost.forward.launches == cost.backward.launches == 1


def test_micro_batches_share_the_weight():
    one = linear_cost(100, 30, 20, 4, torch.bfloat16, "materialised")
    four = linear_cost(100, 30, 20, 4, torch.bfloat16, "materialised", micro_batches=4)
    assert four.forward == one.forward.times(4) and four.backward == one.backward.times(4)
    assert four.refresh == one.refresh and four.saved == one.saved


def test_time_is_the_longer_of_the_two_and_a_launch():
    machine = osora.Machine(flops_per_second=100.0, bytes_per_second=10.0, launch_seconds=2.0)
    bound_by_memory = linear_cost(1, 1, 1, 1, torch.float32, "frozen", machine=machine).forward
    assert bound_by_memory.flops == 2 and bound_by_memory.bytes == 12 and bound_by_memory.seconds == 1.2 + 2.0
    bound_by_arithmetic = linear_cost(8, 8, 8, 1, torch.float32, "frozen", machine=osora.Machine(1.0, 1e9)).forward
    assert bound_by_arithmetic.seconds == bound_by_arithmetic.flops == 2 * 8**3
    assert linear_cost(8, 8, 8, 1, torch.float32, "split").step.seconds == 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["Llama", "GPT-2"])
def test_a_model(make):
    model = osora.attach(make(), osora.OsoraConfig(r=4))
    found = osora.estimate(model, tokens=32, plan="split")
    assert len(found.layers) == len(osora.summary(model).modules)
    wish = Cost(Work(), Work(), Work(), 0, 0, 0)
    for layer in found.layers:
        d, k = layer.shape
        cost = linear_cost(32, k, d, 4, torch.float32, "split")
        assert layer.cost == cost
        wish = Cost(
            wish.forward + cost.forward,
            wish.backward + cost.backward,
            Work(),
            wish.saved + cost.saved,
            0,
            max(wish.scratch, cost.scratch),
        )
    assert found.total == wish
    assert "split" in str(found) and "forward" in str(found)


def test_the_plan_of_each_layer_is_the_default():
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    osora.set_execution(model, "materialised", ["q_proj"])
    plans = {layer.name.rsplit(".", 1)[-1]: layer.plan for layer in osora.estimate(model, 8).layers}
    assert plans["q_proj"] == "materialised" and plans["k_proj"] == "split"


def test_wrong_numbers_are_refused():
    model = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    for call, message in [
        (lambda: osora.estimate(model, 0), "tokens must be at least 1"),
        (lambda: osora.estimate(model, 8, micro_batches=0), "micro_batches must be at least 1"),
        (lambda: osora.estimate(model, 8, "merged"), "plan must be one of frozen, split, materialised"),
        (lambda: osora.estimate(tiny_llama(), 8), "no osora adapter"),
        (lambda: osora.Machine(0.0, 1.0), "rates must be positive"),
        (lambda: osora.Machine(1.0, 1.0, -1.0), "rates must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# -- the document ----------------------------------------------------------------------------------------------------


def test_the_python_of_the_document_runs():
    found = list(blocks(PERFORMANCE, "python"))
    assert len(found) >= 3
    names = {"tiny_llama": tiny_llama}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line, code in found:
            exec(compile("\n" * (line - 1) + code, str(PERFORMANCE), "exec"), names)


ASSUMED = osora.Machine(790e12, 3.0e12, 2e-6)  # as the document says


def seconds(n: int, k: int, d: int, plan: str, micro_batches: int = 1) -> float:
    cost = linear_cost(n, k, d, 64, torch.bfloat16, plan, machine=ASSUMED, micro_batches=micro_batches)
    return cost.step.seconds


def test_the_crossovers_of_the_document():
    text = PERFORMANCE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) x (\d+) \| ([\d.]+)k \|$", text, flags=re.MULTILINE)
    assert len(rows) == 5
    for d, k, thousands in ((int(a), int(b), float(c)) for a, b, c in rows):
        least = next(n for n in range(100, 200_000, 50) if seconds(n, k, d, "materialised") < seconds(n, k, d, "split"))
        assert abs(least / 1000 - thousands) <= 0.1, (d, k, least)


def test_the_percentages_of_the_document():
    text = PERFORMANCE.read_text(encoding="utf-8")
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # d, k of a layer of Llama-2-7B
    tokens = (512, 2048, 8192, 16384)
    rows = re.findall(r"^\| (split|materialised), (any|\d+) \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 3
    for plan, micro, cells in rows:
        for n, cell in zip(tokens, cells.split(" | "), strict=True):
            times = 1 if micro == "any" else int(micro)
            took, frozen = (sum(seconds(n, k, d, p, times) for d, k in shapes) for p in (plan, "frozen"))
            assert abs(100 * (took / frozen - 1) - float(cell)) < 0.051, (plan, micro, n)


def test_the_arithmetic_of_the_document():
    """On a CPU, where operations decide: dk / (k + 2d) tokens; and the bytes of making W_eff."""
    d, k, r = 300, 200, 16
    even = d * k // (k + 2 * d)
    counts = [
        {plan: linear_cost(n, k, d, r, torch.float32, plan).step.flops for plan in PLANS} for n in (even - 1, even + 1)
    ]
    assert counts[0]["materialised"] > counts[0]["split"] and counts[1]["materialised"] < counts[1]["split"]
    for dtype, per_number in ((torch.float32, 16), (torch.bfloat16, 20)):
        made = linear_cost(1, 10_000, 10_000, 1, dtype, "materialised").refresh.bytes
        assert abs(made / 10_000**2 - per_number) < 0.01
