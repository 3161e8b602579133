# SPDX-License-Identifier: Apache-2.0
"""The model that a benchmark runs on: SmolLM2 as the demo has it, a folder, random weights (known ones: loading.py)."""

import argparse
import os
import sys
from pathlib import Path

import torch
from measure import BENCH, Refused

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = """MODEL is one of
  smollm2   SmolLM2-135M-Instruct from the demo's package (examples/demo_assets.py); converted on first use
  random    its architecture with random weights: for the time of a step, not for that of an SVD
  tiny      two small random blocks: to see that the benchmark works
  llama3-8b-layers   two blocks in the shapes of Llama-3-8B whose singular triplets are known, spectra like SmolLM2's
  a folder  any Hugging Face causal language model"""

NAMES = ("smollm2", "random", "tiny", LLAMA := "llama3-8b-layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks ask."""
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(NAMES)} or a folder (see below)")
    several = f"default: float32 and bfloat16; for {LLAMA} float32, in which its truth is known"
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help=several)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, help="only the first blocks of the model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="repetitions that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the JSON (default: bench/results)")
    parser.add_argument("--quick", action="store_true", help="the tiny model, rank 8, one repetition: no figures")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with what --quick means."""
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.rank, options.repetitions, options.warm_up = "tiny", 8, 1, 0
    if options.dtype is None:
        options.dtype = ["float32"] if options.model == LLAMA else ["float32", "bfloat16"]
    for name in ("rank", "repetitions", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def label(which: str) -> str:
    """The model's name for a report, without the path it lies in."""
    return which if which in NAMES else Path(which).resolve().name


def _random(tiny: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    if tiny:
        shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, **heads))


def load_stored(which: str, dtype: str, device: str, layers: int | None = None) -> torch.nn.Module:
    """Any of them but LLAMA, in evaluation mode and frozen; Refused with the cure where it cannot be had."""
    if which in ("random", "tiny"):
        model = _random(which == "tiny").to(DTYPES[dtype])
    else:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        folder = Path(which)
        if which == "smollm2":
            sys.path.insert(0, str(BENCH.parent / "examples"))
            try:
                import demo_assets
            finally:
                sys.path.pop(0)
            try:
                folder = demo_assets.smollm2_folder()
            except demo_assets.DemoAssetError as error:
                raise Refused(f"{error}\nor run with --model FOLDER or --model random") from None
        elif not folder.is_dir():
            raise Refused(f"there is no folder {which}: --model takes a Hugging Face folder, {', '.join(NAMES)}")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
    return model.to(device).eval().requires_grad_(False)
