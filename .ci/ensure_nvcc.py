# SPDX-License-Identifier: Apache-2.0
"""Installs pip's nvcc of torch's own CUDA version into this environment when torch needs one and none is found."""

import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build_backend"))
from cuda_choice import choose

# nvcc's two other halves (crt, nvvm) must have its own version; cuda_fp16.h needs cccl.
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")

if torch.version.cuda and os.environ.get("OSORA_CUDA") != "0":
    # OSORA_CUDA=1 would make a missing nvcc an error; here it is what we cure.
    environ = {name: value for name, value in os.environ.items() if name != "OSORA_CUDA"}
    found = choose(torch.__version__, torch.version.cuda, Path(torch.__file__).parents[1] / "nvidia", environ)
    if found.nvcc is None:
        wanted = [f"{package}=={torch.version.cuda}.*" for package in PACKAGES]
        print(f"{found.reason}: installing {' '.join(wanted)}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
