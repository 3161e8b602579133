# SPDX-License-Identifier: Apache-2.0
"""Which process has which unit in work, on a file system that they share: a file for each claim, made atomically.

A claim of a process that is gone is followed by one of the next generation; whoever makes that file has the unit.
"""

import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

EXPIRY = 300.0  # seconds without a sign of life of a process on another machine


def _machine() -> str:
    """Where process numbers mean the same: host, and the namespace of process numbers if there are several."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}|{namespace}"


def _born(pid: int) -> str | None:
    """When a process began, in the system's own words; None if there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


@dataclass(frozen=True)
class _Owner:
    machine: str
    pid: int
    born: str | None

    def text(self) -> str:
        return json.dumps({"machine": self.machine, "pid": self.pid, "born": self.born})


class Claims:
    """A process's claims of numbered units.

    While it is entered, a thread shows that the process lives, by the times of its claims' files.

    Args:
        folder: of the claims, on a file system that all processes share.
        expiry: seconds without a sign of life after which the claim of a process on another machine is void. On the
            same machine it is void as soon as the process is gone.
    """

    def __init__(self, folder: Path, expiry: float = EXPIRY) -> None:
        self.folder, self.expiry = folder, expiry
        self._owner = _Owner(_machine(), os.getpid(), _born(os.getpid()))
        self._held: dict[int, Path] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._live, name="osora-claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for unit in list(self._held):
            self.release(unit)

    def _live(self) -> None:
        while not self._ended.wait(self.expiry / 10):
            with self._lock:
                held = list(self._held.values())
            for path in held:
                try:
                    os.utime(path)
                except OSError:  # somebody took it for dead, or removed the folder: the unit is done twice, no worse
                    pass

    def _generations(self, unit: int) -> list[Path]:
        found = self.folder.glob(f"{unit:06d}.*")
        return sorted((path for path in found if path.suffix[1:].isdecimal()), key=lambda path: int(path.suffix[1:]))

    def _now(self) -> float:
        """By the clock of the file system."""
        path = self.folder / f"clock-{os.getpid()}"
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    def _void(self, path: Path) -> bool:
        try:
            stat, text = path.stat(), path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return True
        try:
            values = json.loads(text)
            owner = _Owner(values["machine"], int(values["pid"]), values["born"])
        except (ValueError, KeyError, TypeError):
            owner = None  # whoever made it died before, or is about to write its name
        if owner is not None and owner.machine == self._owner.machine:
            born = _born(owner.pid)
            return born is None or born != owner.born
        return self._now() - stat.st_mtime > self.expiry

    def take(self, unit: int) -> bool:
        """Claim a unit; False if a process that lives has it, this one included."""
        try:
            there = self._generations(unit)
            if there and not self._void(there[-1]):
                return False
            number = int(there[-1].suffix[1:]) + 1 if there else 0
            path = self.folder / f"{unit:06d}.{number}"
            self.folder.mkdir(parents=True, exist_ok=True)  # a process that was through may have removed it
            self._make(path)
        except FileExistsError:
            return False
        with self._lock:
            self._held[unit] = path
        return True

    def _make(self, path: Path) -> None:
        """The file with its owner's name in it, or FileExistsError; no process can die between the two."""
        whole = self.folder / f"new-{os.getpid()}"
        whole.write_text(self._owner.text(), encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with open(path, "x", encoding="utf-8") as file:
                file.write(self._owner.text())
        finally:
            whole.unlink(missing_ok=True)

    def release(self, unit: int) -> None:
        """Give a unit back, done or not."""
        with self._lock:
            path = self._held.pop(unit)
        for each in self._generations(unit):
            if each == path or int(each.suffix[1:]) < int(path.suffix[1:]):
                each.unlink(missing_ok=True)

    def wait(self, seconds: float) -> None:
        """Let others go on."""
        time.sleep(seconds)


__all__ = ["EXPIRY", "Claims"]
