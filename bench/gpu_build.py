# SPDX-License-Identifier: Apache-2.0
"""Builds osora for gpu_check.sh, in a folder of its own, with cmake alone: no pip, no network, no git.

  python bench/gpu_build.py FOLDER [--device cuda|cpu]

FOLDER/site is then a place for PYTHONPATH; FOLDER/objects stays, so that the next build is quick. For a card it is
compiled for the cards in this machine, unless TORCH_CUDA_ARCH_LIST says otherwise. It mirrors what setup.py asks of
CMake; the choice of nvcc and of cards is the same code.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from cuda_choice import BuildError, architectures, choose  # noqa: E402


def tool(name: str) -> str | None:
    """Path of cmake or ninja: the wheel's, which is known to be new enough, before the one on PATH."""
    try:
        module = import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
    except (ImportError, AttributeError, OSError):
        folder = ""
    return shutil.which(name, path=folder) or shutil.which(name)


def definitions(device: str) -> dict[str, object]:
    """What CMake is told: where torch is, which nvcc, which cards."""
    import torch

    place = Path(torch.__file__).parent
    wishes = {**os.environ, "OSORA_CUDA": "1"} if device == "cuda" else os.environ
    choice = choose(torch.__version__, torch.version.cuda, place.parent / "nvidia", wishes)
    print(f"osora: building {'with' if choice.nvcc else 'without'} CUDA: {choice.reason}", flush=True)
    options: dict[str, object] = {"CMAKE_BUILD_TYPE": "Release", "Python_EXECUTABLE": sys.executable}
    options |= {"OSORA_TORCH_DIR": place, "OSORA_TORCH_VERSION": torch.__version__, "OSORA_REASON": choice.reason}
    options["OSORA_CUDA"] = "ON" if choice.nvcc else "OFF"
    if choice.nvcc:
        cards = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
        options["CMAKE_CUDA_COMPILER"] = choice.nvcc
        options["OSORA_CUDA_ARCHS"] = architectures(cards, torch._C._cuda_getArchFlags() or "")
    return options


def build(folder: Path, device: str) -> None:
    cmake = tool("cmake")
    if not cmake:
        raise BuildError("there is no cmake")
    define = [f"-D{name}={value}" for name, value in definitions(device).items()]
    ninja = tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-G", "Unix Makefiles"]
    objects, package = folder / "objects", folder / "site/osora"
    subprocess.run([cmake, "-S", ROOT, "-B", objects, *generator, *define], check=True)
    subprocess.run([cmake, "--build", objects, "--target", "_C", "--parallel", str(os.cpu_count() or 1)], check=True)
    shutil.rmtree(package, ignore_errors=True)  # a module that is gone from the sources would stay
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "_compiled_for.py")
    shutil.copytree(ROOT / "python/osora", package, ignore=left_out)
    subprocess.run([cmake, "--install", objects, "--prefix", package], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    folder, began = options.folder.resolve(), time.monotonic()
    try:
        build(folder, options.device)
    except BuildError as error:
        print(f"not built: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"not built: {Path(error.cmd[0]).name} {error.cmd[1]} ended with {error.returncode}", file=sys.stderr)
        return 1
    print(f"built in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
