# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C anywhere within a call: the model is as it was before, or the call is complete."""

import pytest
import torch
from interrupts import differing, interrupted, picture, points, shape_of
from torch import Tensor, nn

import osora
from osora import OsoraConfig, SorsaConfig
from osora.model.state import all_layers


class Small(nn.Module):
    """Layers of odd sizes, one under two names, one frozen, and one that no adapter is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(5, 3)
        self.again = self.first
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.again(self.first(x))))


X = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
CONFIGS = {"osora": OsoraConfig, "sorsa": SorsaConfig}


def config(method: str = "osora", r: int = 3) -> OsoraConfig | SorsaConfig:
    return CONFIGS[method](r=r, target_modules=["first", "second"])


def shake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.add_(0.1 * torch.ones_like(parameter))
    return model


def one(method: str = "osora") -> nn.Module:
    return shake(osora.attach(Small(), config(method)))


def two(method: str = "osora") -> nn.Module:
    """The second one is in a layer of its own, too."""
    model = osora.add_adapter(one(method), "b", OsoraConfig(r=2, target_modules=["first", "head"]))
    return osora.set_execution(model, "split", together=True)


def state_of(model: nn.Module) -> tuple:
    if not hasattr(model, "_osora"):
        return (len(all_layers(model)),)
    merged = tuple(layer.merged for layer in all_layers(model).values())
    active = tuple(layer.adapter for layer in all_layers(model).values())
    names = tuple(tuple(layer.adapters()) for layer in all_layers(model).values())
    return osora.adapter_names(model), osora.active_adapter(model), merged, active, names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "adapter"
    osora.save_adapter(shake(osora.attach(Small(), config(r=4))), place)
    return place


CALLS = {
    "attach": (Small, lambda model, _: osora.attach(model, config())),
    "attach SORSA": (Small, lambda model, _: osora.attach(model, config("sorsa"))),
    "load_adapter": (Small, lambda model, folder: osora.load_adapter(model, folder)),
    "load_adapter beside": (two, lambda model, folder: osora.load_adapter(model, folder, name="c")),
    "add_adapter": (two, lambda model, _: osora.add_adapter(model, "c", OsoraConfig(r=2, target_modules=["first"]))),
    "set_adapter": (two, lambda model, _: osora.set_adapter(model, "b")),
    "set_adapter SORSA": (lambda: two("sorsa"), lambda model, _: osora.set_adapter(model, "b")),
    "remove_adapter": (two, lambda model, _: osora.remove_adapter(model, "b")),
    "merge": (two, lambda model, _: osora.merge(model)),
    "unmerge": (lambda: osora.merge(two()), lambda model, _: osora.unmerge(model)),
    "detach": (two, lambda model, _: osora.detach(model)),
    "detach merged": (two, lambda model, _: osora.detach(model, merged=True)),
    "detach a merged one": (lambda: osora.merge(two()), lambda model, _: osora.detach(model)),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_or_nothing(name, folder):
    make, call = CALLS[name]
    done = make()
    total, _ = interrupted(lambda: call(done, folder), -1)
    wish, wish_state, output = shape_of(done), state_of(done), done(X).detach()
    left = None
    for at in points(total, 61):
        model = make()
        before, state, first = picture(model), state_of(model), model(X).detach()
        _, where = interrupted(lambda model=model: call(model, folder), at)
        assert where or at > total // 2, "some lines run once in a process"
        if state_of(model) == wish_state and shape_of(model) == wish and state != wish_state:
            torch.testing.assert_close(model(X), output)
            continue
        assert state_of(model) == state and differing(before, picture(model)) == [], (where, at)
        assert torch.equal(model(X), first)
        left = model
    assert left is not None
    call(left, folder)  # what was cut off can be done again
    torch.testing.assert_close(left(X), output)


def test_an_adapter_that_has_lost_a_layer_is_not_saved(tmp_path):
    model = two()
    model.first.remove_adapter("b")
    with pytest.raises(ValueError, match="'b' was put into first, which has it no more"):
        osora.save_adapter(model, tmp_path / "adapter", name="b")
    assert not (tmp_path / "adapter").exists()
    osora.save_adapter(model, tmp_path / "adapter")
    model.second = nn.Linear(7, 5)
    with pytest.raises(ValueError, match="'default' was put into second"):
        osora.save_adapter(model, tmp_path / "other")


def test_a_model_that_has_lost_whole_parts_is_saved(tmp_path):
    model = osora.attach(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), OsoraConfig(r=2))
    del model[2]
    osora.save_adapter(model, tmp_path)
    osora.load_adapter(nn.Sequential(*(module.base_layer for module in model)), tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_is_always_held_by_someone(kind):
    """A layer's own merge, without the model's call around it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from quantise import quantised_linear

    def make() -> nn.Module:
        model = nn.Sequential(quantised_linear(nn.Linear(128, 96), kind)).eval()
        return shake(osora.attach(model, OsoraConfig(r=3)))

    done = make()
    total, _ = interrupted(lambda: done[0].merge(requantize=True), -1)
    for at in points(total, 200):
        model = make()
        layer, own = model[0], model[0].base_layer.weight
        interrupted(lambda layer=layer: layer.merge(requantize=True), at)
        if layer.base_layer.weight is not own:
            assert layer.merged, at
        if layer.merged:
            layer.unmerge()
        assert layer.base_layer.weight is own
