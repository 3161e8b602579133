# SPDX-License-Identifier: Apache-2.0
"""PEFT's model of a task around a model, or the model as it was: PEFT's classes give it the adapter before they ask."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

from osora.model.targets import refuse_wrapped
from osora.peft.config import AdapterConfig
from osora.peft.model import AdapterModel
from osora.peft.rollback import Before

_MARK = "_osora_all_or_nothing"


def _all_or_nothing(made: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(made)

    @functools.wraps(made)
    def __init__(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        around, model, config = (given.arguments[name] for name in ("self", "model", "peft_config"))
        if not isinstance(config, AdapterConfig):
            return made(*args, **kwargs)
        refuse_wrapped(model)
        before, whole = Before(model, biases=False), config.modules_to_save
        whole = None if whole is None else list(whole)
        try:
            made(*args, **kwargs)
        except BaseException:
            tuner = around.__dict__.get("_modules", {}).get("base_model")
            if isinstance(tuner, AdapterModel):
                tuner.take_out(given.arguments["adapter_name"])
                before.restore()
            config.modules_to_save = whole
            raise

    setattr(__init__, _MARK, True)
    return __init__


def wrap_or_leave() -> None:
    """Have the classes of ``get_peft_model`` do so; adapters of other methods are made as before."""
    for kind in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        made = vars(kind).get("__init__")
        if made is not None and not hasattr(made, _MARK):
            kind.__init__ = _all_or_nothing(made)  # type: ignore[misc, method-assign]


__all__ = ["wrap_or_leave"]
