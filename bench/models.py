# SPDX-License-Identifier: Apache-2.0
"""The model that a benchmark runs on: SmolLM2 as the demo has it, a folder, random weights, or known ones.

``llama3-8b-layers`` has two blocks in the shapes of Llama-3-8B. Its fourteen linears are matrices of spectra.py, each
of its own seed: known singular vectors, and the singular values of a SmolLM2 layer (the stored points, so that they
are the same everywhere), stretched to 4096 of them (1024 for k and v). The query's for q, k, v and o, the gate's for
gate and up, the down's for down.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import BENCH, Refused

if TYPE_CHECKING:
    from spectra import Truth

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHOICES = """MODEL is one of
  smollm2   SmolLM2-135M-Instruct from the demo's package (examples/demo_assets.py); converted on first use
  random    its architecture with random weights: for the time of a step, not for that of an SVD
  tiny      two small random blocks: to see that the benchmark works
  llama3-8b-layers   two blocks in the shapes of Llama-3-8B whose singular triplets are known, spectra like SmolLM2's
  a folder  any Hugging Face causal language model"""

NAMES = ("smollm2", "random", "tiny", LLAMA := "llama3-8b-layers")
LLAMA_SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_BLOCKS = 2
LLAMA_SPECTRA = {
    **{f"self_attn.{which}_proj": "query" for which in "qkvo"},
    **{"mlp.gate_proj": "gate", "mlp.up_proj": "gate", "mlp.down_proj": "down"},
}
LLAMA_SCALE = 1  # what every width is divided by: not 1 in tests alone


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


def _llama(dtype: str, layers: int | None, rank: int) -> tuple[torch.nn.Module, "dict[str, Truth]"]:
    """The two blocks, and the first `rank` triplets of each of their linears by name."""
    import spectra  # which reads SmolLM2 through this module
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: size if name.startswith("num") else size // LLAMA_SCALE for name, size in LLAMA_SHAPE.items()}
    blocks = LLAMA_BLOCKS if layers is None else len(range(LLAMA_BLOCKS)[:layers])
    config = LlamaConfig(**shape, num_hidden_layers=blocks, vocab_size=128, tie_word_embeddings=True)
    with torch.device("meta"):  # the linears get their weights below, everything else here
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(128, config.hidden_size, generator=generator) * config.initializer_range
    model.model.embed_tokens.weight = torch.nn.Parameter(embeddings.to(DTYPES[dtype]))
    model.tie_weights()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.weight = torch.nn.Parameter(torch.ones_like(module.weight, dtype=DTYPES[dtype], device="cpu"))
    source, truth = spectra.Source("stored"), {}
    for number, block in enumerate(model.model.layers):
        for index, (which, kind) in enumerate(LLAMA_SPECTRA.items()):
            linear = block.get_submodule(which)
            d, k = linear.weight.shape
            seed = len(LLAMA_SPECTRA) * number + index
            made = spectra.make(kind, d, k, 1, min(rank, d, k), DTYPES[dtype], "cpu", seed, source)
            linear.weight = torch.nn.Parameter(made.weight[0], requires_grad=False)
            (truth[f"model.layers.{number}.{which}"],) = made.truth
    return model, truth


def load_known(
    which: str, dtype: str, device: str, layers: int | None, rank: int
) -> tuple[torch.nn.Module, "dict[str, Truth]"]:
    """As `load`, with the first `rank` triplets of the layers whose triplets are known, by name, on the CPU."""
    if which != LLAMA:
        return load(which, dtype, device, layers), {}
    model, truth = _llama(dtype, layers, rank)
    return model.to(device).eval().requires_grad_(False), truth


def load(which: str, dtype: str, device: str, layers: int | None = None) -> torch.nn.Module:
    """The model in evaluation mode, every parameter frozen; Refused with the cure where it cannot be had."""
    if which == LLAMA:
        return load_known(which, dtype, device, layers, 1)[0]
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
