# SPDX-License-Identifier: Apache-2.0
"""The code blocks of documents."""

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|^<!-- python\n(.*?)^-->$", flags=re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """(line, code) of the fenced blocks in these languages; with "python" also of the hidden ones."""
    text = text_of(path)
    for found in BLOCK.finditer(text):
        language, shown, hidden = found.groups()
        if hidden is not None and "python" in languages:
            yield text.count("\n", 0, found.start()) + 2, hidden
        elif language in languages:
            yield text.count("\n", 0, found.start()) + 2, shown
