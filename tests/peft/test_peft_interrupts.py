# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C anywhere within a call of PEFT's: the model is as it was before, or the call is complete."""

from pathlib import Path

import peft
import pytest
import torch
from interrupts import differing, interrupted, picture, points, shape_of
from peft import PeftModel, get_peft_model
from pefts import layers
from torch import Tensor, nn

import osora
from osora.peft import OsoraConfig, SorsaConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT's, that what was cut off is made a second time
BOTH = (str(Path(osora.__file__).parent), str(Path(peft.__file__).parent))


class Small(nn.Module):
    """Layers of odd sizes, one of them frozen, and one that adapters train whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 3)
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


X = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))


def config(r: int = 3, kind: type = OsoraConfig, **options) -> OsoraConfig:
    return kind(r=r, target_modules=["first", "second"], **options)


def shake(model: nn.Module, step: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(step * torch.ones_like(parameter))
    return model


def two() -> nn.Module:
    model = shake(get_peft_model(Small(), config()))
    model.add_adapter("b", OsoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("b")
    shake(model, 0.2)
    model.set_adapter("default")
    return model.eval()


def equals() -> nn.Module:
    model = shake(get_peft_model(Small(), config()))
    model.add_adapter("b", config())
    return model.eval()


def merged() -> nn.Module:
    model = two()
    model.merge_adapter()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    shake(get_peft_model(Small(), config())).save_pretrained(place / "plain")
    shake(get_peft_model(Small(), config(bias="all"))).save_pretrained(place / "biases")
    shake(get_peft_model(Small(), config(modules_to_save=["head"]))).save_pretrained(place / "head")
    shake(get_peft_model(Small(), config(save_basis=False, tol=1e-4))).save_pretrained(place / "small")
    return place


def state_of(model: nn.Module) -> list:
    found = [sorted(getattr(model, "peft_config", {}))]
    for layer in layers(model):
        parts = layer.adapters, layer.active_adapters, layer.merged_adapters, bool(layer.base_kept)
        waiting = [name for name, adapter in layer.adapters.items() if adapter.awaited is not None]
        found.append((layer.name, list(parts[0]), *parts[1:], waiting))
    return found


CALLS = {
    "get_peft_model": (Small, lambda model, _: get_peft_model(model, config())),
    "get_peft_model, SORSA": (Small, lambda model, _: get_peft_model(model, config(kind=SorsaConfig))),
    "get_peft_model, head": (Small, lambda model, _: get_peft_model(model, config(modules_to_save=["head"]))),
    "from_pretrained": (Small, lambda model, at: PeftModel.from_pretrained(model, at / "plain")),
    "from_pretrained, biases": (Small, lambda model, at: PeftModel.from_pretrained(model, at / "biases")),
    "from_pretrained, head": (Small, lambda model, at: PeftModel.from_pretrained(model, at / "head")),
    "from_pretrained, small": (Small, lambda model, at: PeftModel.from_pretrained(model, at / "small")),
    "from_pretrained, low": (
        Small,
        lambda model, at: PeftModel.from_pretrained(model, at / "plain", low_cpu_mem_usage=True),
    ),
    "add_adapter": (two, lambda model, _: model.add_adapter("c", config(r=2))),
    "load_adapter": (two, lambda model, at: model.load_adapter(at / "plain", "c")),
    "load_adapter, head": (two, lambda model, at: model.load_adapter(at / "head", "c")),
    "load_adapter, over": (two, lambda model, at: model.load_adapter(at / "plain", "default")),
    "delete_adapter": (two, lambda model, _: model.delete_adapter("b")),
    "unmerge_adapter": (merged, lambda model, _: model.unmerge_adapter()),
    "merge_adapter": (two, lambda model, _: model.merge_adapter()),
    "add_weighted_adapter": (
        equals,
        lambda model, _: model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "w"),
    ),
}


@pytest.mark.parametrize("own", [BOTH[:1], BOTH], ids=["osora", "osora and peft"])
@pytest.mark.parametrize("name", CALLS)
def test_all_or_nothing(name, own, folders):
    make, call = CALLS[name]
    if own == BOTH and name in ("delete_adapter", "unmerge_adapter", "add_weighted_adapter"):
        pytest.skip("what PEFT does after ours is PEFT's")
    done = make()
    total, _ = interrupted(lambda: call(done, folders), -1, own)
    wish, wish_state, output = shape_of(done), state_of(done), done(X).detach()
    left = None
    for at in points(total, 61):
        model = make()
        before, state, first = picture(model), state_of(model), model(X).detach()
        _, where = interrupted(lambda model=model: call(model, folders), at, own)
        if state_of(model) == wish_state and shape_of(model) == wish and state != wish_state:
            torch.testing.assert_close(model(X), output)
            continue
        assert state_of(model) == state, (where, at)
        if name == "load_adapter, over":
            assert torch.equal(model(X), first) or torch.equal(model(X), output), (where, at)
        else:
            assert differing(before, picture(model)) == [], (where, at)
            assert torch.equal(model(X), first)
        left = model
    assert left is not None
    call(left, folders)  # what was cut off can be done again
    torch.testing.assert_close(left(X), output)
