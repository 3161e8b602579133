# SPDX-License-Identifier: Apache-2.0
"""From a file into a layer: PEFT fills the tensors, and here they are checked before they are used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from osora.files.evidence import check_rebuilt, check_stored
from osora.files.format import TENSOR_FILE, AdapterError
from osora.files.tensors import check_values

if TYPE_CHECKING:
    from osora.peft.layer import AdapterLayer


def has_arrived(layer: AdapterLayer, name: str) -> bool:
    """Whether anything of the adapter's file has come: until then its changes are NaN, or on the meta device."""
    return any(not t.is_meta and not bool(t.isnan().any()) for t in layer.deltas(name))


def check_arrived(layer: AdapterLayer, name: str) -> None:
    """Raise AdapterError unless the layer's tensors are those of the file that it waits for; then wait no more."""
    adapter = layer.adapters[name]
    description = adapter.awaited
    assert description is not None
    if not has_arrived(layer, name):
        raise AdapterError(
            f"{name!r} waits for the tensors of the adapter that its configuration was read from, and has none for "
            f"{layer.name}, or NaN: load them with PeftModel.from_pretrained, model.load_adapter or "
            "set_peft_model_state_dict. For a fresh adapter with the options of a saved one, set config.osora = None "
            "before get_peft_model"
        )
    method, item = description.method, description.modules[layer.name]
    values, (U, V, S0) = layer.values(name), layer.basis(name)
    came = values if adapter.rebuilt else values | {"U": U, "V": V}
    for kind, tensor in came.items():
        if tensor.is_meta or bool(tensor.isnan().any()):
            raise AdapterError(f"{TENSOR_FILE} lacks {method.key(layer.name, kind)}, or it holds NaN")
    saved = getattr(torch, item["dtype"], None)
    # A cast to fewer digits on the way takes the digests' sense; what was trained is cast from float64 alone.
    if saved == torch.float64 and layer.exact != torch.float64:
        came = {}
    elif saved != U.dtype and U.dtype in (torch.bfloat16, torch.float16):
        came = values
    check_values(description, layer.name, came, TENSOR_FILE)
    if adapter.rebuilt:
        check_rebuilt(item, (U, V, S0), layer.delta_factors(name), S0, adapter.tol)
    else:
        check_stored(item, (U, V, S0), layer.delta_factors(name), S0)
    adapter.awaited = None
    layer.share(name)


def settle(layers: Iterable[AdapterLayer], name: str) -> bool:
    """Check an adapter in all of its layers, if it has come in any. Whether it has; raises AdapterError."""
    waiting = [layer for layer in layers if layer.adapters[name].awaited is not None]
    if not any(has_arrived(layer, name) for layer in waiting):
        return False
    for layer in waiting:
        check_arrived(layer, name)
    return True


__all__ = ["check_arrived", "has_arrived", "settle"]
