# SPDX-License-Identifier: Apache-2.0
"""Who is told about a run, and how a run is told to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """A run ended before its last step, as it was told to; the message says what is there."""


class Listener:
    """Hears what happens in a run; this one is deaf."""

    def step(self, done: int, of: int) -> None:
        """An optimiser step is done."""

    def say(self, text: str) -> None:
        """Something that a person would like to know."""


class Request:
    """Whether somebody has asked the run to stop."""

    made = False


@contextmanager
def heeding_sigterm() -> Iterator[Request]:
    """Within it the first SIGTERM, as a scheduler sends before it kills, is a request; the second ends the process."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield request
        return

    def ask(*_: Any) -> None:
        request.made = True
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
