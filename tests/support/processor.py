# SPDX-License-Identifier: Apache-2.0
"""Which processor the tests run on. Run as a program: also what MKL and oneDNN make of it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

# What holds the libraries back: torch and osora, MKL on Intel's processors, MKL elsewhere too, oneDNN.
SWITCHES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def processor() -> str:
    """Its name, and which of FLAGS it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    has = facts.get("flags", "").split()
    return f"{name} ({' '.join(flag for flag in FLAGS if flag in has) or 'none of ' + ' '.join(FLAGS)})"


def capability() -> str:
    """What torch uses, and the switches that are set."""
    switches = "".join(f", {name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
    return f"torch {torch.__version__}, capability {torch.backends.cpu.get_cpu_capability()}{switches}"


def said(program: str, **environment: str) -> list[str]:
    """The lines that a program prints in a process of its own; what it cannot do is not said."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch; " + program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.splitlines()


def mkl() -> str:
    """The instructions that MKL says it uses."""
    lines = said("a = torch.ones(8, 8); a @ a", MKL_VERBOSE="1")
    names = [line for line in lines if line.startswith("MKL_VERBOSE oneMKL")]
    return names[0].partition(" architecture ")[2] if names else "not in use"


def onednn() -> str:
    """The same of oneDNN, and whether torch gives it 16-bit products."""
    lines = said("torch.ones(8).to_mkldnn(); a = torch.ones(64, 64).bfloat16(); a @ a", ONEDNN_VERBOSE="all")
    names = [line.partition(",isa:")[2] for line in lines if ",cpu,isa:" in line]
    has = any("exec,cpu,matmul" in line for line in lines)
    return f"{names[0] if names else 'not in use'}; {'has' if has else 'is not given'} the products in bfloat16"


if __name__ == "__main__":
    print(f"processor: {processor()}\n{capability()}\nMKL: {mkl()}\noneDNN: {onednn()}")
