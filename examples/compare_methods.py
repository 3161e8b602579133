# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: how each is put into a model, what it trains, and at which rates.

Ranks are fixed, not tuned. Methods that train vectors (OSoRA, VeRA) have r = 64 and so d + r numbers a layer; those
that train matrices have r = 8. LoRA also runs at r = 1, which is the nearest that it comes to OSoRA's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import osora

VECTORS, MATRICES, LEAST = 64, 8, 1  # ranks


@dataclass
class Attached:
    """What a method has put into a model."""

    groups: list[dict[str, Any]]  # parameter groups, "lr" a multiple of the rate that is searched
    save: Callable[[Path], None]  # all that a loader needs beside the base model, and nothing it can compute again
    save_all: Callable[[Path], None]  # as the library saves it by default, basis or projections included

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for group in self.groups for parameter in group["params"])


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    label: str
    attach: Callable[[nn.Module, list[str], int], Attached]  # (model, names of the layers, seed)
    rates: tuple[int, ...]  # where the search begins: in half decades, -4 is 1e-2
    settings: dict[str, Any]  # for the record, and to know an old result from one of other settings


# -- osora -------------------------------------------------------------------------------------------------------------


def _osora(**options: Any) -> Callable[[nn.Module, list[str], int], Attached]:
    """OSoRA, or an ablation of it: `o` moves by the rate as it is, `s` by the rate times the layer's mean S0."""

    def attach(model: nn.Module, targets: list[str], seed: int) -> Attached:
        osora.attach(model, osora.OsoraConfig(r=VECTORS, target_modules=targets, tol=1e-4, seed=seed, **options))
        relative = options.get("train") != "o"
        return _saved_by_osora(model, osora.parameter_groups(model, 1.0, relative_s=relative))

    return attach


def _sorsa(model: nn.Module, targets: list[str], seed: int, gamma: float = 1.0) -> Attached:
    """SORSA at one rate for all three, as its authors train it. Its penalty joins each optimiser step by itself."""
    osora.attach(model, osora.SorsaConfig(r=MATRICES, target_modules=targets, tol=1e-4, seed=seed, gamma=gamma))
    return _saved_by_osora(model, osora.parameter_groups(model, 1.0))


def _saved_by_osora(model: nn.Module, groups: list[dict[str, Any]]) -> Attached:
    return Attached(
        groups,
        lambda folder: osora.save_adapter(model, folder, save_basis=False),
        lambda folder: osora.save_adapter(model, folder),
    )


# -- PEFT --------------------------------------------------------------------------------------------------------------


def _peft(config: Callable[[list[str], int], Any]) -> Callable[[nn.Module, list[str], int], Attached]:
    def attach(model: nn.Module, targets: list[str], seed: int) -> Attached:
        import peft

        made = config(targets, seed)
        wrapped = peft.get_peft_model(model, made)  # in place: `model` itself runs the adapter from now on
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def save(folder: Path) -> None:
            projection = getattr(made, "save_projection", None)
            try:
                if projection is not None:
                    made.save_projection = False
                wrapped.save_pretrained(folder)
            finally:
                if projection is not None:
                    made.save_projection = projection

        return Attached([{"params": trained, "lr": 1.0}], save, wrapped.save_pretrained)

    return attach


def _lora(r: int = MATRICES, **options: Any) -> Callable[[nn.Module, list[str], int], Attached]:
    def config(targets: list[str], seed: int) -> Any:
        import peft

        return peft.LoraConfig(r=r, target_modules=targets, **{"lora_alpha": 2 * r, **options})

    return _peft(config)


def _vera(targets: list[str], seed: int) -> Any:
    import peft

    return peft.VeraConfig(r=VECTORS, target_modules=targets, projection_prng_key=seed)


def _nothing(model: nn.Module, targets: list[str], seed: int) -> Attached:
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def refuse(folder: Path) -> None:
        raise ValueError("there is no adapter to save")

    return Attached([], refuse, refuse)


MAIN = ("base", "osora", "sorsa", "lora", "pissa", "dora", "vera")  # without ablations and further ranks
SMALL = (-7, -6, -5, -4)  # 3.2e-4 to 1e-2, for factors of a product
LARGE = (-5, -4, -3, -2)  # 3.2e-3 to 1e-1, for scales around 1
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", "no adapter", _nothing, SMALL, {}),
        Method("osora", "OSoRA", _osora(), LARGE, {"r": VECTORS}),
        Method("sorsa", "SORSA", _sorsa, SMALL, {"r": MATRICES, "gamma": 1.0, "regularizer": "squared"}),
        Method("lora", "LoRA", _lora(), SMALL, {"r": MATRICES, "alpha": 2 * MATRICES}),
        Method("lora1", "LoRA, r = 1", _lora(LEAST), SMALL, {"r": LEAST, "alpha": 2 * LEAST}),
        # alpha = r, as its authors have it: the pair begins as the principal part itself. The SVD is the exact one.
        Method(
            "pissa",
            "PiSSA",
            _lora(init_lora_weights="pissa", lora_alpha=MATRICES),
            SMALL,
            {"r": MATRICES, "alpha": MATRICES, "svd": "exact"},
        ),
        Method("dora", "DoRA", _lora(use_dora=True), SMALL, {"r": MATRICES, "alpha": 2 * MATRICES}),
        Method("vera", "VeRA", _peft(_vera), LARGE, {"r": VECTORS}),
        Method("osora-s", "OSoRA, S only", _osora(train="s"), LARGE, {"r": VECTORS}),
        Method("osora-o", "OSoRA, O only", _osora(train="o"), LARGE, {"r": VECTORS}),
        Method("osora-in", "OSoRA, O on the input", _osora(side="input"), LARGE, {"r": VECTORS}),
    )
}
