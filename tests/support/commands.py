# SPDX-License-Identifier: Apache-2.0
"""The command osora, run and looked at."""

import json

import pytest

typer_testing = pytest.importorskip("typer.testing")
from osora.cli.app import app  # noqa: E402  (it needs typer)


def osora_says(*arguments: object, code: int = 0) -> str:
    """What a command prints; stderr too if it fails."""
    result = typer_testing.CliRunner().invoke(app, [str(word) for word in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception}"
    return result.stdout if code == 0 else result.output


def osora_json(*arguments: object, code: int = 0) -> dict:
    result = typer_testing.CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, f"{result.output}\n{result.exception}"
    return json.loads(result.stdout)
