# SPDX-License-Identifier: Apache-2.0
"""How PEFT reads a LoRA's configuration: which of a model's layers it finds, and what it saves beside them.

The rules are those of PEFT 0.18 to 0.21, said here without PEFT: a file is read by other versions than the one that is
installed, or by none. tests/files/test_export_families.py holds them against PEFT itself.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# What PEFT's classes for these tasks train and save whole: modules whose names end so. A file without them is refused.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# PEFT 0.21 takes targets of these names for experts' if the model's kind has experts in one tensor, and leaves out the
# dense layers of the same names. A target that is given as a parameter is left as it is.
_TAKEN_FOR_EXPERTS = frozenset("gate gate_proj up_proj down_proj w1 w2 w3".split())
# PEFT refuses LoRA on these names in these kinds, whose fused kernels read the weight past the layer.
_STATE_SPACE = frozenset("falcon_h1 mamba mamba2 falcon_mamba nemotron_h".split())
_READ_PAST = ("out_proj", "conv1d")


def heads_named_by(task: object) -> tuple[str, ...]:
    """Ends of the names of modules that PEFT saves whole for a task, by its name or PEFT's member of it."""
    return _HEADS.get(str(getattr(task, "value", task)), ())


def heads_of(task: object, names: Iterable[str]) -> list[str]:
    """The modules among ``names`` that PEFT saves whole for a task, without those within others."""
    return saved_whole(heads_named_by(task), names)


def saved_whole(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules among ``names`` that PEFT takes for those of ``modules_to_save``, without those within others.

    It compares ends of the text, and not whole parts: "classifier" is "pre_classifier", too.
    """
    found = [name for name in names if name and name.endswith(tuple(ends))]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def model_options(model: nn.Module) -> dict[str, Any]:
    """A model's configuration as a dict, if it has one of transformers' kind."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return found if isinstance(found, dict) else {}


def _has_experts(options: Mapping[str, Any]) -> bool:
    return any(
        ("expert" in str(key) and value not in (None, 0)) or (isinstance(value, Mapping) and _has_experts(value))
        for key, value in options.items()
    )


def _uneven(names: Iterable[str]) -> bool:
    """Whether some numbered layers have dense projections and others none, as where the others have experts."""
    numbered: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"(.*?\.\d+)\.", name):
            numbered.setdefault(match[1], set()).add(_last(name))
    return len({bool(found & _TAKEN_FOR_EXPERTS) for found in numbered.values()}) > 1


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class Reader:
    """PEFT in front of a model: the model's modules by name, as far as they are known, and its kind."""

    names: tuple[str, ...]
    kind: str | None
    """transformers' ``model_type``."""
    experts: bool
    heads: tuple[str, ...] = ()
    """Modules that are saved whole."""
    read: tuple[str, ...] = ()
    """Layers that the model does not call: it reads their weights, past any LoRA."""

    @classmethod
    def of(
        cls, names: Sequence[str], options: Mapping[str, Any], heads: Sequence[str] = (), read: Iterable[str] = ()
    ) -> "Reader":
        """``options``: the model's ``config.json``, or nothing where it is not known, and the names have to tell."""
        kind = options.get("model_type")
        experts = _has_experts(options) or any("expert" in name for name in names)
        experts = experts or (kind is None and _uneven(names))
        return cls(tuple(names), kind if isinstance(kind, str) else None, experts, tuple(heads), tuple(read))

    def is_parameter(self, name: str) -> bool:
        """Whether a layer can be named to PEFT as a parameter alone: as a module it would be taken for experts."""
        return self.experts and _last(name) in _TAKEN_FOR_EXPERTS

    def targets(self, wanted: Sequence[str]) -> dict[str, Any]:
        """The options by which PEFT finds these layers."""
        parameters = sorted(f"{name}.weight" for name in wanted if self.is_parameter(name))
        modules = sorted(name for name in wanted if not self.is_parameter(name))
        ends_of_others = any("." not in name for name in modules) or self._modules(modules) - set(modules)
        if ends_of_others and not self.experts:  # of an expression PEFT keeps the last names alone where experts are
            return {"target_modules": "|".join(re.escape(name) for name in wanted)}
        return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}

    def _modules(self, targets: str | Sequence[str]) -> set[str]:
        if isinstance(targets, str):
            expression = re.compile(targets)
            return {name for name in self.names if expression.fullmatch(name)}
        ends = tuple(f".{target}" for target in targets)
        return {name for name in self.names if name in targets or name.endswith(ends)}

    def _found(self, config: Mapping[str, Any]) -> set[str]:
        """The layers in which PEFT puts a LoRA by this configuration."""
        targets = config["target_modules"]
        if self.experts:
            if isinstance(targets, str):
                targets = [_last(name) for name in self._modules(targets)]
            targets = [target for target in targets if _last(target) not in _TAKEN_FOR_EXPERTS]
        ends = tuple(f".{parameter}" for parameter in config.get("target_parameters", ()))
        parameters = {name for name in self.names if f".{name}.weight".endswith(ends)} if ends else set()
        inside = tuple(f"{head}." for head in self.heads)
        found = (self._modules(targets) | parameters) - set(self.heads)
        return {name for name in found if not (inside and name.startswith(inside))}

    def check(self, config: Mapping[str, Any], wanted: Sequence[str]) -> None:
        """Raise ValueError unless PEFT puts a LoRA into the ``wanted`` layers by ``config``, and into no other."""
        if self.kind in _STATE_SPACE and (refused := [name for name in wanted if _last(name) in _READ_PAST]):
            raise ValueError(
                f"PEFT refuses a LoRA on {', '.join(_READ_PAST)} of a {self.kind}, whose kernels read the weights past "
                f"the layers: {_some(refused)}. Leave them out when training (exclude_modules), or merge the adapter"
            )
        if dead := [name for name in wanted if name in self.read]:
            raise ValueError(
                f"the model reads the weights of {_some(dead)} itself instead of calling these layers, and a LoRA of "
                "PEFT does nothing there: merge the adapter (osora.merge, osora merge), or leave them out when "
                "training (exclude_modules)"
            )
        found = self._found(config)
        if config["fan_in_fan_out"] and config.get("target_parameters"):
            raise ValueError(
                f"PEFT reads a LoRA on {_some(config['target_parameters'])} for weights stored as [out, in] alone, and "
                "this model has others: merge the adapter instead"
            )
        if dead := sorted(set(wanted) - found):
            raise ValueError(
                f"no configuration of PEFT's finds these layers in this model: {_some(dead)}. Merge the adapter"
            )
        if others := sorted(found - set(wanted)):
            raise ValueError(
                f"PEFT would also put a LoRA into {_some(others)}, whose names end as those of adapted layers do: "
                "merge the adapter instead"
            )


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


__all__ = ["Reader", "heads_named_by", "heads_of", "model_options", "saved_whole"]
