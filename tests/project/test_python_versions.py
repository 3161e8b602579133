# SPDX-License-Identifier: Apache-2.0
"""Every Python that pyproject.toml names, by its own rules: it compiles all our files without a warning, and has every
module of the standard library that they import. A version that this machine lacks is skipped.
"""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT

FOLDERS = (".ci", "bench", "build_backend", "examples", "python", "tests")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
ONLY_NEWER = {"tomllib"}  # Python 3.10 has a package instead: osora[train]

COMPILES = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
for path in sys.stdin.read().splitlines():
    try:
        compile(Path(path).read_bytes(), path, "exec")
    except (SyntaxError, Warning) as error:
        print(f"{path}: {error}")
"""


def files() -> list[Path]:
    return [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def interpreter(version: str) -> str:
    """By that version's name, which pyenv, where it is, gives to the newest it has of it."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    program, environ = shutil.which(f"python{version}"), dict(os.environ)
    if pyenv := shutil.which("pyenv"):
        latest = subprocess.run([pyenv, "latest", version], capture_output=True, text=True, check=False)
        environ |= {"PYENV_VERSION": latest.stdout.strip()} if latest.returncode == 0 else {}
    ask = [program or "false", "-c", "import sys; print(sys.executable)"]
    found = subprocess.run(ask, capture_output=True, text=True, env=environ, check=False)
    return found.stdout.strip() if found.returncode == 0 else pytest.skip(f"this machine has no Python {version}")


def run(python: str, program: str, given: str = "") -> list[str]:
    done = subprocess.run([python, "-c", program], input=given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in names}


def test_every_promised_version_is_looked_at():
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest and PYTHONS == [f"3.{minor}" for minor in range(int(lowest[1][2:]), 14)]


@pytest.mark.parametrize("version", PYTHONS)
def test_it_compiles_every_file_without_a_warning(version):
    assert run(interpreter(version), COMPILES, "\n".join(map(str, files()))) == []


@pytest.mark.parametrize("version", PYTHONS)
def test_it_has_the_modules_that_are_imported(version):
    there = set(run(interpreter(version), "import sys; print(*sys.stdlib_module_names, sep='\\n')"))
    wanted = set.union(*map(imported, files())) & sys.stdlib_module_names
    assert wanted - there <= ONLY_NEWER


def test_a_warning_and_a_removed_module_would_be_seen(tmp_path):
    warned, removed = tmp_path / "warned.py", tmp_path / "removed.py"
    warned.write_text("print('\\d')\n")
    removed.write_text("if True:\n    from telnetlib import Telnet\n")
    (found,) = run(sys.executable, COMPILES, f"{warned}\n{removed}")
    assert "invalid escape sequence" in found
    assert imported(removed) == {"telnetlib"}
