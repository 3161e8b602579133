# SPDX-License-Identifier: Apache-2.0
"""Who is told about a run."""


class Listener:
    """Hears what happens in a run; this one is deaf."""

    def step(self, done: int, of: int) -> None:
        """An optimiser step is done."""

    def say(self, text: str) -> None:
        """Something that a person would like to know."""
