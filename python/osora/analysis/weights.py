# SPDX-License-Identifier: Apache-2.0
"""The matrices of a model's linear layers by module name, one at a time: of a model, a checkpoint or a mapping."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.files.base_folder import BaseFolder
from osora.layers import AdaptedLinear
from osora.layers.base_weight import dense_weight, is_conv1d
from osora.layers.quantised import refuse_unsupported
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
        if isinstance(source, nn.Module):
            self._get, what = of_model(source, adapter), "this model has no linear layers"
        elif isinstance(source, Mapping):
            self._get = {name: _given(tensor) for name, tensor in _matrices(source)}
            what = "the mapping holds no matrices named *.weight"
        else:
            folder = BaseFolder(source)
            keys = [(name, key) for name, key in folder.as_in_model().items() if name.endswith(".weight")]
            matrices = [(name, key) for name, key in keys if len(folder.tensors[key].shape) == 2]
            self._get = {module_name(name): partial(folder.tensor, key) for name, key in matrices}
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


def _matrices(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            yield module_name(name), tensor


def module_name(key: str) -> str:
    """The name of the module a tensor belongs to, as in the model without PEFT's wrapper."""
    return key.removesuffix(".weight").removeprefix(_PEFT_PREFIX).replace(".base_layer", "")


# -- models ------------------------------------------------------------------------------------------------------------


def of_model(model: nn.Module, adapter: bool) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {}
    inside: set[nn.Module] = set()
    for name, module in uncompiled(model).named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and _is_linear(base):
            inside.update(module.modules())
            found[module_name(name)] = _adapted(name, module, adapter)
        elif module not in inside and _is_linear(module):
            found[module_name(name)] = _plain(name, module)
    return found


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


__all__ = ["Source", "Weights", "module_name"]
