# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk for the tests: one to save, ways to damage it, and the proof that a refusal changed nothing."""

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

import osora
from osora import AdapterError, OsoraConfig, load_adapter
from osora.layers import fingerprint

FILES = ["adapter_config.json", "adapter_model.safetensors"]
both = pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])


def adapted(make=tiny_llama, **config) -> nn.Module:
    return move_adapter(osora.attach(make(), OsoraConfig(**({"r": 5, "tol": 1e-4} | config))))


def edit(folder: Path, change) -> None:
    """Change adapter_config.json as a hand, or an attacker, would."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def key(module: str, kind: str) -> str:
    """The name of an OSoRA tensor in the file."""
    return f"base_model.model.{module}.osora_{kind}" + (".weight" if kind in "os" else "")


def described(config: dict) -> list[dict]:
    return config["osora"]["modules"]


def edit_tensors(folder: Path, change) -> None:
    """Change the tensors and mend the digests, so that only the later checks can notice."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda config: mend(config, tensors))


def mend(config: dict, tensors: dict) -> None:
    for module in described(config):
        for field, kinds in (("values_sha256", ("o", "s", "S0")), ("basis_sha256", ("U", "V"))):
            here = {kind: tensors[key(module["name"], kind)] for kind in kinds if key(module["name"], kind) in tensors}
            if here and all(t.is_floating_point() for t in here.values()):
                module[field] = fingerprint.tensors_digest(here, module["name"])


def refused(folder: Path, match: str, error=AdapterError, make=tiny_llama) -> None:
    """Loading fails as it should, and the model is the very one it was."""
    model, ids = make(), token_ids()
    before = {name: id(m) for name, m in model.named_modules()}, {n: id(p) for n, p in model.named_parameters()}
    wish = logits(model, ids)
    with pytest.raises(error, match=match):
        load_adapter(model, folder)
    assert (
        {name: id(m) for name, m in model.named_modules()},
        {n: id(p) for n, p in model.named_parameters()},
    ) == before
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(logits(model, ids), wish)
