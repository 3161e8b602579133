# SPDX-License-Identifier: Apache-2.0
"""A kept W_eff among several streams: every read after the write it is of, every write after the reads before it.

On a CPU there are no streams: what is asked of them is noted, and here it is played as a card would order it.
"""

import random

import pytest
import torch
from backends import make_backend

READ, WRITE, RECORD, WAIT, USE = range(5)


def notes_of(script: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    make_backend("emulated")  # loads the library
    flat = torch.ops.osora_emulated.stream_order([number for step in script for number in step])
    return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def check(script: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Each stream does its work in order, and knows of another's only what it waited for."""
    notes = notes_of(script)
    assert [(what, stream) for what, stream, _ in notes if what in (READ, WRITE)] == script
    done: dict[int, set[int]] = {}  # stream -> what is certain to be done where it stands
    events: dict[int, set[int]] = {}
    writes: list[int] = []
    reads: list[int] = []
    first, used = script[0][1], set()
    for place, (what, stream, event) in enumerate(notes):
        known = done.setdefault(stream, set())
        if what == RECORD:
            events[event] = set(known)
        elif what == WAIT:
            known |= events[event]
        elif what == USE:
            used.add(stream)
        elif what == READ:
            assert set(writes[-1:]) <= known, f"{script}: a read on {stream} before the write it is of"
            assert not writes or stream == first or stream in used, f"{script}: {stream} uses memory unknown to it"
            reads.append(place)
            known.add(place)
        else:
            assert {*writes[-1:], *reads} <= known, f"{script}: a write on {stream} over what is still read"
            assert not writes or stream == first or stream in used, f"{script}: {stream} uses memory unknown to it"
            writes, reads = [*writes, place], []
            known.add(place)
    return notes


def test_one_stream_waits_for_nothing():
    notes = check([(WRITE, 7), (READ, 7), (READ, 7), (WRITE, 7), (READ, 7)])
    assert [what for what, _, _ in notes if what == WAIT] == []


def test_a_reader_waits_once_for_each_write():
    notes = check([(WRITE, 1), (READ, 2), (READ, 2), (READ, 3), (READ, 2), (WRITE, 1), (READ, 2)])
    assert [(what, stream) for what, stream, _ in notes if what == WAIT and stream != 1] == [
        (WAIT, s) for s in (2, 3, 2)
    ]


def test_a_rewrite_elsewhere_waits_for_readers_and_writer():
    check([(WRITE, 1), (READ, 1), (READ, 2), (WRITE, 3), (READ, 1), (READ, 2), (WRITE, 2), (WRITE, 1), (READ, 3)])


@pytest.mark.parametrize("seed", range(300))
def test_any_order(seed):
    chance = random.Random(seed)
    streams = range(chance.randint(1, 4))
    check([(WRITE, 0), *((chance.choice((READ, READ, WRITE)), chance.choice(streams)) for _ in range(30))])
