# SPDX-License-Identifier: Apache-2.0
"""How many weights osora.initialise holds at a time."""

import time
import weakref

import pytest
from helpers import tiny_llama

import osora
from osora.initialisation import schedule, work


@pytest.mark.parametrize("slow", ["write_layer", "decompose", None])
def test_three_units_are_held_at_the_most(tmp_path, monkeypatch, slow):
    """One is being read, one waits, one is in work; what is to be written holds none, however slow the disk is."""
    tiny_llama().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(schedule, "_CPU_ENTRIES", 1)  # a unit is a layer
    weights, held, read = [], [], work.Work.read

    def watched(self, task):
        found = read(self, task)
        weights.extend(weakref.ref(each.values) for each in found)
        held.append(sum(each() is not None for each in weights))
        return found

    monkeypatch.setattr(work.Work, "read", watched)
    if slow is not None:
        right = getattr(work, slow)
        monkeypatch.setattr(work, slow, lambda *a, **k: time.sleep(0.03) or right(*a, **k))
    done = osora.initialise(tmp_path / "base", tmp_path / "basis", osora.OsoraConfig(r=4), progress=False)
    assert len(done.computed) == len(held) == 14 and max(held) <= 3
    if slow == "decompose":
        assert max(held) == 3
    assert not any(each() is not None for each in weights)
