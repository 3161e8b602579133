# SPDX-License-Identifier: Apache-2.0
"""Three threads, one order: nothing is lost, nothing is held, and an error of any of them is the run's."""

import gc
import threading
import time
import weakref

import pytest

from osora.initialisation.pipeline import Pipeline, Times


class Weight:
    """Something whose life can be followed."""


@pytest.mark.parametrize("slow", ["read", "compute", "write", None])
def test_everything_passes_in_order_and_few_weights_live(slow):
    alive: weakref.WeakSet = weakref.WeakSet()
    most, written, threads = 0, [], set()

    def pause(what: str) -> None:
        threads.add((what, threading.current_thread().name))
        if slow == what:
            time.sleep(0.01)

    def read(unit: int) -> Weight:
        nonlocal most
        pause("read")
        weight = Weight()
        alive.add(weight)
        gc.collect()
        most = max(most, len(alive))
        return weight

    def compute(unit: int, weight: Weight) -> int:
        pause("compute")
        return unit * unit

    def write(unit: int, found: int) -> None:
        pause("write")
        written.append((unit, found))

    times = Pipeline(read, compute, write).run(range(12))
    assert written == [(n, n * n) for n in range(12)]
    assert most <= 3, "one is read, one waits, one is in work"
    assert ("compute", threading.current_thread().name) in threads and len({name for _, name in threads}) == 3
    assert times.whole > 0 and 0 <= times.hidden <= 1


def test_nothing_to_do():
    assert Pipeline(None, None, None).run([]).computing == 0


@pytest.mark.parametrize("where", ["units", "read", "compute", "write"])
@pytest.mark.parametrize("at", [0, 3, 11])
def test_an_error_ends_the_run_and_what_was_computed_is_written(where, at):
    written, computed = [], []

    def fails(what: str, unit: int) -> None:
        if where == what and unit == at:
            raise OSError(f"{what} {unit}")

    def units():
        for unit in range(12):
            fails("units", unit)
            yield unit

    def read(unit: int) -> int:
        fails("read", unit)
        return unit

    def compute(unit: int, weight: int) -> int:
        fails("compute", unit)
        computed.append(unit)
        return weight

    def write(unit: int, found: int) -> None:
        fails("write", unit)
        written.append(unit)

    before = threading.active_count()
    with pytest.raises(OSError, match=f"{where} {at}"):
        Pipeline(read, compute, write).run(units())
    assert threading.active_count() == before, "no thread stays"
    assert written == list(range(len(written)))
    if where != "write":
        assert written == computed == list(range(at))


def test_an_interrupt_ends_it_too():
    def compute(unit: int, weight: int) -> int:
        if unit == 2:
            raise KeyboardInterrupt
        return unit

    written = []
    with pytest.raises(KeyboardInterrupt):
        Pipeline(lambda unit: unit, compute, lambda unit, found: written.append(found)).run(range(9))
    assert written == [0, 1]


def test_hidden():
    assert Times(reading=2, computing=10, writing=2, whole=10.4).hidden == pytest.approx(0.9)
    assert Times(reading=2, computing=10, writing=2, whole=14).hidden == 0
    assert Times(computing=10, whole=10).hidden == 1
