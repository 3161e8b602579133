# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of plain modules on disk, in shards, and bases made of them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import osora


class Stack(nn.Module):
    """Linear layers of a few shapes, one of which does not need a bias; blocks have numbers."""

    def __init__(self, blocks: int = 3, width: int = 12, seed: int = 3) -> None:
        super().__init__()
        if seed is not None and not torch.empty(()).is_meta:
            torch.manual_seed(seed)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(width, 2 * width + 1),
                    "down": nn.Linear(2 * width + 1, width, bias=False),
                    "side": nn.Linear(width, width),
                }
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["side"](block["down"](block["up"](x).tanh()))
        return x


def on_meta(**sizes: int) -> Stack:
    with torch.device("meta"):
        return Stack(**sizes)


def write_checkpoint(model: nn.Module, folder: Path, shards: int = 2) -> Path:
    """Its state in so many files with an index, or in one."""
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    places = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_basis(model: nn.Module, folder: Path, config: osora.OsoraConfig, **options: object) -> Path:
    """``folder/basis`` of a module, whose class makes it on the meta device."""
    shutil.rmtree(folder / "base", ignore_errors=True)
    write_checkpoint(model, folder / "base")
    with torch.device("meta"):
        tree = type(model)()
    osora.initialise(folder / "base", folder / "basis", config, model=tree, progress=False, **options)
    return folder / "basis"


def factors_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: {"U": layer.U, "S0": layer.S0, "V": layer.V} for name, layer in osora.adapted_layers(model).items()}


def same_factors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two adapted models have the same layers, bases and certificates, bit for bit."""
    first, second = factors_of(one), factors_of(other)
    layers, others = osora.adapted_layers(one), osora.adapted_layers(other)
    return list(first) == list(second) and all(
        all(torch.equal(first[name][kind], second[name][kind]) for kind in ("U", "S0", "V"))
        and layers[name].certificate == others[name].certificate
        for name in first
    )
