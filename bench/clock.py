# SPDX-License-Identifier: Apache-2.0
"""How long something takes: by the wall clock on a CPU, between two events on a card, or as replays of a graph there.

All that is asked of CUDA is the class Card. The tests have another, so that everything else here runs without one.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

WARM_UP = 3  # calls before a capture: what is made at a first call is no part of a graph
MOST_SETS = 16  # of inputs that take turns


class Event(Protocol):
    """A mark in the card's work."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Card:
    """What timing needs of a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache: int = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The call in a graph: what replays it, and its results, which the replay fills anew."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph.replay, results


def card_of(device: str) -> Card | None:
    """None for a CPU."""
    return Card(device) if device.startswith("cuda") else None


@contextmanager
def no_garbage_collection():
    """A collection in the middle of one repetition would be counted to whoever runs then."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds_of(call: Callable[[], object], card: Card | None) -> float:
    """One call. On a card all its work, gaps in which it waits for the host among it.

    Freeing what the call returns is not part of the work.
    """
    with no_garbage_collection():
        if card is None:
            began = time.perf_counter()
            result = call()
            spent = time.perf_counter() - began
        else:
            begin, end = card.event(), card.event()
            card.wait()
            begin.record()
            result = call()
            end.record()
            card.wait()
            spent = begin.elapsed_time(end) / 1e3
    del result
    return spent


def sets_for(card: Card | None, size: int) -> int:
    """How many sets of inputs of so many bytes take turns, so that a call finds nothing of its own in the L2 cache."""
    return 1 if card is None else min(MOST_SETS, max(1, math.ceil(2 * card.cache / max(1, size))))


def graphs(calls: Mapping[str, Callable[[], Any]], card: Card) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """What replays each call, and why some cannot be captured."""
    replays, reasons, kept = {}, {}, []
    for name, call in calls.items():
        try:
            replay, results = card.capture(call)
            replay()
            card.wait()
        except Exception as error:  # whatever it is: the others are measured
            reasons[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        else:
            kept.append(results)  # its memory is the graph's
            replays[name] = replay
    return replays, reasons
