# SPDX-License-Identifier: Apache-2.0
"""A sharded checkpoint in the shapes of Llama-3-8B, any number of blocks, whose singular values are known.

One matrix of spectra.py for each shape; the others of that shape are it with its rows turned, which leaves the singular
values as they are. It is kept in a folder, and taken from there the next time.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import spectra
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, KEYS = 4096, 14336, 1024
VOCABULARY = 128  # tied, and no part of any figure
TURN = 37  # rows
KNOWN = 512  # singular values that are kept of each matrix
TRUTH = "truth.json"
PRODUCTS = 40  # of the power iteration that finds how far rounding moves singular values at the most


@dataclass(frozen=True)
class Recipe:
    """What makes a checkpoint; an equal one on the disk is the same checkpoint."""

    blocks: int
    scale: int = 1
    seed: int = 0

    def linears(self) -> dict[str, tuple[int, int, str]]:
        """Of a block: out_features, in_features and the kind of spectrum."""
        hidden, wide, keys = (size // self.scale for size in (HIDDEN, WIDE, KEYS))
        return {
            "self_attn.q_proj": (hidden, hidden, "query"),
            "self_attn.k_proj": (keys, hidden, "query"),
            "self_attn.v_proj": (keys, hidden, "query"),
            "self_attn.o_proj": (hidden, hidden, "query"),
            "mlp.gate_proj": (wide, hidden, "gate"),
            "mlp.up_proj": (wide, hidden, "gate"),
            "mlp.down_proj": (hidden, wide, "down"),
        }

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"llama3-8b-{self.blocks}-blocks" + (f"-by-{self.scale}" if self.scale > 1 else "")


@dataclass(frozen=True)
class Known:
    """Of the matrices of one shape, as they were before they were rounded to bfloat16."""

    sigma: list[float]
    """The largest."""
    rounding: float
    """The norm of what rounding changed: no singular value moved by more (Weyl)."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and what is known of it."""

    folder: Path
    known: dict[tuple[int, int], Known]

    @property
    def bytes(self) -> int:
        """Of its shards."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def norm_of(matrix: Tensor) -> float:
    """The largest singular value, by power iteration; with a tenth for what it has not reached."""
    v = torch.randn(matrix.shape[1], dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(PRODUCTS):
        v = matrix.mT @ (matrix @ v)
        v /= torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
    return 1.1 * float(torch.linalg.vector_norm(matrix @ v))


def matrix(d: int, k: int, kind: str, seed: int) -> tuple[Tensor, Known]:
    """One weight in bfloat16."""
    generator = torch.Generator().manual_seed(1000 * seed)
    places, values, _ = spectra.Source("stored").spectrum(kind)
    sigma = spectra.stretch(places, values, min(d, k), generator)
    exact, _ = spectra.known(d, k, sigma, 1, generator, "cpu")
    weight = exact.to(torch.bfloat16)
    return weight, Known(sigma[:KNOWN].tolist(), norm_of(exact.sub_(weight)))


def _write(folder: Path, recipe: Recipe) -> dict[tuple[int, int], Known]:
    from transformers import LlamaConfig

    sizes, made, known = recipe.linears(), {}, {}
    for d, k, kind in sizes.values():
        if (d, k) not in made:
            made[d, k], known[d, k] = matrix(d, k, kind, recipe.seed)
    hidden = HIDDEN // recipe.scale
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=WIDE // recipe.scale,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=recipe.blocks,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    count: dict[tuple[int, int], int] = {}
    places: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, Tensor]) -> None:
        file = f"model-{number:05d}-of-{recipe.blocks + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    for number in range(recipe.blocks):
        block = f"model.layers.{number}"
        tensors = {f"{block}.{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in NORMS}
        for name, (d, k, _) in sizes.items():
            place = count[d, k] = count.get((d, k), -1) + 1
            tensors[f"{block}.{name}.weight"] = made[d, k].roll(TURN * place, 0)
        shard(number + 1, tensors)
    embeddings = torch.randn(VOCABULARY, hidden, generator=torch.Generator().manual_seed(recipe.seed))
    rest = {"model.embed_tokens.weight": 0.02 * embeddings, "model.norm.weight": torch.ones(hidden)}
    shard(recipe.blocks + 1, {key: tensor.to(torch.bfloat16) for key, tensor in rest.items()})
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return known


NORMS = ("input_layernorm", "post_attention_layernorm")


def checkpoint(parent: Path, recipe: Recipe) -> Checkpoint:
    """The checkpoint, in a folder of ``parent``: made, or there already."""
    place = parent / recipe.name
    truth = place / TRUTH
    if not truth.is_file() or json.loads(truth.read_text(encoding="utf-8"))["recipe"] != asdict(recipe):
        new = place.with_name(f"{place.name}.new")
        for old in (new, place):
            shutil.rmtree(old, ignore_errors=True)
        (new / "checkpoint").mkdir(parents=True)
        known = _write(new / "checkpoint", recipe)
        facts: dict[str, Any] = {"recipe": asdict(recipe)}
        facts["known"] = [[d, k, asdict(values)] for (d, k), values in known.items()]
        (new / TRUTH).write_text(json.dumps(facts), encoding="utf-8")
        new.rename(place)
    found = json.loads(truth.read_text(encoding="utf-8"))["known"]
    return Checkpoint(place / "checkpoint", {(d, k): Known(**values) for d, k, values in found})
