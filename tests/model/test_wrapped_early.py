# SPDX-License-Identifier: Apache-2.0
"""Adapters that come when DistributedDataParallel has taken stock of the parameters: refused, and nothing changed."""

import copy

import pytest
import torch
from helpers import tiny_llama
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import osora

CONFIG = osora.OsoraConfig(r=3)


@pytest.fixture(autouse=True)
def alone(tmp_path):
    """A process group of this process."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrapped() -> DistributedDataParallel:
    model = osora.attach(tiny_llama(), CONFIG)
    osora.add_adapter(model, "b")
    return DistributedDataParallel(model)


@pytest.mark.parametrize("use", ["attach", "add", "set", "load"])
def test_it_is_refused_with_the_cure(tmp_path, use):
    osora.save_adapter(osora.attach(tiny_llama(), CONFIG), tmp_path / "adapter")
    model = DistributedDataParallel(tiny_llama()) if use == "attach" else wrapped()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"DistributedDataParallel, which knows.*Give model\.module its adapter"):
        {
            "attach": lambda: osora.attach(model, CONFIG),
            "add": lambda: osora.add_adapter(model, "c"),
            "set": lambda: osora.set_adapter(model, "b"),
            "load": lambda: osora.load_adapter(model, tmp_path / "adapter", name="c"),
        }[use]()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    if use != "attach":
        assert osora.adapter_names(model) == ["default", "b"] and osora.active_adapter(model) == "default"
        osora.set_adapter(model, "default")  # which it is
        osora.save_adapter(model, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_refuses_it_too():
    peft = pytest.importorskip("peft")
    from osora.peft import OsoraConfig

    model, config = DistributedDataParallel(tiny_llama()), OsoraConfig(r=3, target_modules="all-linear")
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"this is a DistributedDataParallel.*Give model\.module its adapter"):
        peft.get_peft_model(model, copy.deepcopy(config))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    adapted = peft.get_peft_model(model.module, copy.deepcopy(config))
    ids = torch.arange(6).view(2, 3)
    DistributedDataParallel(adapted)(input_ids=ids, labels=ids).loss.backward()
