# SPDX-License-Identifier: Apache-2.0
"""At the first step of an optimiser, an adapter that no gradient has reached is named, once."""

import gc
import logging
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import osora
import osora.peft


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.used(x))


def adapted(api: str, method: str = "osora") -> nn.Module:
    kind = {"osora": "OsoraConfig", "sorsa": "SorsaConfig"}[method]
    if api == "native":
        return osora.attach(Partial(), getattr(osora, kind)(r=2))
    return get_peft_model(Partial(), getattr(osora.peft, kind)(r=2, target_modules=["used", "idle", "other"]))


def told(caplog) -> list[str]:
    return [record.message for record in caplog.records if "no gradient" in record.message]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("method", ["osora", "sorsa"])
@pytest.mark.parametrize("api", ["native", "peft"])
def test_what_trains_nothing_is_named_once(api, method, caplog):
    caplog.set_level(logging.WARNING, logger="osora")
    model = adapted(api, method)
    optimizer = sgd(model)
    optimizer.step()  # without a backward: nothing is known yet
    assert told(caplog) == []
    for _ in range(3):
        step(model, optimizer)
    (message,) = told(caplog)
    assert message.startswith("no gradient has reached the adapter of idle before the first step.")
    assert "exclude_modules" in message


def test_nothing_is_said_where_all_is_reached(caplog):
    caplog.set_level(logging.WARNING, logger="osora")
    model = adapted("native")
    model.forward = lambda x: model.idle(Partial.forward(model, x))
    step(model, sgd(model))
    assert told(caplog) == []


def test_a_part_that_is_frozen_is_not_missed(caplog):
    caplog.set_level(logging.WARNING, logger="osora")
    model = osora.attach(Partial(), osora.OsoraConfig(r=2, train="s"))
    model.idle.requires_grad_(False)
    step(model, sgd(model))
    assert told(caplog) == [], "o is not trained, and idle is in no optimiser"


def test_another_optimisers_step_says_nothing(caplog):
    caplog.set_level(logging.WARNING, logger="osora")
    model, other = adapted("native"), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert told(caplog) == []
    step(model, sgd(model))
    assert len(told(caplog)) == 1


def test_a_model_lives_no_longer_for_being_watched():
    model = adapted("native")
    gone = weakref.ref(model.used)
    del model
    gc.collect()
    assert gone() is None
    other = nn.Linear(3, 3)  # and what was known of it hurts nobody
    other(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1e-3).step()
