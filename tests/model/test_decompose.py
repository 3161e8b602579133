# SPDX-License-Identifier: Apache-2.0
"""How many matrices are decomposed in one call: bounded by the factors they leave, on a CPU and on a card."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from osora.layers.base_weight import BaseWeight
from osora.model import decompose
from osora.model.targets import Target

CARD = torch.device("cuda", 0)  # nothing is asked of it
GIB = 2**30


def target(
    shape: tuple[int, int], rank: int = 64, device: str = "cpu", dtype=torch.bfloat16, name: str = "x"
) -> Target:
    """Of a weight that is not there."""
    return Target((name,), nn.Identity(), BaseWeight(shape, dtype, dtype, torch.device(device)), rank)


def sizes(targets: Sequence[Target]) -> list[int]:
    return [len(batch) for batch in decompose.batches(list(targets))]


def test_on_a_cpu_they_are_bounded_by_their_entries():
    """Whatever the rank: they run one after the other, and their factors are held until the last is done."""
    for shape, wish in (((4096, 4096), 1), ((14336, 4096), 1), ((1024, 4096), 4), ((576, 576), 50)):
        for rank in (1, 64):
            assert decompose.batch_size(target(shape, rank), None) == wish


@pytest.mark.parametrize("rank", [8, 64, 128])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1024, 4096)])
def test_on_a_card_their_factors_take_a_quarter_of_what_is_free(shape, rank):
    for free in (2**20, GIB, 40 * GIB):
        size = decompose.batch_size(target(shape, rank), free)
        factors = (sum(shape) + 1) * rank * 4
        assert size == 1 or size * factors <= free / 4
        assert (size + 1) * factors > free / 4


def test_float64_factors_are_twice_as_large():
    assert decompose.batch_size(target((64, 64), 8, dtype=torch.float64), GIB) == pytest.approx(
        decompose.batch_size(target((64, 64), 8), GIB) / 2, abs=1
    )


def test_a_quantised_weight_counts_too():
    one = target((4096, 4096), dtype=torch.float32)
    plain = decompose.batch_size(one, 4 * GIB)
    size = decompose.batch_size(replace(one, weight=one.weight._replace(quantised=True)), 4 * GIB)
    assert size < plain and size * (4096 * 4096 * 4 + 8193 * 64 * 4) <= GIB


def test_all_linears_of_a_shape_of_a_large_model_are_one_batch_on_a_card(monkeypatch):
    """Those of Llama-2-7B: four of a shape in each of 32 blocks, two and one of the others."""
    monkeypatch.setattr(decompose, "free_on_card", lambda device: 40 * GIB)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    targets = [target(shape, device="cuda:0", name=f"{i}.{j}") for i in range(32) for j, shape in enumerate(shapes)]
    assert sizes(targets) == [128, 64, 32]
    assert sum(sizes([target(shape, name=f"{j}") for j, shape in enumerate(shapes)])) == 7


def test_what_is_free_on_a_card_is_asked_once_a_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(decompose, "free_on_card", lambda device: asked.append(device) or GIB)
    sizes([target((64, 64), device="cuda:0"), target((64, 64), device="cuda:0"), target((32, 64), device="cuda:0")])
    assert asked == [CARD, CARD]
    sizes([target((64, 64))])
    assert len(asked) == 2
