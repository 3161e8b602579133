# SPDX-License-Identifier: Apache-2.0
"""What this machine is, and with which versions: the first stage of gpu_check.sh. Says more than a figure needs.

  python bench/gpu_machine.py [--device cuda|cpu]

Exit code 1 where torch is missing, or cannot use the card that was asked for.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("torch", "numpy", "safetensors", "rich", "transformers", "peft", "setuptools", "pybind11", "cmake", "ninja"),
    *("pytest", "pytest-xdist", "pytest-benchmark", "nvidia-cublas", "nvidia-cusolver", "nvidia-cuda-runtime"),
)
TOOLS = {
    "nvidia-smi": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm", "--format=csv"],
    "nvcc": ["nvcc", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
    "c++": ["c++", "--version"],
}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def answer(command: list[str]) -> str:
    """What a tool says of itself, or that it is not there."""
    name = command[0]
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if not path:
        return "not found"
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"gives no answer: {type(error).__name__}"
    return (done.stdout.strip() or done.stderr.strip())[:600]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    facts |= {"memory_bytes": memory, "load_average": os.getloadavg()[0], "gpu": None}
    facts |= {"packages": {name: installed(name) for name in PACKAGES}}
    for name, command in TOOLS.items():
        print(f"-- {name}\n{answer(command)}", flush=True)
    wrong = None
    try:
        import torch

        facts |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        if device == "cuda" and torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            facts["gpu"] = {"name": card.name, "capability": f"{card.major}.{card.minor}"}
            facts["gpu"] |= {"memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count}
        elif device == "cuda":
            wrong = f"torch {torch.__version__} sees no CUDA device"
    except Exception as error:  # what was found so far is told all the same
        wrong = f"torch cannot be used: {type(error).__name__}: {error}"
    line = json.dumps({"stage": "machine", "device": device, "machine": facts}, ensure_ascii=False)
    print(line)
    if lines := os.environ.get("OSORA_RESULTS_JSONL"):
        with Path(lines).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
