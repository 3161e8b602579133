# SPDX-License-Identifier: Apache-2.0
"""osora.parameter_groups: every trained parameter once, each kind at its rate."""

import pytest
import torch
from helpers import tiny_llama, token_ids

import osora
from osora import OsoraConfig, SorsaConfig, adapted_layers


def rates(groups: list[dict]) -> dict[int, float]:
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups), "a parameter is in one group"
    return found


def of(model, kind: str) -> list[int]:
    return [id(getattr(layer, kind)) for layer in adapted_layers(model).values()]


@pytest.mark.parametrize(
    "config, own, wish",
    [
        (OsoraConfig(r=4), {}, {"o": 0.1, "s": 0.1}),
        (OsoraConfig(r=4), {"lr_o": 0.2}, {"o": 0.2, "s": 0.1}),
        (OsoraConfig(r=4), {"lr_s": 0.3, "lr_o": 0.0}, {"o": 0.0, "s": 0.3}),
        (OsoraConfig(r=4, train="s"), {"lr_s": 0.3}, {"s": 0.3}),
        (OsoraConfig(r=4, train="o"), {}, {"o": 0.1}),
        (SorsaConfig(r=4), {"lr_u": 0.2, "lr_s": 0.3, "lr_v": 0.4}, {"u": 0.2, "s": 0.3, "v": 0.4}),
        (SorsaConfig(r=4), {}, {"u": 0.1, "s": 0.1, "v": 0.1}),
    ],
)
def test_rates(config, own, wish):
    model = osora.attach(tiny_llama(), config)
    groups = osora.parameter_groups(model, 0.1, **own)
    found = rates(groups)
    assert set(found) == {id(p) for p in osora.adapter_parameters(model)} and [g["name"] for g in groups] == list(wish)
    assert all(found[parameter] == rate for kind, rate in wish.items() for parameter in of(model, kind))
    assert all("weight_decay" not in group for group in groups)


def test_relative_rates_and_decay():
    model = osora.attach(tiny_llama(), OsoraConfig(r=4))
    groups = osora.parameter_groups(model, 0.1, lr_o=0.5, relative_s=True, weight_decay=0.02)
    found = rates(groups)
    assert set(found) == {id(p) for p in osora.adapter_parameters(model)}
    for name, layer in adapted_layers(model).items():
        assert found[id(layer.o)] == 0.5 and found[id(layer.s)] == pytest.approx(0.1 * float(layer.S0.mean()))
        assert f"s {name}" in [group["name"] for group in groups]
    assert {group["weight_decay"] for group in groups} == {0.02}


def test_of_the_active_adapter_in_its_rank():
    model = osora.attach(tiny_llama(), OsoraConfig(r=6), name="a")
    osora.set_adapter(osora.add_adapter(model, "b", OsoraConfig(r=2, target_modules=["q_proj"])), "b")
    found = rates(osora.parameter_groups(model, 1.0, relative_s=True))
    assert set(found) == {id(p) for p in osora.adapter_parameters(model)}
    for layer in adapted_layers(model).values():
        assert found[id(layer.s)] == pytest.approx(float(layer.S0[:2].mean()))


def test_an_optimiser_moves_each_by_its_rate():
    model, ids = osora.attach(tiny_llama(), SorsaConfig(r=3)), token_ids()
    optimizer = torch.optim.Adam(osora.parameter_groups(model, 1e-3, lr_v=1e-5))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for layer in adapted_layers(model).values():
        for kind, rate in (("u", 1e-3), ("s", 1e-3), ("v", 1e-5)):  # what Adam's first step is, but for its epsilon
            assert float(getattr(layer, kind).detach().abs().median()) == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize(
    "config, arguments, words",
    [
        (OsoraConfig(r=2), {"lr_u": 0.1}, "lr_u is given, but the adapter 'default' trains o, s alone"),
        (OsoraConfig(r=2, train="s"), {"lr_o": 0.1}, "lr_o is given, but the adapter 'default' trains s alone"),
        (OsoraConfig(r=2, train="o"), {"relative_s": True}, "relative_s is given, but .* trains o alone"),
        (SorsaConfig(r=2), {"lr_o": 0.1}, "trains u, s, v alone"),
        (OsoraConfig(r=2), {"lr": -1.0}, "lr must be a finite number, at least 0, got -1.0"),
        (OsoraConfig(r=2), {"lr": True}, "lr must be a finite number, at least 0, got True"),
        (OsoraConfig(r=2), {"lr_s": float("inf")}, "lr_s must be a finite number"),
        (OsoraConfig(r=2), {"weight_decay": float("nan")}, "weight_decay must be a finite number"),
    ],
)
def test_wrong_calls(config, arguments, words):
    model = osora.attach(tiny_llama(), config)
    with pytest.raises(ValueError, match=words):
        osora.parameter_groups(model, **({"lr": 0.1} | arguments))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks for the old name
@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_a_model_of_peft(method):
    """The same groups as the native model's, and everything that is trained is in one."""
    peft = pytest.importorskip("peft")
    import osora.peft

    own = {"lr_s": 0.3} | ({"lr_o": 0.2} if method == "OsoraConfig" else {"lr_v": 0.2})
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    native = osora.attach(tiny_llama(), getattr(osora, method)(**options))
    wish = osora.parameter_groups(native, 0.1, relative_s=True, weight_decay=0.02, **own)
    config = getattr(osora.peft, method)(**options, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama(tied=False), config)
    *groups, other = osora.parameter_groups(model, 0.1, relative_s=True, weight_decay=0.02, **own)

    def told(groups: list[dict]) -> dict[str, tuple]:
        return {g["name"]: (pytest.approx(g["lr"]), g["weight_decay"], [p.shape for p in g["params"]]) for g in groups}

    assert told(groups) == told(wish)
    assert other["name"] == "other" and other["lr"] == 0.1 and len(other["params"]) == 1
    assert set(rates([*groups, other])) == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="no adapter of osora's is active"):
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        osora.parameter_groups(peft.get_peft_model(tiny_llama(), lora), 0.1)


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="no osora adapter"):
        osora.parameter_groups(tiny_llama(), 0.1)


@pytest.mark.parametrize("arguments", [{"lr": None}, {"lr": "0.1"}, {"lr_s": [0.1]}])
def test_what_is_no_number(arguments):
    model = osora.attach(tiny_llama(), OsoraConfig(r=2))
    with pytest.raises(TypeError, match=f"{next(iter(arguments))} must be a number, got"):
        osora.parameter_groups(model, **({"lr": 0.1} | arguments))
