# SPDX-License-Identifier: Apache-2.0
"""The matrices of a model's linear layers by module name, one at a time: of a model, a checkpoint or a mapping."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.files.base_folder import BaseFolder
from osora.layers import AdaptedLinear
from osora.layers.base_weight import dense_weight, is_conv1d
from osora.layers.quantised import refuse_unsupported
from osora.layers.whole_module import WholeModule
from osora.model.targets import uncompiled

Source = nn.Module | Mapping[str, Tensor] | str | Path
"""A model, with an adapter or without; tensors by name, as of ``state_dict()``; or the folder of a saved model."""

_PEFT_PREFIX = "base_model.model."


class Weights(Mapping[str, Tensor]):
    """Module name → matrix as it is stored, [out_features, in_features] (Conv1D: [in, out]); read when it is asked for.

    Of a model it is what the layers compute with now: with the active adapter, where there is one, merged or not.
    """

    def __init__(self, source: Source, *, adapter: bool = True) -> None:
        """``adapter=False`` takes the base weights of an adapted model. Raises ValueError where nothing is found."""
        self.note = ""  # of a folder: why transformers could not be asked for the names in the model
        self.needed: frozenset[str] = frozenset()  # a model's own layers; a folder has other matrices, too
        if isinstance(source, nn.Module):
            self._get, what = of_model(source, adapter), "this model has no linear layers"
            self.needed = frozenset(self._get) - _tied(source)
        elif isinstance(source, Mapping):
            names = module_names(source)
            self._get = {names[key]: _given(t) for key, t in source.items() if key in names and t.dim() == 2}
            what = "the mapping holds no matrices named *.weight"
        else:
            folder = BaseFolder(source)
            in_model, self.note = folder.as_in_model(), folder.rules.note
            names = module_names(in_model)
            matrices = [(name, key) for name, key in in_model.items() if name in names]
            matrices = [(name, key) for name, key in matrices if len(folder.tensors[key].shape) == 2]
            self._get = {names[name]: partial(folder.tensor, key) for name, key in matrices}
            what = f"{source} holds no matrices named *.weight"
        if not self._get:
            raise ValueError(what)

    def __getitem__(self, name: str) -> Tensor:
        """The matrix, detached; float32 at least where an adapter is added."""
        return self._get[name]()

    def __iter__(self) -> Iterator[str]:
        """Names in the source's order."""
        return iter(self._get)

    def __len__(self) -> int:
        return len(self._get)


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach()


# What stands beside the base layer within a layer with an adapter, by the names that osora and PEFT give it.
_ADAPTERS = re.compile(
    r"(U|V|S0|o|s|u|v|\w*(?:lora|osora|sorsa|vera|oft|ia3|hada|lokr|hra|shira|miss|road)_\w*|copy@[^.]*)(\.|$)"
)


def module_names(keys: Iterable[str]) -> dict[str, str]:
    """Tensor → its module's name as in the model without adapters, of the tensors named ``*.weight``.

    ``base_layer`` is left out where an adapter is beside it, and not where a model has a module of that name.

    Raises:
        ValueError: two tensors would be of one module.
    """
    given = list(keys)
    keys = [key.removeprefix(_PEFT_PREFIX) for key in given]
    adapted = {
        f"{key[: dot.end()]}base_layer."
        for key in keys
        for dot in re.finditer(r"\.", key)
        if _ADAPTERS.match(key, dot.end())
    }
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key, whole in zip(keys, given, strict=True):
        if not key.endswith(".weight"):
            continue
        parts, plain = key.split("."), list[str]()
        for i, part in enumerate(parts):
            if part != "base_layer" or ".".join(parts[: i + 1]) + "." not in adapted:
                plain.append(part)
        name = ".".join(plain).removesuffix(".weight")
        if name in taken:
            raise ValueError(f"{taken[name]} and {whole} are both the weight of {name}: give one of them")
        found[whole], taken[name] = name, whole
    return found


# -- models ------------------------------------------------------------------------------------------------------------


def of_model(model: nn.Module, adapter: bool) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {}
    inside: set[nn.Module] = set()
    for name, module in uncompiled(model).named_modules():
        plain = name.removeprefix(_PEFT_PREFIX)
        if isinstance(module, WholeModule):
            answering = module.answering() if adapter else module.base_layer
            inside.update(module.modules())
            for part, inner in answering.named_modules():
                if _is_linear(inner):
                    found[f"{plain}.{part}" if part else plain] = _plain(name, inner)
        elif _has_adapter(module) and _is_linear(module.base_layer):
            inside.update(module.modules())
            found[plain] = _adapted(name, module, adapter)
        elif module not in inside and _is_linear(module):
            found[plain] = _plain(name, module)
    return found


def _has_adapter(module: Any) -> bool:
    """Whether it is a layer of ours or of PEFT's around its base, and no module that has one named so."""
    return isinstance(module, AdaptedLinear) or (hasattr(module, "base_layer") and hasattr(module, "get_base_layer"))


def _tied(model: nn.Module) -> set[str]:
    """Linear layers with an embedding's weight, which a checkpoint has once, by the embedding's name."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name.removeprefix(_PEFT_PREFIX)
        for name, module in uncompiled(model).named_modules()
        if _is_linear(module) and id(module.weight) in embeddings
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _plain(name: str, module: nn.Module) -> Callable[[], Tensor]:
    def get() -> Tensor:
        refuse_unsupported(name, module)
        return _as_stored(module, dense_weight(module).detach())

    return get


def _as_stored(module: Any, weight: Tensor) -> Tensor:
    """The matrix [out, in] in the form that a checkpoint has it, so that any two sources can be compared."""
    return weight.t() if is_conv1d(module) else weight


def _adapted(name: str, module: Any, adapter: bool) -> Callable[[], Tensor]:
    """Of our layers, and of PEFT's whose adapters are a sum."""

    def oriented() -> Tensor:
        if isinstance(module, AdaptedLinear):
            if not adapter or not module.enabled or module.adapter is None:
                return module.kept_weight().detach() if module.merged else dense_weight(module.base_layer).detach()
            if module.merged:
                return dense_weight(module.base_layer).detach()
            delta = module.delta_weight()
            return dense_weight(module.base_layer).detach().to(delta.dtype) + delta
        return _of_peft(name, module, adapter)

    return lambda: _as_stored(module.base_layer, oriented())


@torch.no_grad()
def _of_peft(name: str, module: Any, adapter: bool) -> Tensor:
    if getattr(module, "use_dora", None) and any(module.use_dora.values()):
        raise ValueError(f"{name} has a DoRA adapter, which is no sum: merge it, and give the merged model")
    if not hasattr(module, "get_delta_weight"):
        raise TypeError(f"{name} is a {type(module).__qualname__}, which has no get_delta_weight: give a merged model")
    active = [each for each in module.active_adapters if each in module._get_available_adapters()]
    if module.merged and not adapter:
        raise ValueError(f"{name}: the adapter is merged into the base weight: unmerge it first")
    if module.merged or not adapter or module.disable_adapters or not active:
        return dense_weight(module.base_layer).detach()
    deltas = [module.get_delta_weight(each) for each in active]
    weight = dense_weight(module.base_layer).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    oriented = [delta.t() if is_conv1d(module.base_layer) else delta for delta in deltas]
    return sum((delta.to(weight.dtype) for delta in oriented), weight)


__all__ = ["Source", "Weights", "module_names"]
