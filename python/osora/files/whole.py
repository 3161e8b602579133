# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all: filled under another name, synchronised, renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _usual_mode(full: int) -> int:
    """What a new file or folder gets here; tempfile's own mode would keep a group from reading it."""
    mask = os.umask(0)
    os.umask(mask)
    return full & ~mask


def why_unreadable(path: Path) -> str | None:
    """What keeps safetensors from a file of that name, if anything does: it takes UTF-8 alone."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return f"{str(path)!a} is no name in UTF-8, and safetensors opens no other: choose another folder"
    return None


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary file in ``path``'s folder: to be renamed to it when all is written, and else removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def finish(path: Path) -> None:
    """On the disk, and with the mode of any new file."""
    sync(path)
    os.chmod(path, _usual_mode(0o666))


def write_json(path: Path, content: Any, *, allow_nan: bool = False) -> None:
    """Whole or not at all. Raises ValueError for NaN and infinities, which JSON has not, unless they are allowed."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    with temporary_beside(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")  # the bytes of a path may be no text
        finish(new)
        os.replace(new, path)


def refuse_used(target: Path) -> None:
    """Raise FileExistsError unless ``target`` is nothing, or an empty folder."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"{target} exists and is not empty: choose another folder, or remove it first")


def refuse_unreplaceable(target: Path) -> None:
    """Raise FileExistsError unless a new folder can take the place of ``target``, which is nothing or empty."""
    refuse_used(target)
    if target.exists() and (target.samefile(os.curdir) or os.path.ismount(target)):
        what = "the working directory" if target.samefile(os.curdir) else "where a file system is mounted"
        raise FileExistsError(f"{target} is {what}, whose place no other folder can take: name a new folder in it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when all went well, and vanishes when not.

    Raises:
        FileExistsError: ``target`` is a file, a folder that holds something, the working directory, a mount point.
    """
    refuse_unreplaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield unfinished
        unfinished.chmod(_usual_mode(0o777))
        sync(unfinished)
        os.replace(unfinished, target)
        sync(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
