# SPDX-License-Identifier: Apache-2.0
"""A model that `torch.compile` has wrapped goes through an adapter's life as the model that it stands for."""

import torch
from helpers import logits, move_adapter, tiny_llama, token_ids
from safetensors.torch import load_file
from torch import nn

import osora
from osora import adapted_layers


def compiled() -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(tiny_llama(), backend="eager")  # Python's code is compiled, arithmetic stays torch's


def test_a_life(tmp_path):
    config, ids = osora.OsoraConfig(r=4), token_ids()
    plain, model = osora.attach(tiny_llama(), config), compiled()
    base = logits(model, ids)
    osora.attach(model, config)  # what had been compiled has no adapter
    assert list(adapted_layers(model)) == list(adapted_layers(plain))
    for one in (plain, model):
        torch.manual_seed(8)
        move_adapter(one, 0.1)
    moved = logits(plain, ids)
    assert torch.equal(logits(model, ids), moved) and not torch.equal(base, moved)

    for name, one in {"plain": plain, "compiled": model}.items():
        osora.save_adapter(one, tmp_path / name)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for file in ("adapter_config.json", "README.md"):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()

    fresh = compiled()
    assert torch.equal(logits(osora.load_adapter(fresh, tmp_path / "plain"), ids), moved)
    osora.load_adapter(fresh, tmp_path / "compiled", name="second")
    osora.set_adapter(fresh, "second")
    assert torch.equal(logits(fresh, ids), moved)
    osora.restore_adapter(fresh, tmp_path / "plain")
    assert torch.equal(logits(osora.share_base(fresh), ids), base)
    osora.merge(fresh)
    assert not torch.equal(logits(fresh, ids), base)
    osora.unmerge(fresh)
    assert torch.equal(logits(fresh, ids), moved)
    osora.detach(fresh)
    assert torch.equal(logits(fresh, ids), base) and not adapted_layers(fresh)
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_compiled_after_it_was_adapted_and_detached_through_either():
    ids, plain = token_ids(), tiny_llama()
    base = logits(plain, ids)
    frozen = plain.model.embed_tokens.weight.requires_grad_(False)
    osora.attach(plain, osora.OsoraConfig(r=4))
    model = torch.compile(plain, backend="eager")
    move_adapter(model, 0.1)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    osora.detach(model)
    assert torch.equal(logits(model, ids), base) and torch.equal(logits(plain, ids), base)
    assert all(p.requires_grad == (p is not frozen) for p in plain.parameters())
    assert "_orig_mod" not in str(osora.summary(osora.attach(model, osora.OsoraConfig(r=4))))
    osora.detach(plain)
    assert not adapted_layers(model)
