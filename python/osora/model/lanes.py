# SPDX-License-Identifier: Apache-2.0
"""Calls that run side by side on a card, each on a stream and in a thread of its own; their results come in order.

A batch of one shape does not fill a card: its eigenproblems leave most of it to another batch's products.
"""

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

LANES = 2  # at most
T = TypeVar("T")


class Lane(Protocol):
    """Where a call runs."""

    def entered(self) -> AbstractContextManager[None]:
        """A context for the thread of the call: it sees what was queued before the lane was made."""

    def left(self, tensors: Iterable[Tensor]) -> None:
        """In the caller's thread: these tensors of the call may be used from here on."""


class CardLane:
    """A stream beside the current one of a card."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """Take what is queued on the current stream as done before."""
        self.device, self.stream = device, stream
        self.before = torch.cuda.current_stream(device).record_event()
        self.after: torch.cuda.Event | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the stream the current one, behind what came before."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(self.before)
            yield
            self.after = self.stream.record_event()

    def left(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for the call, and keep its tensors' memory as long as it uses them."""
        current = torch.cuda.current_stream(self.device)
        if self.after is not None:
            current.wait_event(self.after)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)


def lanes_and_memory(kinds: int, largest: int, free: int | None, max_memory: int | None) -> tuple[int, int | None]:
    """How many calls run at a time, and the bytes that each may take beyond weights and answer (None: no limit).

    Args:
        kinds: of matrices, each in calls of its own.
        largest: bytes that one matrix in work takes, of the kind that takes most.
        free: bytes that are free on the card, None on a CPU, whose cores one call takes already.
        max_memory: bytes for all calls together, None for no limit: then half of what is free, as the operator takes.
    """
    if free is None or kinds < 2:
        return 1, max_memory
    each = (free // 2 if max_memory is None else max_memory) // LANES
    return (LANES, each) if each >= largest else (1, max_memory)


def side_by_side(
    calls: Iterable[Callable[[], T]], lanes: Sequence[Callable[[], Lane]], tensors: Callable[[T], Iterable[Tensor]]
) -> Generator[T, None, None]:
    """What each call returns, in their order; as many run at a time as there are lanes.

    A call is taken from ``calls`` when a lane is free for it. An error of one is raised where its result would come;
    the calls that are under way end first.

    Args:
        calls: each is made once.
        lanes: makers of one lane each, called in this thread; none: the calls run here, one after the other.
        tensors: those of a result that live where the calls ran.
    """
    if not lanes:
        for call in calls:
            yield call()
        return

    def run(call: Callable[[], T], lane: Lane) -> T:
        with lane.entered():
            return call()

    running: deque[tuple[Future[T], Lane]] = deque()

    def oldest() -> T:
        future, lane = running.popleft()
        result = future.result()
        lane.left(tensors(result))
        return result

    with ThreadPoolExecutor(len(lanes), thread_name_prefix="osora") as pool:
        try:
            for number, call in enumerate(calls):
                if len(running) == len(lanes):
                    yield oldest()
                lane = lanes[number % len(lanes)]()
                running.append((pool.submit(contextvars.copy_context().run, run, call, lane), lane))
            while running:
                yield oldest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def card_lanes(device: torch.device, count: int) -> list[Callable[[], Lane]]:
    """Lanes of a card, with a stream each."""
    return [partial(CardLane, device, torch.cuda.Stream(device)) for _ in range(count)]
