# SPDX-License-Identifier: Apache-2.0
"""A card that is none: what bench/clock.py asks of CUDA, on a CPU, so that its code for a card runs without one."""

import time


class Event:
    """Refuses what a CUDA event refuses."""

    def __init__(self, card):
        self.card, self.at = card, None

    def record(self):
        self.at = time.perf_counter()
        self.card.pending.append(self)

    def elapsed_time(self, end):
        assert self.at is not None and end.at is not None, "an event that was not recorded"
        assert not self.card.pending, "the card was not waited for"
        return 1e3 * (end.at - self.at)


class Card:
    """Counts what it was asked."""

    def __init__(self, cache=2**20, refuses=lambda call: False):
        self.cache, self.refuses = cache, refuses
        self.pending, self.captures, self.replays, self.waits = [], 0, 0, 0

    def event(self):
        return Event(self)

    def wait(self):
        self.waits += 1
        self.pending.clear()

    def capture(self, call):
        if self.refuses(call):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.captures += 1
        result = call()

        def replay():
            self.replays += 1
            call()

        return replay, result


def pretend(monkeypatch, bench, card):
    """From here on every device is this card."""
    monkeypatch.setattr(bench("clock"), "card_of", lambda device: card)
    return card
