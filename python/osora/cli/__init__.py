# SPDX-License-Identifier: Apache-2.0
"""The command ``osora`` (docs/cli.md). Nothing here is imported by ``import osora``."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give back its exit code; ``arguments`` are the process's unless given."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError as missing:
        print(f"osora's command line needs the package {missing.name!r}: pip install 'osora[cli]'", file=sys.stderr)
        return 3
    from osora.cli.app import run

    return run(arguments)
