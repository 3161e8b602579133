# SPDX-License-Identifier: Apache-2.0
"""The tests of osora.peft under other versions of PEFT, each in a folder of its own (`pip install --no-deps --target`).

`make peft-versions` fills the folders and names them in OSORA_PEFT_FOLDERS, separated as on PATH.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT

FOLDERS = [folder for folder in os.environ.get("OSORA_PEFT_FOLDERS", "").split(os.pathsep) if folder]
HERE = Path(__file__).parent
FILES = [
    "test_peft.py",
    "test_peft_files.py",
    "test_peft_many.py",
    "test_peft_quantised.py",
    "test_peft_reloading.py",
    "test_peft_rollback.py",
    "test_peft_saves.py",
    "test_trl_peft.py",  # Trainer, SFT and DPO
]


@pytest.mark.slow  # two minutes for each version
@pytest.mark.parametrize("folder", FOLDERS or [None])
def test_under_another_version(folder):
    if folder is None:
        pytest.skip("OSORA_PEFT_FOLDERS names no folder with another version of PEFT")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    which = "import peft; print(peft.__file__)"
    found = subprocess.run([sys.executable, "-c", which], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(Path(folder).resolve()), f"{folder} holds no PEFT"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:]
