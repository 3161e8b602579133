# SPDX-License-Identifier: Apache-2.0
"""Claims: one process has a unit; the claim of one that is gone is void; nobody takes two for one."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from osora.initialisation.claims import Claims


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "claims"


def test_a_unit_has_one_owner(folder):
    with Claims(folder) as one, Claims(folder) as other:
        assert one.take(3) and not other.take(3) and not one.take(3)
        assert other.take(4)
        one.release(3)
        assert other.take(3)
    assert list(folder.iterdir()) == [], "what was held is given back"


def test_many_threads_get_each_unit_once(folder):
    taken, lock = [], threading.Lock()
    with Claims(folder) as claims:
        ready = threading.Barrier(8)

        def work() -> None:
            ready.wait()
            for unit in range(30):
                if claims.take(unit):
                    with lock:
                        taken.append(unit)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == list(range(30))


def gone(folder, unit: int, **changes: object) -> None:
    """The claim of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with Claims(folder) as claims:
        assert claims.take(unit)
        path = next(folder.glob(f"{unit:06d}.0"))
        owner = json.loads(path.read_text()) | {"pid": process.pid} | changes
        claims.release(unit)
    path.write_text(json.dumps(owner))


def test_the_claim_of_a_process_that_is_gone_is_void_at_once(folder):
    gone(folder, 7)
    with Claims(folder, expiry=1e6) as one, Claims(folder, expiry=1e6) as other:
        assert one.take(7), "its process is not there any more"
        assert not other.take(7)
        assert sorted(path.name for path in folder.iterdir()) == ["000007.0", "000007.1"]
        one.release(7)
        assert list(folder.iterdir()) == [], "with those before it"


def test_the_number_of_another_process_is_not_the_process(folder):
    gone(folder, 1, pid=os.getpid(), born="1")  # this very number, used again
    with Claims(folder, expiry=1e6) as claims:
        assert claims.take(1)


def test_another_machine_is_believed_until_it_is_silent(folder):
    gone(folder, 5, machine="elsewhere|1")
    with Claims(folder, expiry=3600) as claims:
        assert not claims.take(5)
        path = folder / "000005.0"
        long_ago = time.time() - 7200
        os.utime(path, (long_ago, long_ago))
        assert claims.take(5)


def test_a_claim_that_cannot_be_read_expires_by_its_time(folder):
    with Claims(folder, expiry=3600) as claims:
        (folder / "000002.0").write_text("{")
        assert not claims.take(2)
        os.utime(folder / "000002.0", (1, 1))
        assert claims.take(2)


def test_one_that_lives_says_so(folder):
    with Claims(folder, expiry=0.5) as claims:
        assert claims.take(0)
        path = folder / "000000.0"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2


def test_a_folder_without_links(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Claims(folder) as one, Claims(folder) as other:
        assert one.take(1) and not other.take(1)
