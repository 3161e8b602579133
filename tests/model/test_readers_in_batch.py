# SPDX-License-Identifier: Apache-2.0
"""A batch of several adapters on a model that reads weights: one adapter's weight for all rows, or words."""

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from torch import Tensor, nn

import osora
import osora.peft

pytestmark = pytest.mark.filterwarnings("ignore")  # of these models' own
READERS = ("WavLM", "Mamba", "Jamba", "MobileBert", "Bloom, slow but exact")
CONFIGS = {"osora": osora.OsoraConfig, "sorsa": osora.SorsaConfig}


class Two(nn.Module):
    """A layer that is read and one that is called, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.called = nn.Linear(11, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x @ self.read.weight.t() + self.read.bias)


def shake(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))


def native(make, first=osora.OsoraConfig, second=osora.OsoraConfig) -> nn.Module:
    model = osora.attach(make(), first(r=4), name="a")
    shake(model, 1)
    osora.add_adapter(model, "b", second(r=3))
    osora.set_adapter(model, "b")
    shake(model, 2)
    return model.eval()


def in_peft(make, **options) -> nn.Module:
    model = get_peft_model(make(), osora.peft.OsoraConfig(r=4, **options), adapter_name="a")
    shake(model, 1)
    model.add_adapter("b", osora.peft.OsoraConfig(r=3, **options))
    model.set_adapter("b")
    shake(model, 2)
    return model.eval()


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("api", ["native", "peft"])
def test_one_adapter_for_all_rows_is_that_adapter(api, family):
    run, rows = FAMILIES[family].run, 1 if family == "WavLM" else 2
    model = (native if api == "native" else in_peft)(FAMILIES[family].model)
    with torch.no_grad():
        for name in ("a", "b"):
            osora.set_adapter(model, name) if api == "native" else model.set_adapter(name)
            wish = run(model)
            if api == "native":
                osora.set_adapter(model, "b" if name == "a" else "a")
                with osora.adapters_in_batch(model, [name] * rows):
                    got = run(model)
            else:
                model.set_adapter("b" if name == "a" else "a")
                with osora.peft.batch.rows_of_adapters(model.base_model.model, [name] * rows):
                    got = run(model)
            torch.testing.assert_close(got, wish, rtol=1e-4, atol=1e-4)
            with osora.disabled(model) if api == "native" else model.disable_adapter():
                assert (run(model) - wish).abs().max() > 1e-3


@pytest.mark.parametrize("names", [["a", "b"], ["a", None], [None, "b", "b"], ["b", "a", "a", None]], ids=str)
@pytest.mark.parametrize("second", CONFIGS)
def test_several_adapters_are_refused_by_the_name_of_the_layer(second, names):
    model, x = native(Two, second=CONFIGS[second]), torch.randn(len(names), 11)
    with torch.no_grad(), osora.adapters_in_batch(model, names):
        assert model.read.weight.shape == (7, 11), "what is known of any weight is no secret"
        with pytest.raises(ValueError, match=r"reads read\.weight itself.*one weight cannot be each row's own"):
            model(x)
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("options", [{}, {"bias": "none", "tol": 1e-5}], ids=str)
def test_several_adapters_are_refused_in_peft(options):
    make = FAMILIES["Bloom, slow but exact"].model
    model = in_peft(make, **options)
    ids = torch.randint(3, 60, (2, 5))
    for names in (["a", "b"], ["__base__", "a"]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"reads transformer\.h\.0\..*weight itself"):
            model(ids, adapter_names=names)
    with torch.no_grad():
        base = make()(ids).logits
        torch.testing.assert_close(model(ids, adapter_names=["__base__"] * 2).logits, base)
        model.set_adapter("a")
        torch.testing.assert_close(model(ids, adapter_names=["a"] * 2).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", CONFIGS)
def test_the_base_alone_and_layers_that_an_adapter_is_not_in(first):
    model = osora.attach(Two(), CONFIGS[first](r=4, target_modules=["called"]), name="a")
    shake(model, 1)
    osora.add_adapter(model, "b", osora.OsoraConfig(r=3, target_modules=["read"]))
    x = torch.randn(3, 11)
    with torch.no_grad():
        with osora.adapters_in_batch(model, [None] * 3):
            torch.testing.assert_close(model(x), Two()(x))
        wish = model(x)
        with osora.adapters_in_batch(model, ["a"] * 3):
            torch.testing.assert_close(model(x), wish)
        with osora.adapters_in_batch(model, ["a", "a", "b"]), pytest.raises(ValueError, match="each row's own"):
            model(x)


def test_a_gradient_is_refused_where_a_weight_is_read_too():
    model = osora.attach(Two(), osora.OsoraConfig(r=4, target_modules=["read"]), name="a")
    with osora.adapters_in_batch(model, ["a", "a"]), pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        model(torch.randn(2, 11))


def test_the_adapter_is_taken_as_it_was_on_entry():
    model, x = native(Two), torch.randn(2, 11)
    osora.set_adapter(model, "a")
    with torch.no_grad():
        wish = model(x)
        with osora.adapters_in_batch(model, ["a", "a"]):
            shake(model, 5)
            torch.testing.assert_close(model(x), wish, rtol=1e-5, atol=1e-5)
        assert (model(x) - wish).abs().max() > 1e-2
