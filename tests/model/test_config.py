# SPDX-License-Identifier: Apache-2.0
"""OsoraConfig: every wrong value and its message, and the way to JSON and back."""

import json
import math
import pickle

import pytest

from osora import OsoraConfig, SorsaConfig

WRONG = [
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"r": -3}, ValueError, "r must be at least 1, got -3"),
    ({"r": 2.0}, TypeError, "r must be an int, got 2.0"),
    ({"r": True}, TypeError, "r must be an int, got True"),
    ({"r": "8"}, TypeError, "r must be an int, got '8'"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63"),
    ({"seed": None}, TypeError, "seed must be an int"),
    ({"dropout": 1.0}, ValueError, "dropout must be in 0 <= p < 1, got 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout must be in"),
    ({"dropout": math.nan}, TypeError, "dropout must be a finite number"),
    ({"dropout": "0.1"}, TypeError, "dropout must be a finite number"),
    ({"tol": 0}, ValueError, "tol must be positive"),
    ({"tol": -1e-3}, ValueError, "tol must be positive"),
    ({"tol": math.inf}, TypeError, "tol must be a finite number"),
    ({"tol": None}, TypeError, "tol must be a finite number"),
    ({"rank_for_energy": 0}, ValueError, "rank_for_energy must be in 0 < p <= 1, got 0.0"),
    ({"rank_for_energy": -0.5}, ValueError, "rank_for_energy must be in"),
    ({"rank_for_energy": 1.01}, ValueError, "rank_for_energy must be in 0 < p <= 1, got 1.01"),
    ({"rank_for_energy": 90}, ValueError, "rank_for_energy must be in"),
    ({"rank_for_energy": math.nan}, TypeError, "rank_for_energy must be a finite number"),
    ({"rank_for_energy": math.inf}, TypeError, "rank_for_energy must be a finite number"),
    ({"rank_for_energy": True}, TypeError, "rank_for_energy must be a finite number, got True"),
    ({"rank_for_energy": "0.9"}, TypeError, "rank_for_energy must be a finite number"),
    ({"target_modules": []}, TypeError, "target_modules must be a regular expression or a non-empty list"),
    ({"target_modules": None}, TypeError, "target_modules must be"),
    ({"target_modules": [1]}, TypeError, "target_modules must be"),
    ({"target_modules": [""]}, TypeError, "target_modules must be"),
    ({"target_modules": "q_proj("}, ValueError, r"target_modules: 'q_proj\(' is not a regular expression"),
    ({"exclude_modules": "*"}, ValueError, "exclude_modules: '\\*' is not a regular expression"),
    ({"exclude_modules": 5}, TypeError, "exclude_modules must be"),
    ({"rank_pattern": [("q", 1)]}, TypeError, "rank_pattern must map module names to ranks"),
    ({"rank_pattern": {5: 1}}, TypeError, "rank_pattern must map module names to ranks, got the name 5"),
    ({"rank_pattern": {"[": 1}}, ValueError, "rank_pattern: '\\[' is not a regular expression"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be at least 1"),
    ({"rank_pattern": {"q_proj": 1.5}}, TypeError, r"rank_pattern\['q_proj'\] must be an int"),
    ({"layers_to_transform": []}, ValueError, "layers_to_transform must not be empty"),
    ({"layers_to_transform": -1}, ValueError, "layers_to_transform must be at least 0"),
    ({"layers_to_transform": [0, "1"]}, TypeError, "layers_to_transform must be an int, got '1'"),
    ({"layers_to_transform": True}, TypeError, "layers_to_transform must be an int, got True"),
    ({"layers_to_transform": 1.5}, TypeError, "layers_to_transform"),
]


@pytest.mark.parametrize("values, error, message", WRONG, ids=[str(values) for values, *_ in WRONG])
def test_a_wrong_value_fails_where_it_is_written(values, error, message):
    with pytest.raises(error, match=message):
        OsoraConfig(**values)


def test_it_cannot_be_changed():
    config = OsoraConfig()
    with pytest.raises(AttributeError):
        config.r = 3
    ranks = {"q_proj": 2}
    config = OsoraConfig(rank_pattern=ranks)
    ranks["q_proj"] = 0
    assert config.rank_pattern == {"q_proj": 2}


EVERY_FIELD = OsoraConfig(
    r=7,
    target_modules=("q_proj", "v_proj"),
    exclude_modules=r".*\.1\..*",
    dropout=0.25,
    tol=1e-5,
    seed=2**62 + 1,
    rank_pattern={"q_proj": 3, r"layers\.\d+\.v_proj": 5},
    layers_to_transform=[2, 0],
    rank_for_energy=0.9,
)


@pytest.mark.parametrize(
    "config", [OsoraConfig(), EVERY_FIELD, OsoraConfig(layers_to_transform=0)], ids=["", "all", "one"]
)
def test_to_json_and_back(config):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert OsoraConfig.from_dict(values) == config
    assert OsoraConfig.from_dict(values).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == config


def test_rank_for_energy_in_json():
    """All of it is a share too; and a config from before there was the field has none."""
    assert OsoraConfig(rank_for_energy=1).to_dict()["rank_for_energy"] == 1.0
    old = OsoraConfig(r=3).to_dict()
    assert old.pop("rank_for_energy") is None
    assert OsoraConfig.from_dict(old) == OsoraConfig(r=3)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"no field lora_alpha, rank; it has .*\br\b"):
        OsoraConfig.from_dict({"rank": 4, "lora_alpha": 8})


def test_names_may_be_a_set():
    """PEFT takes one; the order of a set changes from process to process, that of the config must not."""
    assert OsoraConfig(target_modules={"b", "a"}).target_modules == ("a", "b")


def test_rank_for():
    config = OsoraConfig(r=9, rank_pattern={"q_proj": 1, r"layers\.1\..*": 2, r"model\.layers\.0\.mlp\.up_proj": 3})
    assert config.rank_for("model.layers.0.self_attn.q_proj") == 1
    assert config.rank_for("model.layers.1.self_attn.q_proj") == 1, "the first pattern that matches"
    assert config.rank_for("model.layers.1.mlp.up_proj") == 2
    assert config.rank_for("model.layers.0.mlp.up_proj") == 3
    assert config.rank_for("q_proj") == 1
    for name in ("model.layers.0.mlp.gate_proj", "model.eq_proj", "model.layers.11.k_proj"):
        assert config.rank_for(name) == 9, name


@pytest.mark.parametrize(
    "value", ["ALL-LINEAR", "All-Linear", ["all-linear"], ("all-linear",), ["ALL-LINEAR"]], ids=str
)
@pytest.mark.parametrize("kind", [OsoraConfig, SorsaConfig])
def test_all_linear_as_people_write_it(kind, value):
    assert kind(target_modules=value).target_modules == "all-linear"
    assert kind(target_modules=["all-linear", "head"]).target_modules == ("all-linear", "head")
