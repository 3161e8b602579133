# SPDX-License-Identifier: Apache-2.0
"""Which of several processes this one is: told by torchrun's environment, or named as of a job array."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of several processes that make a basis."""

    index: int = 0
    """From 0."""
    of: int = 1
    local: int = 0
    """Among those on this machine, as far as that is known."""
    of_local: int = 1

    def threads(self, cores: int) -> int | None:
        """Its share of a machine's cores; None where it has them all."""
        return None if self.of_local == 1 else max(1, cores // self.of_local)


def part_of(part: str | None, environment: Mapping[str, str] = os.environ) -> Part:
    """The part that is named, "3/8" from 1 to 8; else torchrun's rank; else the only one.

    Raises:
        ValueError: not of that form, or out of range.
    """
    if part is not None:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part) if isinstance(part, str) else None
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f'part must be as "3/8", from "1/8" to "8/8", got {part!r}')
        return Part(int(found[1]) - 1, int(found[2]))
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local, of_local = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))
        return Part(rank, world, local, of_local)
    return Part()


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


__all__ = ["Part", "cores", "part_of"]
