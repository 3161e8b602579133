# SPDX-License-Identifier: Apache-2.0
"""Our methods among PEFT's: a member of its enumeration of methods, and the classes that belong to it."""

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method


def peft_type(name: str) -> PeftType:
    """The member ``name`` of PEFT's enumeration, added if it is not there.

    PEFT has a function to register a method, but takes only names of its own enumeration. A plain string would do for
    ``PeftModel`` of 0.21 alone; transformers asks for ``.value``, and PEFT before for a member.
    """
    try:
        return PeftType(name)
    except ValueError:
        pass
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, config: type[PeftConfig], model: Any) -> None:
    """Make ``name`` (in lower case) a method of PEFT.

    Raises:
        RuntimeError: PEFT has a method of that name that is not ours.
    """
    member = peft_type(name.upper())
    there = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if there is config:
        return
    if there is not None:
        raise RuntimeError(
            f"PEFT has a method {name.upper()} already ({there.__module__}.{there.__qualname__}): osora.peft would "
            "take its place; import one of the two"
        )
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")
