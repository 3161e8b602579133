# SPDX-License-Identifier: Apache-2.0
"""Calls side by side: their results in order, no more at a time than there are lanes, an error where it belongs."""

import contextvars
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import osora
from osora.model import decompose
from osora.model.lanes import LANES, lanes_and_memory, side_by_side

GIB = 2**30


class Lane:
    """One without a card, which writes down who came and went."""

    def __init__(self, log: list[tuple[str, object]]) -> None:
        self.log = log

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.log.append(("enter", threading.get_ident()))
        yield

    def left(self, tensors: Iterable[Tensor]) -> None:
        self.log.append(("left", [float(t.sum()) for t in tensors]))


def lanes(count: int, log: list[tuple[str, object]] | None = None) -> list:
    return [lambda: Lane([] if log is None else log)] * count


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        ((3, GIB, None, None), (1, None)),  # a CPU
        ((3, GIB, None, 5), (1, 5)),
        ((1, GIB, 40 * GIB, None), (1, None)),  # one kind: one call after the other
        ((2, GIB, 40 * GIB, None), (2, 10 * GIB)),  # half of what is free, shared
        ((2, 10 * GIB, 40 * GIB, None), (2, 10 * GIB)),
        ((2, 10 * GIB + 1, 40 * GIB, None), (1, None)),  # two would not fit
        ((2, GIB, 40 * GIB, 3 * GIB), (2, 3 * GIB // 2)),
        ((2, GIB, 40 * GIB, GIB), (1, GIB)),
        ((0, 0, GIB, None), (1, None)),
    ],
)
def test_how_many_run_at_a_time(arguments, wish):
    assert LANES == 2
    assert lanes_and_memory(*arguments) == wish


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_results_come_in_order_and_calls_are_made_once(count):
    made = []
    calls = [lambda i=i: made.append(i) or i for i in range(17)]
    assert list(side_by_side(calls, lanes(count), lambda _: ())) == list(range(17))
    assert sorted(made) == list(range(17))
    assert list(side_by_side([], lanes(count), lambda _: ())) == []


def test_two_run_at_a_time_and_no_third():
    both, running, most = threading.Barrier(2, timeout=30), 0, 0
    lock = threading.Lock()

    def call() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()  # passes only where two are there
        with lock:
            running -= 1
        return threading.get_ident()

    threads = set(side_by_side([call] * 8, lanes(2), lambda _: ()))
    assert most == 2 and threading.get_ident() not in threads


def test_a_call_is_asked_for_when_a_lane_is_free():
    asked = []

    def calls() -> Iterator:
        for number in range(6):
            asked.append(number)
            yield lambda number=number: number

    results = side_by_side(calls(), lanes(2), lambda _: ())
    assert next(results) == 0 and asked == [0, 1, 2]
    assert next(results) == 1 and asked == [0, 1, 2, 3]
    results.close()
    assert asked == [0, 1, 2, 3]


def test_a_lane_is_entered_by_the_call_and_left_by_the_caller():
    log: list[tuple[str, object]] = []
    results = list(side_by_side([lambda i=i: torch.tensor(float(i)) for i in range(3)], lanes(2, log), lambda t: [t]))
    assert [float(t) for t in results] == [0, 1, 2]
    assert [what for what in log if what[0] == "left"] == [("left", [float(i)]) for i in range(3)]
    assert threading.get_ident() not in [who for what, who in log if what == "enter"]


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_comes_where_its_result_would(count):
    def fail() -> int:
        raise ValueError("layer 3")

    ended = threading.Event()
    calls = [lambda: 0, lambda: 1, fail, lambda: ended.wait(0.05) or 3, lambda: 4]
    results = side_by_side(calls, lanes(count), lambda _: ())
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="layer 3"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("osora")]


def test_calls_see_the_callers_context():
    name = contextvars.ContextVar("name", default="nobody")
    name.set("the caller")
    assert set(side_by_side([name.get] * 5, lanes(2), lambda _: ())) == {"the caller"}


def test_a_model_is_attached_the_same_by_lanes(monkeypatch):
    """Several shapes, two lanes: the factors of every layer are those of one call after the other."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(*shape) for shape in ((40, 30), (30, 20), (20, 40), (40, 30), (30, 20))])

    names = ["0", "1", "2", "3", "4"]
    config = osora.OsoraConfig(r=6, target_modules=names)
    plain = osora.attach(made(), config)
    log: list[tuple[str, object]] = []
    monkeypatch.setattr(decompose, "lanes_for", lambda targets, memory: (lanes(2, log), memory))
    by_lanes = osora.attach(made(), config)
    assert len([what for what, _ in log if what == "enter"]) == 3, "a call for each shape"
    for name in names:
        for kind in ("U", "S0", "V"):
            assert torch.equal(getattr(plain[int(name)], kind), getattr(by_lanes[int(name)], kind))


def test_what_has_no_certificate_is_told_by_the_caller(monkeypatch):
    model = nn.Sequential(nn.Linear(70, 60), nn.Linear(60, 50))
    monkeypatch.setattr(decompose, "lanes_for", lambda targets, memory: (lanes(2), memory))
    with pytest.warns(RuntimeWarning, match="no certificate of tol=1e-18 for") as warned:
        osora.attach(model, osora.OsoraConfig(r=6, target_modules=["0", "1"], tol=1e-18))
    assert [str(warning.message).split(" for ")[1][0] for warning in warned] == ["0", "1"]
    assert all("model/lanes" not in warning.filename for warning in warned)
