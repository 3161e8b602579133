# SPDX-License-Identifier: Apache-2.0
"""Reading and writing leave the cores to the arithmetic."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import torch
from checkpoints import Stack, write_checkpoint

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


def test_threads_that_come_later_have_the_arithmetics_number():
    """torch keeps the last number that anybody set, for threads that it has not seen yet."""
    before, seen = torch.get_num_threads(), set()

    def later() -> None:
        thread = threading.Thread(target=lambda: seen.add(torch.get_num_threads()))
        thread.start()
        thread.join()

    torch.set_num_threads(3)
    try:
        Pipeline(lambda unit: unit, lambda unit, _: later(), lambda unit, _: None).run(range(3))
    finally:
        torch.set_num_threads(before)
    assert seen == {3}


FIRST = """
import sys, warnings
sys.path.insert(0, sys.argv[3])
import torch
from checkpoints import Stack, on_meta
import osora
warnings.simplefilter("ignore")
torch.set_num_threads(2)
config = osora.OsoraConfig(r=6, target_modules=["up"])
if sys.argv[4] == "initialise":
    osora.initialise(sys.argv[1], sys.argv[2], config, model=on_meta(blocks=1, width=1100), progress=False)
kept = {"basis": sys.argv[2]} if sys.argv[4] == "initialise" else {}
model = osora.attach(Stack(blocks=1, width=1100), config, **kept)
(layer,) = osora.adapted_layers(model).values()
print([layer.U.double().sum().item(), layer.S0.tolist()])
"""


def test_a_large_weight_has_attachs_bits_where_it_is_the_first_of_its_process(tmp_path):
    """Of more than 2**20 entries, so that its products run on several threads, whose number the last bits hang on."""
    write_checkpoint(Stack(blocks=1, width=1100), tmp_path / "base")
    support, found = str(Path(__file__).parents[1] / "support"), []
    for kind in ("initialise", "attach"):
        words = [sys.executable, "-c", FIRST, str(tmp_path / "base"), str(tmp_path / "basis"), support, kind]
        found.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    assert found[0] == found[1]
