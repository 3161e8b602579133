# SPDX-License-Identifier: Apache-2.0
"""Which subclasses of Linear compute what Linear does, is found by trying them; their forward stays theirs."""

import copy
import logging

import pytest
import torch
from helpers import move_adapter
from torch import Tensor, nn

import osora
from osora.layers.subclasses import has_own_forward, is_linear_subclass


class Same(nn.Linear):
    """In other words, and with other bits."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class NoForward(nn.Linear):
    extra = 3


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class InTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Wants(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


class More(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Buffered(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))


class Flat(nn.Linear):
    """A matrix alone, not a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())


class Rows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


LIKE, UNLIKE = (Same, NoForward), (Scaled, InTraining, Pair, Wants, More, Buffered, Flat, Rows)


@pytest.mark.parametrize("kind", LIKE + UNLIKE)
def test_the_rule(kind):
    layer = kind(7, 5)
    before = copy.deepcopy(layer.state_dict())
    assert is_linear_subclass(layer) == (kind in LIKE)
    assert is_linear_subclass(kind(3, 4).to(torch.bfloat16)) == (kind in LIKE), "the answer is the class's"
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert has_own_forward(layer) == (kind not in (NoForward, Buffered))
    with torch.device("meta"):
        assert is_linear_subclass(type(kind.__name__, (kind,), {})(3, 4)) == (kind in LIKE)


def test_linear_itself_is_no_subclass():
    assert not is_linear_subclass(nn.Linear(2, 2)) and not has_own_forward(nn.Linear(2, 2))
    out = nn.MultiheadAttention(4, 2).out_proj
    assert not is_linear_subclass(out), "its weight is read, and it is never called"


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.odd = nn.Linear(6, 7), kind(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.first(x))
        return y[0] if isinstance(y, tuple) else y


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("config", [osora.OsoraConfig(r=3), osora.SorsaConfig(r=3, gamma=0)])
def test_a_harmless_one_is_adapted_and_keeps_its_bits(kind, config, tmp_path):
    base = Net(kind)
    model = osora.attach(Net(kind), config)
    assert list(osora.adapted_layers(model)) == ["first", "odd"]
    assert torch.equal(model(X), base(X)), "its own forward gives the base's part"
    move_adapter(model, 0.1)
    y = model(X)
    W = base.odd.weight + osora.adapted_layers(model)["odd"].delta_weight()
    x = nn.functional.linear(
        X, base.first.weight + osora.adapted_layers(model)["first"].delta_weight(), base.first.bias
    )
    torch.testing.assert_close(y, nn.functional.linear(x, W, base.odd.bias))
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in osora.adapter_parameters(model))
    osora.save_adapter(model, tmp_path)
    assert torch.equal(osora.load_adapter(Net(kind), tmp_path)(X), y)
    osora.merge(model)
    torch.testing.assert_close(model(X), y)
    osora.unmerge(model)
    assert torch.equal(osora.detach(model)(X), base(X))


@pytest.mark.parametrize("kind", [Scaled, Pair, More])
def test_another_is_left_out_in_words_and_refused_by_name(kind, caplog):
    with caplog.at_level(logging.INFO, "osora"):
        model = osora.attach(Net(kind), osora.OsoraConfig(r=3))
    assert list(osora.adapted_layers(model)) == ["first"]
    assert f"odd is left out: it is a {__name__}.{kind.__name__}, which does not compute" in caplog.text
    with pytest.raises(ValueError, match=f"target odd is a .*{kind.__name__}; osora adapts"):
        osora.attach(Net(kind), osora.OsoraConfig(r=3, target_modules=["odd", "first"]))


@pytest.mark.parametrize("kind", [Scaled, Pair, More])
def test_so_it_is_through_peft(kind, caplog):
    peft = pytest.importorskip("peft")
    from osora.peft import OsoraConfig

    with caplog.at_level(logging.INFO, "osora"):
        adapted = peft.get_peft_model(Net(kind), OsoraConfig(r=3))
    assert [n for n, _ in adapted.named_modules() if n.endswith("base_layer")] == ["base_model.model.first.base_layer"]
    assert "odd is left out" in caplog.text
    with pytest.raises(ValueError, match=f"target odd is a .*{kind.__name__}; osora adapts"):
        peft.get_peft_model(Net(kind), OsoraConfig(r=3, target_modules=["odd", "first"]))
