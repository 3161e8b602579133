# SPDX-License-Identifier: Apache-2.0
"""Options that PEFT's other configurations have and ours do not: refused by name, with what to use instead."""

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

_SCALE = "OSoRA learns its scale (o and s), SorsaConfig has alpha"
_INSTEAD = {
    "alpha": "OSoRA learns its scale (o and s); SorsaConfig has it",
    "alpha_pattern": f"{_SCALE}; ranks of single layers are set by rank_pattern",
    "ensure_weight_tying": "tied weights are no targets, so that no tie can be lost; trainable_token_indices keeps the "
    "tie of embedding and head by itself",
    "fan_in_fan_out": "how a layer stores its weight is seen from the layer: leave it out",
    "init_lora_weights": "init_weights=False starts from random changes; the basis is always the base's SVD",
    "layer_replication": "replicate the layers of the base model first",
    "lora_alpha": _SCALE,
    "lora_bias": 'use bias="all", or "osora_only" ("sorsa_only")',
    "lora_dropout": "use dropout",
    "loftq_config": "quantise the base with bitsandbytes, and attach to that",
    "module_dropout": "use dropout",
    "random_seed": "use seed",
    "projection_prng_key": "use seed",
    "target_parameters": "parameters that are no linear layer's weight, as those of experts, are not adapted: name "
    "linear layers in target_modules",
    "train": "SORSA trains all of u, s and v",
    "side": "of OSoRA's O alone",
    "initial_o": "of OSoRA's O alone",
    "gamma": "OSoRA's basis is fixed and needs no penalty; SorsaConfig has it",
    "regularizer": "OSoRA's basis is fixed and needs no penalty; SorsaConfig has it",
    "use_dora": "OSoRA scales each output by o already",
    "use_rslora": _SCALE,
}
_OFF: tuple[Any, ...] = (None, False, "", (), [], {}, set())
Class = TypeVar("Class", bound=type)


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_off(each) for each in value.values())
    return any(value is off or (type(value) is type(off) and value == off) for off in _OFF)


def _owner(option: str) -> str | None:
    """A configuration of PEFT's that has the option, LoRA's if it does."""
    found = [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values() if option in {field.name for field in fields(kind)}]
    names = [kind.__name__ for kind in found]
    return "LoraConfig" if "LoraConfig" in names else next(iter(names), None)


def _refusal(kind: type, option: str, own: list[str]) -> TypeError:
    hint = _INSTEAD.get(option)
    if owner := _owner(option):
        return TypeError(
            f"{kind.__name__} has no option {option!r}, which is {owner}'s: {hint or 'nothing here corresponds to it'}"
        )
    near = difflib.get_close_matches(option, own, n=1)
    # the words by which PEFT knows an option of another version, which it leaves out of a file with a warning
    return TypeError(
        f"{kind.__name__}.__init__() got an unexpected keyword argument {option!r}: "
        + (f"did you mean {near[0]!r}? " if near else "")
        + f"Its options are {', '.join(sorted(own))}"
    )


def knows_its_options(kind: Class) -> Class:
    """Of a dataclass: an option that it does not have is an error that names it, unless it is of PEFT, and off."""
    own = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    made: Callable[..., None] = vars(kind)["__init__"]

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        for option in [name for name in options if name not in own]:
            if not (_owner(option) and _is_off(options[option])):
                raise _refusal(kind, option, own)
            del options[option]
        made(self, *args, **options)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


__all__ = ["knows_its_options"]
