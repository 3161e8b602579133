# SPDX-License-Identifier: Apache-2.0
"""The tensors of an adapted model own their memory: whatever saves tensors by memory saves all of them, once."""

import io

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn

import osora

every_config = pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig], ids=["osora", "sorsa"])
every_family = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert], ids=["llama", "gpt2", "bert"])


def shared(model: nn.Module) -> list[str]:
    """Names of tensors whose memory holds more than they do. Tied ones count once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    return [name for name, t in tensors.items() if t.untyped_storage().nbytes() != t.numel() * t.element_size()]


@every_config
@every_family
def test_tensors_own_their_memory(make, config, tmp_path):
    model = osora.attach(make(), config(r=4))
    assert shared(model) == []
    osora.add_adapter(model, "small", config(r=2))
    assert shared(model) == []
    osora.save_adapter(move_adapter(model), tmp_path)
    assert shared(osora.load_adapter(make(), tmp_path)) == []
    assert shared(osora.attach(make(), config(r=16, rank_for_energy=0.5))) == []
    assert shared(osora.attach(make(torch.bfloat16) if make is not tiny_llama else make(), config(r=4))) == []


@every_config
def test_a_layer_is_saved_at_its_size(config):
    layer = osora.attach(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), config(r=32))[3]
    file = io.BytesIO()
    torch.save(layer, file)
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held < file.getbuffer().nbytes < held + 12_000  # names and pickled code


# -- accelerate ------------------------------------------------------------------------------------------------------


def prepared(model: nn.Module):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    return accelerator, accelerator.prepare(model)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def native(make, config: str, several: bool) -> nn.Module:
    kind = {"osora": osora.OsoraConfig, "sorsa": osora.SorsaConfig}[config]
    model = osora.attach(make(), kind(r=4))
    return osora.add_adapter(model, "second", kind(r=2)) if several else model


def of_peft(make, config: str, several: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    import osora.peft

    kind = {"osora": osora.peft.OsoraConfig, "sorsa": osora.peft.SorsaConfig}[config]
    model = peft.get_peft_model(make(), kind(r=4))
    if several:
        model.add_adapter("second", kind(r=2))  # in the first one's memory
        model.add_adapter("other", kind(r=3, seed=3, tol=1e-5))  # in its own
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("config", ["osora", "sorsa"])
@pytest.mark.parametrize("door", [native, of_peft], ids=["native", "peft"])
def test_accelerate_saves_a_state_that_loads(door, config, several, tmp_path):
    """save_state and load_state without checkpoint_adapters: the whole model, base and adapters."""
    accelerator, model = prepared(shaken(door(tiny_llama, config, several)))
    ids, before = token_ids(), {name: t.clone() for name, t in model.state_dict().items()}
    wish = logits(model, ids)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    assert not torch.equal(logits(shaken(model), ids), wish)
    accelerator.load_state(tmp_path / "state")
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    assert torch.equal(logits(model, ids), wish)
    if not several:
        from safetensors.torch import load_file

        tied = {"lm_head.weight", "base_model.model.lm_head.weight"}
        for where in ("state", "model"):
            assert before.keys() - load_file(tmp_path / where / "model.safetensors").keys() <= tied


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_a_deleted_adapter_leaves_owns_its_memory(tmp_path):
    """A smaller adapter had views of the first one's basis, which is gone."""
    model = of_peft(tiny_llama, "osora", several=True)
    model.set_adapter("second")
    wish = logits(shaken(model), ids := token_ids())
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert shared(model) == [] and torch.equal(logits(model, ids), wish)
    accelerator, model = prepared(model)
    accelerator.save_state(tmp_path)
    shaken(model)
    accelerator.load_state(tmp_path)
    assert torch.equal(logits(model, ids), wish)
