# SPDX-License-Identifier: Apache-2.0
"""PEFT's calls that make or load an adapter, complete or without a trace: PEFT's classes change a model as they go."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from torch import nn

from osora.model.targets import refuse_wrapped
from osora.peft.config import AdapterConfig
from osora.peft.rollback import Whole

_MARK = "_osora_all_or_nothing"


def _all_or_nothing(made: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(made)

    @functools.wraps(made)
    def __init__(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model, config = given.arguments["model"], given.arguments["peft_config"]
        if not isinstance(config, AdapterConfig):
            return made(*args, **kwargs)
        refuse_wrapped(model)
        with Whole(model, others=(config,)):
            made(*args, **kwargs)

    setattr(__init__, _MARK, True)
    return __init__


def _added(add_adapter: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(add_adapter)

    @functools.wraps(add_adapter)
    def add(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        config = given["peft_config"]
        if not isinstance(config, AdapterConfig):
            return add_adapter(*args, **kwargs)
        with Whole(given["self"], others=(config,)):
            add_adapter(*args, **kwargs)

    setattr(add, _MARK, True)
    return add


def _loaded(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(from_pretrained)

    @functools.wraps(from_pretrained)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model, config = given["model"], given.get("config")
        if not isinstance(model, nn.Module):
            return from_pretrained(*args, **kwargs)
        with Whole(model, others=() if config is None else (config,), ours=False):
            return from_pretrained(*args, **kwargs)

    setattr(load, _MARK, True)
    return load


def wrap_or_leave() -> None:
    """Have the classes of ``get_peft_model`` do so; adapters of other methods are made as before."""
    kind: Any
    for kind in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        made, added = vars(kind).get("__init__"), vars(kind).get("add_adapter")
        if made is not None and not hasattr(made, _MARK):
            kind.__init__ = _all_or_nothing(made)
        if added is not None and not hasattr(added, _MARK):
            kind.add_adapter = _added(added)
    loaded = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if not hasattr(loaded, _MARK):
        PeftModel.from_pretrained = classmethod(_loaded(loaded))  # type: ignore[assignment, method-assign]


__all__ = ["wrap_or_leave"]
