# SPDX-License-Identifier: Apache-2.0
"""What an optimiser gets: the trained parameters, and groups of them with learning rates of their own."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from osora.model.state import adapted_layers, state_of
from osora.model.targets import whole_modules


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, the active adapter's in every layer that it is in, for an optimiser.

    Of OSoRA o and s, of SORSA u, s and v, layer by layer; then those of modules that it trains whole.
    """
    active = state_of(model).active
    own = [parameter for layer in adapted_layers(model).values() for parameter in layer.trained(active)]
    return own + _of_whole(model, active)


def _of_whole(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    found = [parameter for whole in whole_modules(model, adapter).values() for parameter in whole.trained(adapter)]
    return list({id(parameter): parameter for parameter in found}.values())


@dataclass(frozen=True)
class _Part:
    """One trained parameter: its kind, and the singular values that its layer's adapter starts from."""

    kind: str
    layer: str
    adapter: str
    parameter: nn.Parameter
    S0: Tensor


def _of_model(model: nn.Module) -> tuple[list[_Part], list[nn.Parameter]]:
    """Of the active adapter; and the modules that it trains whole."""
    name = state_of(model).active
    parts = [
        _Part(kind, where, name, getattr(layer, kind), layer.basis()[2])
        for where, layer in adapted_layers(model).items()
        for kind in layer.formula(name).trained
    ]
    return parts, _of_whole(model, name)


def _of_peft(model: nn.Module) -> tuple[list[_Part], list[nn.Parameter]]:
    """Of the active adapters; and whatever else is trained."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "trained_kinds")]  # osora.peft's
    parts = [
        _Part(kind, layer.name, name, parameter, layer.basis(name)[2])
        for layer in layers
        for name in layer.active_adapters
        for kind, parameter in layer.trained_kinds(name).items()
    ]
    if not parts:
        raise ValueError("no adapter of osora's is active in this PEFT model")
    inside = {id(part.parameter) for part in parts}
    return parts, [p for p in model.parameters() if p.requires_grad and id(p) not in inside]


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_o: float | None = None,
    lr_s: float | None = None,
    lr_u: float | None = None,
    lr_v: float | None = None,
    weight_decay: float | None = None,
    relative_s: bool = False,
) -> list[dict[str, Any]]:
    """The active adapter's trained parameters in groups with learning rates of their own, for a torch optimiser.

    ``o`` moves scales around 1 and ``s`` singular values of any size, so that one rate hardly suits both
    (docs/method.md, "Two rates, and one direction too many").

    Args:
        model: a model with an adapter, of this package or in PEFT.
        lr: the rate of every kind that has none of its own below.
        lr_o: of o, the change of OSoRA's scales.
        lr_s: of s, the change of the singular values.
        lr_u: of u, the change of SORSA's left vectors.
        lr_v: of v, the change of SORSA's right vectors.
        weight_decay: of all groups; None leaves it to the optimiser. It pulls towards the pretrained model.
        relative_s: each layer's s is a group of its own, whose rate is multiplied by the mean of its singular values:
            Adam, which moves every number by about its rate, then moves those of all layers by the same share.

    Returns:
        Dicts with "params" and "lr", "weight_decay" if given, and "name": the kind, or with relative_s "s" and the
        layer's name. What else is trained (``modules_to_save``, biases with PEFT) is the group "other", at ``lr``.

    Raises:
        ValueError: no adapter; a rate for a kind that the adapter does not train; a negative or infinite number.
        TypeError: what is no number.
    """
    parts, rest = _of_peft(model) if getattr(model, "peft_config", None) else _of_model(model)
    trained = tuple(dict.fromkeys(part.kind for part in parts))
    active = ", ".join(dict.fromkeys(part.adapter for part in parts))
    rates = {"o": lr_o, "s": lr_s, "u": lr_u, "v": lr_v}
    for key, value in {
        "lr": lr,
        "weight_decay": weight_decay,
        **{f"lr_{kind}": r for kind, r in rates.items()},
    }.items():
        if value is None and key != "lr":
            continue
        try:
            usable = not isinstance(value, bool) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
        except TypeError as error:
            raise TypeError(f"{key} must be a number, got {value!r}") from error
        if not usable:
            raise ValueError(f"{key} must be a finite number, at least 0, got {value!r}")
    for kind, rate in rates.items():
        if rate is not None and kind not in trained:
            raise ValueError(f"lr_{kind} is given, but the adapter {active!r} trains {', '.join(trained)} alone")
    if relative_s and "s" not in trained:
        raise ValueError(f"relative_s is given, but the adapter {active!r} trains {', '.join(trained)} alone")
    groups: list[dict[str, Any]] = []
    for kind in trained:
        own = rates[kind]
        rate = lr if own is None else own
        mine = [part for part in parts if part.kind == kind]
        if kind == "s" and relative_s:
            for part in mine:
                mean = float(part.S0.mean())
                groups.append({"params": [part.parameter], "lr": rate * mean, "name": f"s {part.layer}"})
        else:
            groups.append({"params": [part.parameter for part in mine], "lr": rate, "name": kind})
    if rest:
        groups.append({"params": rest, "lr": lr, "name": "other"})
    if weight_decay is not None:
        for group in groups:
            group["weight_decay"] = weight_decay
    return groups


__all__ = ["adapter_parameters", "parameter_groups"]
