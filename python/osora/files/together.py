# SPDX-License-Identifier: Apache-2.0
"""Files that are one thing together: all of them renamed into their places, or none, and by one saver at a time."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where a folder cannot be locked
    fcntl = None  # type: ignore[assignment]

_WAIT = 60.0  # seconds; renames take far less
_CANNOT = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of network file systems


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other saver of this machine within it, thread or process; nothing of it is seen in the folder.

    Raises:
        TimeoutError: another one has not finished for a minute.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _WAIT
        while fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"another process has been replacing files in {folder} for {_WAIT:.0f} seconds: nothing was "
                        "replaced; save again when it is done, or to another folder"
                    ) from error
                time.sleep(0.01)
            except OSError as error:
                if error.errno in _CANNOT:  # no folder can be locked there, by anyone
                    break
                raise
        yield
    finally:
        os.close(handle)  # and the lock with it


def _keep(place: Path, kept: Path) -> None:
    """What is at ``place`` under another name, too."""
    if place.is_symlink():
        os.symlink(os.readlink(place), kept)
        return
    try:
        os.link(place, kept)
    except OSError:  # a file system without hard links
        shutil.copy2(place, kept)


def replace_together(news: Mapping[Path, Path]) -> None:
    """Rename files into their places: each of them or, whatever comes between, none.

    What was there is kept beside, as ``.NAME.before.…``, until the last one is in its place.

    Args:
        news: place → the new file, on the same file system, in the order of the renames.

    Raises:
        OSError: a file cannot be renamed, or not be kept; all is as it was.
        TimeoutError: another saver is at it.
    """
    with ExitStack() as locks:
        for folder in sorted({place.parent.resolve() for place in news}):  # in one order, or two wait for each other
            locks.enter_context(_locked(folder))
        number = secrets.token_hex(4)
        kept = {place: place.with_name(f".{place.name}.before.{number}") for place in news}
        there = {place for place in news if os.path.lexists(place)}
        try:
            for place in there:
                if place.is_symlink() or not place.is_dir():
                    _keep(place, kept[place])
            for place, new in news.items():
                os.replace(new, place)
        except BaseException:
            for place, new in news.items():
                if place in there and os.path.lexists(kept[place]):
                    os.replace(kept[place], place)
                elif place not in there and not os.path.lexists(new):
                    place.unlink(missing_ok=True)
            raise
        finally:
            for each in kept.values():
                each.unlink(missing_ok=True)


__all__ = ["replace_together"]
