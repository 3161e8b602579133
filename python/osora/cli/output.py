# SPDX-License-Identifier: Apache-2.0
"""What the commands say: tables or one JSON object on stdout, progress and warnings on stderr, and the exit code."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from osora import AdapterError, BasisError, ConvergenceError
from osora.finetuning.listener import Stopped

REFUSED, UNUSABLE, MISSING, UNEXPECTED, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 3, 4, 130, 141, 143


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process with 1, which here says that something is refused."""
        raise BrokenPipeError


def print_json(result: dict[str, Any]) -> None:
    """One object on stdout, at once; escaped where stdout could not hold its letters."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps(result, indent=2, ensure_ascii=plain, allow_nan=False), flush=True)


class Output:
    """Where a command's words go."""

    def __init__(self, as_json: bool) -> None:
        """``as_json``: one object on stdout, and no bars."""
        self.as_json = as_json
        self.out, self.err = _Console(highlight=False), _Console(stderr=True, highlight=False)
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """A line for a person."""
        if not self.as_json:
            self.out.print(Text(text))

    def note(self, text: str) -> None:
        """A line about progress, which goes where the bars go."""
        if not self.as_json:
            self.err.print(Text(text))

    def table(self, rows: dict[str, str], title: str) -> None:
        """Names and values."""
        if self.as_json:
            return
        table = Table(title=Text(title), title_justify="left", show_header=False, title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.out.print(table)

    def finish(self, result: dict[str, Any]) -> None:
        """The JSON object, if that is what was asked for."""
        if self.as_json:
            print_json(result | {"warnings": self.warnings})

    @contextmanager
    def bar(self, what: str) -> Iterator[Any]:
        """A progress bar on stderr; gives a function of (done, of all)."""
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.err, disable=self.as_json or not self.err.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, of: progress.update(task, completed=done, total=of)

    @property
    def bars(self) -> bool | None:
        """For functions with a ``progress`` option."""
        return False if self.as_json else None


@contextmanager
def command(as_json: bool, extra: str = "cli") -> Iterator[Output]:
    """The frame of every command: warnings become lines, expected errors become one line and an exit code.

    ``extra``: the one of the package's extras that brings what the command needs.
    """
    output = Output(as_json)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        output.warnings.append(str(message))
        output.err.print(Text(f"warning: {message}", style="yellow"))

    def fail(error: BaseException, code: int) -> typer.Exit:
        text = str(error) or type(error).__name__
        output.finish({"error": text, "exit_code": code})
        if not as_json:
            output.err.print(Text(f"error: {text}", style="bold red"))
        return typer.Exit(code)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RuntimeWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            yield output
    except (AdapterError, BasisError, ConvergenceError) as error:
        raise fail(error, REFUSED) from error
    except ModuleNotFoundError as error:
        needs = ModuleNotFoundError(f"this command needs the package {error.name!r}: pip install 'osora[{extra}]'")
        raise fail(needs, MISSING) from error
    except BrokenPipeError as error:  # nobody is there to be told
        raise typer.Exit(silence()) from error
    except (OSError, ValueError, TypeError) as error:
        raise fail(error, UNUSABLE) from error
    except KeyboardInterrupt as error:
        raise fail(KeyboardInterrupt(str(error) or "interrupted"), INTERRUPTED) from error
    except Stopped as error:
        raise fail(error, TERMINATED) from error
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # out of memory, or a fault of ours
        traceback.print_exc(file=sys.stderr)
        raise fail(error, UNEXPECTED) from error


def silence() -> int:
    """After the reader of stdout is gone: what is written from here on, at the interpreter's end too, goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file
        pass
    return PIPE_CLOSED


def whole_bytes(count: int) -> str:
    """A size for people."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
