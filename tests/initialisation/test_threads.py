# SPDX-License-Identifier: Apache-2.0
"""Reading and writing leave the cores to the arithmetic."""

import torch

from osora.initialisation.pipeline import Pipeline


def test_only_the_arithmetic_has_more_than_one_thread():
    before, seen = torch.get_num_threads(), {"read": set(), "compute": set(), "write": set()}

    def look(kind):
        torch.ones(8, 8) @ torch.ones(8, 8)
        seen[kind].add(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        run = Pipeline(lambda unit: look("read"), lambda unit, _: look("compute"), lambda unit, _: look("write"))
        run.run(range(5))
        assert seen == {"read": {1}, "compute": {3}, "write": {1}} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
