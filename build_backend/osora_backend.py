# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools, plus the answer to "which torch do we build against?".

A C++ extension must be compiled against the torch it will run with. pip's isolated build hides that torch but
runs the same interpreter, so it can still be found under the interpreter's own prefix. Other front ends (uv, build)
make a separate interpreter; there we ask for a torch, and setup.py pins the wheel to the one that was used.
"""

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (re-export every hook that is not wrapped below)

TORCH_RANGE = ">=2.11,<2.15"


def _site_folders() -> list[Path]:
    """The package folders of this interpreter that an isolated build does not see."""
    prefixes = [sys.prefix]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and "include-system-site-packages = true" in config.read_text().lower():
        prefixes.append(sys.base_prefix)
    folders = []
    for prefix in prefixes:
        paths = sysconfig.get_paths(vars={"base": prefix, "platbase": prefix})
        folders += [Path(paths["purelib"]), Path(paths["platlib"])]
    if not config.exists():
        folders.append(Path(site.getusersitepackages()))
    return folders


def _find_torch() -> bool:
    """True when torch can be imported, if need be by uncovering the folder that holds it."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for folder in _site_folders():
        if (folder / "torch" / "version.py").exists():
            sys.path.append(str(folder))  # last: the isolated packages still win
            importlib.invalidate_caches()
            return True
    return False


def _torch_requirement() -> list[str]:
    return [] if _find_torch() else [os.environ.get("OSORA_BUILD_TORCH") or f"torch{TORCH_RANGE}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _find_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _find_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _find_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _find_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
