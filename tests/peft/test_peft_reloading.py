# SPDX-License-Identifier: Apache-2.0
"""An adapter loaded over one that is there, as Trainer resumes and as a server swaps: checked, in place, or nothing."""

from pathlib import Path

import pytest
import torch
from helpers import logits, tiny_llama, token_ids
from peft import LoraConfig, get_peft_model
from pefts import OsoraConfig, adapted, layers, move, quiet
from safetensors.torch import load_file, save_file
from saved_adapters import both
from torch import nn

import osora
from osora.peft import SorsaConfig

pytestmark = [
    *quiet,
    # PEFT's, of a head that is trained whole; before 0.20 where it is not tied, too
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and:UserWarning"),
]


def untied() -> nn.Module:
    return tiny_llama(tied=False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refused(model: nn.Module, folder: Path, match: str, error: type[Exception] = osora.AdapterError, **options) -> None:
    """The error, and the model with its parameters is the very one it was, and can go on."""
    before, objects, ids = state(model), [id(p) for p in model.parameters()], token_ids()
    wish = logits(model, ids)
    model.train()
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "default", **options)
    assert model.training and [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model.eval(), ids), wish) and next(iter(model.peft_config)) == "default"


@both
@pytest.mark.parametrize("method", [OsoraConfig, SorsaConfig])
def test_in_place(method, save_basis, tmp_path):
    """The same parameters, which an optimiser has."""
    model, ids = move(get_peft_model(tiny_llama(), method(r=4, tol=1e-4, save_basis=save_basis))), token_ids()
    model.save_pretrained(tmp_path / "a")
    wish = logits(move(model, step=0.2), ids)
    model.save_pretrained(tmp_path / "b")
    objects = [id(p) for p in model.parameters()]
    model.load_adapter(tmp_path / "a", "default", is_trainable=True)
    assert not torch.allclose(logits(model, ids), wish, atol=0.05)
    model.load_adapter(tmp_path / "b", "default", is_trainable=True)
    assert torch.equal(logits(model, ids), wish) and [id(p) for p in model.parameters()] == objects
    assert all(p.requires_grad for layer in layers(model) for p in layer.deltas("default"))


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    model, ids = adapted(lambda: tiny_llama(layers=1), target_modules=["q_proj"]), token_ids()
    wish = logits(move(model, step=0.2), ids)
    model.save_pretrained(tmp_path)
    move(model, step=0.2)
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    assert not torch.allclose(logits(fast, ids), wish, atol=0.01)
    graphs = len(compiled)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(fast, ids), wish, rtol=1e-5, atol=1e-5)
    assert len(compiled) == graphs > 0


@both
def test_damaged(save_basis, tmp_path):
    model = adapted(untied, save_basis=save_basis, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    for kind, words in (
        ("o.weight", "o, s, S0 of"),
        ("S0", "o, s, S0 of"),
        *((("U", "U, V of"),) if save_basis else ()),
    ):
        found = {key: tensor.clone() for key, tensor in good.items()}
        found[[key for key in found if key.endswith(f"osora_{kind}")][-1]].view(-1)[1] += 0.01
        save_file(found, path)
        refused(model, tmp_path, rf"{words} \S+ are damaged")
    save_file(good, path)
    model.load_adapter(tmp_path, "default")
    assert all(torch.equal(model.get_parameter(key.replace("weight", "default.weight")), tensor)
               for key, tensor in good.items() if key.endswith("osora_o.weight"))  # fmt: skip


def another_base() -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[7, 11] += 1e-3
    return model


OTHERS = {
    "base": (lambda: adapted(another_base), r"up_proj is not the one this adapter was trained on"),
    "rank": (lambda: adapted(r=4), r"q_proj is \(32, 32, 4, .*that of 'default' is \(32, 32, 5, .*another name"),
    "layers": (lambda: adapted(target_modules=["q_proj"]), "other layers than 'default': 12 differ, the first is"),
    "options": (lambda: adapted(initial_o=0.5), r"initial_o=0\.5.*that of 'default' is .*initial_o=1\.0"),
    "method": (
        lambda: get_peft_model(tiny_llama(), SorsaConfig(r=5)),
        "an adapter of SORSA, and 'default' is one of O",
    ),
    "lora": (lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), "an adapter of LORA, and"),
    "head": (
        lambda: adapted(untied, modules_to_save=["lm_head"]),
        r"modules_to_save=\['lm_head'\], and 'default' has N",
    ),
    "bias": (lambda: adapted(bias="all"), "with bias='all', and 'default' has 'none'"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_adapter(what, tmp_path):
    make, words = OTHERS[what]
    make().save_pretrained(tmp_path)
    refused(adapted(), tmp_path, words)


def test_not_over_a_merged_one_nor_without_a_configuration(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    refused(model, tmp_path, "is merged: call unmerge_adapter", error=ValueError)
    model.unmerge_adapter()
    (tmp_path / "adapter_config.json").unlink()
    refused(model, tmp_path, "adapter_config.json", error=ValueError)


def test_adapters_of_other_methods_are_loaded_as_before(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    wish, ids = logits(model, ids := token_ids()), ids
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1)
    assert not torch.equal(logits(model, ids), wish)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, ids), wish)
