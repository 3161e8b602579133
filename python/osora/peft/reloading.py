# SPDX-License-Identifier: Apache-2.0
"""``PeftModel.load_adapter`` over an adapter that is there, as Trainer resumes: in place, and checked as a new one is.

PEFT would read no configuration then, and so nobody would ask whether the file is damaged, or of another base.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from osora.files.evidence import certificate_of, check_bases
from osora.files.format import AdapterError, Description
from osora.layers.formulas import formula_of
from osora.peft.config import AdapterConfig
from osora.peft.layer import AdapterLayer, layers_of
from osora.peft.loading import check_arrived
from osora.peft.rollback import Whole

_HUB = ("subfolder", "revision", "cache_dir", "token")  # what finds a configuration, among load_adapter's options
_BESIDE = ("bias", "modules_to_save", "trainable_token_indices")
_MARK = "_osora_checked"


def _saved(source: Any, options: dict[str, Any]) -> PeftConfig:
    hub = {key: options[key] for key in _HUB if options.get(key) is not None}
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(source, **hub)]
    return kind.from_pretrained(source, **hub)


def _layers(model: Any, name: str) -> dict[str, AdapterLayer]:
    return layers_of(model.base_model.model, name)


def _plain(value: Any) -> Any:
    return (sorted(value) or None) if isinstance(value, list | tuple | set) else value


def _description(saved: Any, config: AdapterConfig, source: Any, name: str) -> Description:
    """What is in the saved adapter, if it can take the place of one of ``config``. Raises AdapterError."""
    if not isinstance(saved, type(config)):
        kinds = [getattr(each.peft_type, "value", each.peft_type) for each in (saved, config)]
        raise AdapterError(f"{source} is an adapter of {kinds[0]}, and {name!r} is one of {kinds[1]}")
    for option in _BESIDE:
        there, here = _plain(getattr(saved, option)), _plain(getattr(config, option))
        if there != here:
            raise AdapterError(f"{source} was trained with {option}={there!r}, and {name!r} has {here!r}")
    description = saved.description()
    if description is None:
        raise AdapterError(f"{source} has no block of osora in its configuration, so that it cannot be checked")
    return description


def _check_fits(
    layers: dict[str, AdapterLayer], name: str, saved: AdapterConfig, description: Description, source: Any
) -> None:
    if differing := sorted(description.modules.keys() ^ layers.keys()):
        raise AdapterError(
            f"{source} is an adapter of other layers than {name!r}: {len(differing)} differ, the first is "
            f"{differing[0]}. Load it under another name"
        )
    formula = formula_of(saved.native())
    for key, layer in layers.items():
        item = description.modules[key]
        theirs = item["out_features"], item["in_features"], item["rank"], formula
        own = layer.out_features, layer.in_features, layer.box("S0")[name].numel(), layer.adapters[name].formula
        if theirs != own:
            raise AdapterError(
                f"{source}: {key} is {theirs} (out_features, in_features, rank, formula), and that of {name!r} is "
                f"{own}. Load it under another name"
            )
        if layer.merged_adapters:
            raise ValueError(f"{key} is merged: call unmerge_adapter() before loading an adapter over {name!r}")
    check_bases([description.modules[key] for key in layers], [layer.base() for layer in layers.values()], stacklevel=6)


@contextmanager
def _replaced(model: PeftModel, name: str, description: Description) -> Iterator[None]:
    """Within it the adapter's tensors are replaced. After it they are those of the file, or what they were."""
    layers = _layers(model, name)
    config: Any = model.peft_config[name]
    embeddings = bool(description.others)
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    state, mode = {key: tensor.detach().clone() for key, tensor in state.items()}, model.training
    before = {key: copy.copy(layer.adapters[name]) for key, layer in layers.items()}
    try:
        for layer in layers.values():
            adapter = layer.adapters[name]
            adapter.awaited, adapter.rebuilt = description, not (description.save_basis and adapter.save_basis)
        config.__dict__["_replacing"] = True
        yield
        for key, layer in layers.items():
            check_arrived(layer, name)
            if not layer.adapters[name].rebuilt:
                layer.adapters[name].certificate = certificate_of(description.modules[key])
    except BaseException:
        for key, layer in layers.items():
            layer.adapters[name] = before[key]
        set_peft_model_state_dict(model, state, adapter_name=name)
        for layer in layers.values():
            layer.share(name)
        model.train(mode)
        raise
    finally:
        config.__dict__.pop("_replacing", None)


def _checked(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model, source, name = given["self"], given["model_id"], given["adapter_name"]
        config = model.peft_config.get(name)
        if config is None:  # new
            with Whole(model, ours=False):
                return load_adapter(*args, **kwargs)
        if not isinstance(config, AdapterConfig) or config.osora is not None:  # waiting for its file
            return load_adapter(*args, **kwargs)
        saved = _saved(source, given.get("kwargs", {}))
        description = _description(saved, config, source, name)
        layers = _layers(model, name)
        _check_fits(layers, name, saved, description, source)  # type: ignore[arg-type]
        with _replaced(model, name, description):
            return load_adapter(*args, **kwargs)

    setattr(load, _MARK, True)
    return load


def check_reloading() -> None:
    """Have ``PeftModel.load_adapter`` do so; adapters of other methods are loaded as before."""
    if not hasattr(PeftModel.load_adapter, _MARK):
        PeftModel.load_adapter = _checked(PeftModel.load_adapter)  # type: ignore[method-assign]


__all__ = ["check_reloading"]
