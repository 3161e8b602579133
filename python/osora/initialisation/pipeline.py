# SPDX-License-Identifier: Apache-2.0
"""Reading, computing and writing at the same time: a thread each, and at most one unit waiting between two of them."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Unit = TypeVar("Unit")
Read = TypeVar("Read")
Found = TypeVar("Found")

_END = object()


@dataclass
class Times:
    """Seconds that each thread worked, and the whole took."""

    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    whole: float = 0.0

    @property
    def hidden(self) -> float:
        """Share of reading and writing that ran beside the arithmetic; 1 where there was nothing to hide."""
        beside = self.reading + self.writing
        exposed = max(0.0, self.whole - self.computing)
        return max(0.0, 1 - exposed / beside) if beside > 0 else 1.0


class Pipeline(Generic[Unit, Read, Found]):
    """``write(unit, compute(unit, read(unit)))`` for each unit, overlapped.

    ``compute`` runs in the thread of the caller. What one of the three raises is raised by :meth:`run`, after what was
    computed before it is written.

    Args:
        read: its results are held by at most three units at a time: read, waiting, and in work.
        compute: what becomes of them.
        write: of the results.
    """

    def __init__(
        self,
        read: Callable[[Unit], Read],
        compute: Callable[[Unit, Read], Found],
        write: Callable[[Unit, Found], None],
    ) -> None:
        self.read, self.compute, self.write = read, compute, write
        self.times = Times()
        self._ready: queue.Queue[Any] = queue.Queue(1)
        self._found: queue.Queue[Any] = queue.Queue(2)
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._alone = threading.Semaphore(0)

    def _one_thread(self) -> None:
        """Keep torch's products in this Python thread to itself: the cores are the arithmetic's.

        OpenMP counts for each thread that calls it; a second team of as many threads would wait for the first one's
        cores. But torch remembers the last number for threads to come, those that a decomposition begins among them,
        so that the caller has to say its own again when both threads are here.
        """
        torch.get_num_threads()  # a thread takes torch's number when it first asks for it, and would later
        torch.set_num_threads(1)
        self._alone.release()

    def _put(self, line: "queue.Queue[Any]", item: Any) -> bool:
        while not self._ended.is_set():
            try:
                line.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _reader(self, units: Iterable[Unit]) -> None:
        self._one_thread()
        try:
            for unit in units:
                began = time.perf_counter()
                read = self.read(unit)
                self.times.reading += time.perf_counter() - began
                if not self._put(self._ready, (unit, read)):
                    return
                del read
        except BaseException as error:
            self._errors.append(error)
        self._put(self._ready, _END)

    def _writer(self) -> None:
        self._one_thread()
        while (item := self._found.get()) is not _END:
            unit, found = item
            began = time.perf_counter()
            try:
                self.write(unit, found)
            except BaseException as error:
                self._errors.append(error)
                self._ended.set()
                return
            finally:
                self.times.writing += time.perf_counter() - began
            del item, found

    def run(self, units: Iterable[Unit]) -> Times:
        """Take the units one after the other, in the reader's thread, until there are no more."""
        began, threads = time.perf_counter(), torch.get_num_threads()
        reader = threading.Thread(target=self._reader, args=(units,), name="osora-read", daemon=True)
        writer = threading.Thread(target=self._writer, name="osora-write", daemon=True)
        reader.start()
        writer.start()
        for _ in (reader, writer):
            self._alone.acquire()
        torch.set_num_threads(threads)
        try:
            while not self._ended.is_set():
                try:
                    item = self._ready.get(timeout=0.2)
                except queue.Empty:
                    continue
                if item is _END:
                    break
                unit, read = item
                del item
                start = time.perf_counter()
                found = self.compute(unit, read)
                self.times.computing += time.perf_counter() - start
                del read
                if not self._put(self._found, (unit, found)):
                    break
                del found
        finally:
            failed = self._ended.is_set()
            if not failed:
                self._found.put(_END)  # after what was computed, which is written still
                writer.join()
            self._ended.set()
            reader.join()
        self.times.whole = time.perf_counter() - began
        if self._errors:
            raise self._errors[0]
        return self.times


__all__ = ["Pipeline", "Times"]
