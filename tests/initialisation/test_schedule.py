# SPDX-License-Identifier: Apache-2.0
"""Who decomposes what: a function of the layers alone, and fair."""

import random

import pytest
import torch

from osora.initialisation.parts import Part, part_of
from osora.initialisation.schedule import Job, order_for, schedule, units

KINDS = [
    Job((4096, 4096), 64, torch.float32),
    Job((64, 64), 8, torch.float32),
    Job((64, 64), 8, torch.bfloat16),
    Job((64, 64), 4, torch.float32),
    Job((2048, 64), 8, torch.float32),
]


@pytest.mark.parametrize("seed", range(20))
def test_every_job_is_in_one_unit_and_every_unit_in_one_part(seed):
    chance = random.Random(seed)
    jobs = [chance.choice(KINDS) for _ in range(chance.choice([0, 1, 7, 150]))]
    found = units(jobs)
    assert sorted(index for unit in found for index in unit) == list(range(len(jobs)))
    for unit in found:
        assert len({jobs[index] for index in unit}) == 1, "a unit has one shape, rank and dtype"
        d, k = jobs[unit[0]].shape
        assert len(unit) == 1 or len(unit) * d * k <= 2**24
    costs = [sum(jobs[index].flops for index in unit) for unit in found]
    for parts in (1, 2, 3, 8, 200):
        given = schedule(costs, parts)
        assert sorted(index for part in given for index in part) == list(range(len(found)))
        for part in range(parts):
            order = order_for(part, given, costs)
            assert sorted(order) == list(range(len(found))) and order[: len(given[part])] == given[part]


def test_a_part_waits_at_most_for_one_unit():
    """Graham's bound: no part has more than the mean and the largest unit that is shared out last."""
    chance = random.Random(1)
    for _ in range(200):
        costs = [chance.choice([1.0, 2.5, 9.0, 40.0]) for _ in range(chance.randint(1, 60))]
        parts = chance.randint(1, 9)
        loads = [sum(costs[i] for i in part) for part in schedule(costs, parts)]
        best = max(max(costs), sum(costs) / parts)
        assert max(loads) <= (4 / 3) * best + 1e-9 or max(loads) <= sum(costs) / parts + max(costs)


def test_the_schedule_is_the_same_everywhere():
    assert schedule([3.0, 1.0, 2.0, 2.0], 2) == [[0, 1], [2, 3]]
    assert schedule([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert schedule([], 2) == [[], []]
    assert order_for(1, [[0, 1], [2, 3]], [3.0, 1.0, 2.0, 2.0]) == [2, 3, 1, 0], "the others' smallest first"


def test_parts():
    assert part_of(None, {}) == Part(0, 1)
    assert part_of("3/8", {"RANK": "1", "WORLD_SIZE": "2"}) == Part(2, 8)
    rank = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert part_of(None, rank) == Part(5, 8, 1, 4)
    assert Part(5, 8, 1, 4).threads(16) == 4 and Part(0, 1).threads(16) is None and Part(0, 9, 0, 9).threads(2) == 1
    for wrong in ("0/8", "9/8", "3", "3/", "a/b", "-1/2", "1/0", " 1/2", "1/2/3", ""):
        with pytest.raises(ValueError, match='part must be as "3/8"'):
            part_of(wrong, {})
