# SPDX-License-Identifier: Apache-2.0
"""The results of the comparison's runs: one file, a line of JSON for each, there for good as soon as its run is over.

A line ends with a digest of itself. One that was cut in its middle, or changed, is set aside, in words, and its run is
done again; what stands before and after it counts. A later line about the same run replaces an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = "cells.jsonl"
WHICH = ("task", "method", "stage", "rate", "seed", "key")  # what tells one run from all others


def digest(content: dict[str, Any]) -> str:
    """Of a line without its digest."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lines_of(path: Path, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, in their order; of each other one it says which it is."""
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            whole = line.pop("digest") == digest(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if whole:
            yield line
        else:
            say(f"{path.name}, line {number} is damaged and set aside: its run will be done again")


class Store:
    """What is in the file, and what is added to it. One process writes; others may read."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.say = path, say
        self.results: dict[tuple[Any, ...], dict[str, Any]] = {}  # in the order in which they came
        self.seconds: list[tuple[str, str, float]] = []  # task, method, how long a run took
        self.asked: dict[str, list[str]] = {}  # task -> methods
        if path.is_file():
            for line in lines_of(path, say):
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "asked" in line:
            known = self.asked.setdefault(line["asked"]["task"], [])
            known += [method for method in line["asked"]["methods"] if method not in known]
            return
        result = line["result"]
        which = tuple(result[name] for name in WHICH)
        self.results.pop(which, None)  # so that the newest stands last
        self.results[which] = result
        self.seconds.append((result["task"], result["method"], line["seconds"]))

    def _write(self, line: dict[str, Any]) -> None:
        """On the disk when this returns, on a line of its own whatever the file ends with."""
        self._take(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line | {"digest": digest(line)}, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def put(self, result: dict[str, Any], seconds: float) -> None:
        """One run has ended."""
        self._write({"result": result, "seconds": round(seconds, 3)})

    def ask(self, task: str, methods: list[str]) -> None:
        """What a report should look for."""
        if set(methods) - set(self.asked.get(task, [])):
            self._write({"asked": {"task": task, "methods": methods}})

    def take_over(self, path: Path) -> int:
        """The whole lines of an earlier file that are not here yet. How many results these are."""
        before = len(self.results)
        for line in lines_of(path, self.say):
            if "asked" in line:
                self.ask(**line["asked"])
            elif tuple(line["result"][name] for name in WHICH) not in self.results:
                self.put(**line)
        return len(self.results) - before

    def found(self, *which: Any) -> dict[str, Any] | None:
        """The result of a run, by WHICH."""
        return self.results.get(which)

    def of(self, task: str, method: str) -> list[dict[str, Any]]:
        """All results of a method on a task that have the newest one's settings."""
        here = [result for result in self.results.values() if (result["task"], result["method"]) == (task, method)]
        return [result for result in here if result["key"] == here[-1]["key"]]

    def expected(self, task: str, method: str) -> float:
        """Seconds that a run may take, by those before: of the same method if there is one, else of the same task."""
        same = [seconds for name, _, seconds in self.seconds if name == task]
        mine = [seconds for name, which, seconds in self.seconds if (name, which) == (task, method)]
        return max(mine or same, default=0.0)
