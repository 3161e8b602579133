# SPDX-License-Identifier: Apache-2.0
"""CUDA or not, one CMake run, and the pin of torch. Everything else about compiling is in CMakeLists.txt."""

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))

from cuda_choice import BuildError, architectures, choose  # noqa: E402
from osora_backend import TORCH_RANGE  # noqa: E402


def tool(name: str) -> str:
    """Path of cmake or ninja: the wheel's, which is known to be new enough, before the one on PATH."""
    try:
        module = import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
    except (ImportError, AttributeError, OSError):
        folder = ""
    if found := shutil.which(name, path=folder) or shutil.which(name):
        return found
    raise BuildError(f"{name} not found: pip install {name}")


def torch_minor() -> str:
    """'2.14', after a check that this torch is one we support."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    low, high = (tuple(int(p) for p in bound.strip("><=").split(".")) for bound in TORCH_RANGE.split(","))
    if not low <= (major, minor) < high:
        raise BuildError(f"osora builds with torch{TORCH_RANGE}, found {torch.__version__}")
    return f"{major}.{minor}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        torch_minor()
        torch_dir = Path(torch.__file__).parent
        choice = choose(torch.__version__, torch.version.cuda, torch_dir.parent / "nvidia")
        print(f"osora: building {'with' if choice.nvcc else 'without'} CUDA: {choice.reason}", flush=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "OSORA_TORCH_DIR": torch_dir,
            "OSORA_TORCH_VERSION": torch.__version__,
            "OSORA_REASON": choice.reason,
            "OSORA_EDITABLE": "ON" if self.editable_mode else "OFF",
            "OSORA_WERROR": "ON" if os.environ.get("OSORA_WERROR") == "1" else "OFF",
            "OSORA_CUDA": "OFF",
        }
        if choice.nvcc:
            cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
            options["OSORA_CUDA"] = "ON"
            options["CMAKE_CUDA_COMPILER"] = choice.nvcc
            options["OSORA_CUDA_ARCHS"] = architectures(cards, torch._C._cuda_getArchFlags() or "")
        installed = ROOT / "python/osora" if self.editable_mode else Path(self.get_ext_fullpath(ext.name)).parent
        build_dir = self.build_folder(torch_dir, torch.__version__, choice.nvcc)
        cmake = tool("cmake")
        define = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *define], check=True)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run([cmake, "--build", build_dir, "--target", "_C", *jobs], check=True)
        subprocess.run([cmake, "--install", build_dir, "--prefix", installed.resolve()], check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: `cmake --install` has written into the source tree."""

    def build_folder(self, torch_dir: Path, torch_version: str, nvcc: str | None) -> Path:
        """One folder per (python, torch, nvcc): a second build is quick and never meets another one's cache."""
        if folder := os.environ.get("OSORA_BUILD_DIR"):
            return Path(folder).resolve()
        key = hashlib.sha256(f"{sys.prefix}|{torch_dir}|{nvcc}".encode()).hexdigest()[:8]
        kind = "cuda" if nvcc else "cpu"
        name = f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch_version.split('+')[0]}-{kind}-{key}"
        return ROOT / "build" / name


def requirements() -> list[str]:
    """A compiled wheel runs only with the torch minor it was compiled for; a source distribution with the range."""
    others = ["numpy>=1.26", "rich>=13", "safetensors>=0.5"]
    if "sdist" not in sys.argv:
        try:
            return [f"torch=={torch_minor()}.*", *others]
        except ImportError:
            pass
    return [f"torch{TORCH_RANGE}", *others]


setup(
    install_requires=requirements(),
    ext_modules=[Extension("osora._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
