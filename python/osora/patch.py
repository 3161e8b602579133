# SPDX-License-Identifier: Apache-2.0
"""An adapter's way into a model and out of it: decompose, wrap, freeze; and all of it back."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from osora.config import OsoraConfig
from osora.factors import Decomposition, Unconverged, check_matrix, check_max_memory, decompose, svd_plan
from osora.layers import OsoraLinear, oriented_weight
from osora.spectrum import captured_energy, rank_for_energy
from osora.targets import Target, find_targets

log = logging.getLogger("osora")

_STATE = "_osora"  # attribute of an adapted model
_BATCH_ENTRIES = 2**24  # weight entries decomposed in one call: bounds the factors held at once


@dataclass
class State:
    """What :func:`attach` did to a model: enough to undo it, and to say what it was."""

    config: OsoraConfig
    seconds: float
    required_grad: dict[str, bool]  # parameter name in the model as it came -> requires_grad
    notes: dict[str, str] = field(default_factory=dict)


def state_of(model: nn.Module) -> State:
    """The model's adapter state; raises ValueError if it has no adapter."""
    state = getattr(model, _STATE, None)
    if not isinstance(state, State):
        raise ValueError(
            "this model has no osora adapter: call osora.attach(model, config) or osora.load_adapter first"
        )
    return state


def adapted_layers(model: nn.Module) -> dict[str, OsoraLinear]:
    """Name → adapted layer, in the model's order; a shared layer once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OsoraLinear)}


# -- decompose -------------------------------------------------------------------------------------------------------


def batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, dtype and device together, in batches of bounded size."""
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        weight = oriented_weight(target.module)
        groups[(*weight.shape, target.rank, weight.dtype, weight.device)].append(target)
    for group in groups.values():
        size = max(1, _BATCH_ENTRIES // oriented_weight(group[0].module).numel())
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _check_fits(target: Target, max_memory: int) -> None:
    weight = oriented_weight(target.module)
    plan = svd_plan(weight.shape, target.rank, weight.dtype, weight.device)
    if plan.bytes > max_memory:
        raise ValueError(
            f"{target.name}.weight {list(weight.shape)} takes {plan.bytes} bytes to decompose at rank {target.rank}, "
            f"and max_memory is {max_memory}: allow more, take a smaller r, or leave it out with exclude_modules"
        )


def decompose_targets(
    targets: list[Target],
    config: OsoraConfig,
    *,
    max_memory: int | None,
    unconverged: Unconverged,
    progress: bool | None,
) -> Iterator[tuple[Target, Decomposition]]:
    """Each target with its factors, as they come; a bar on a terminal unless ``progress`` says otherwise."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # slow to import

    check_max_memory(max_memory)
    for target in targets:  # all of them before any work
        check_matrix(oriented_weight(target.module), f"{target.name}.weight")
        if max_memory is not None:
            _check_fits(target, max_memory)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=progress is False, transient=progress is None) as bar:
        if progress is None and not bar.console.is_terminal:
            bar.disable = True
        task = bar.add_task("decomposing", total=len(targets))
        for batch in batches(targets):
            found = decompose(
                [oriented_weight(target.module) for target in batch],
                batch[0].rank,
                names=[target.name for target in batch],
                labels=[f"{target.name}.weight" for target in batch],
                tol=config.tol,
                seed=config.seed,
                max_memory=max_memory,
                unconverged=unconverged,
            )
            for target, factors in zip(batch, found, strict=True):
                yield target, factors
                bar.advance(task)


def _keep_enough(target: Target, factors: Decomposition, fraction: float) -> tuple[Target, Decomposition]:
    """The fewest leading triplets that hold ``fraction`` of the weight's energy, or all of them and a note."""
    energy = captured_energy(factors.S, factors.norm)
    rank = rank_for_energy(energy, fraction)
    if rank is not None:
        return replace(target, rank=rank), factors.leading(rank)
    held = math.floor(float(energy[-1]) * 1e4) / 1e4  # rounded up, it could read as enough
    note = f"rank {target.rank} holds {held} of the energy, rank_for_energy={fraction:g} asks for more"
    return replace(target, note="; ".join(filter(None, (target.note, note)))), factors


# -- in and out ------------------------------------------------------------------------------------------------------


def _replace(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)


def install(model: nn.Module, layers: list[tuple[Target, OsoraLinear]], config: OsoraConfig, seconds: float) -> None:
    """Wrap the targets in their finished layers and freeze everything else."""
    state = State(config, seconds, {name: p.requires_grad for name, p in model.named_parameters()})
    state.notes = {target.name: target.note for target, _ in layers if target.note}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target, layer in layers:
        _replace(model, target.names, layer)
    setattr(model, _STATE, state)
    for name, note in state.notes.items():
        log.info("%s: %s", name, note)


def refuse_if_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model has an adapter already."""
    if getattr(model, _STATE, None) is not None or adapted_layers(model):
        raise ValueError("this model has an osora adapter already: call osora.detach(model) before attaching another")


def attach(
    model: nn.Module,
    config: OsoraConfig | None = None,
    *,
    max_memory: int | None = None,
    unconverged: Unconverged = "warn",
    progress: bool | None = None,
) -> nn.Module:
    """Give ``model`` an OSoRA adapter, in place, and freeze everything else.

    The output is unchanged, bit for bit: the adapter starts as nothing. If anything is wrong with the model or the
    config, an error comes before the model is touched.

    Args:
        model: any ``nn.Module`` with linear layers.
        config: what to adapt; by default every linear layer but the output head, at rank 64.
        max_memory: bytes that a decomposition may take beyond the weights and the factors, None for no limit; see
            :func:`osora.svd_plan`. Fewer weights are in work at the same time if need be.
        unconverged: "warn" or "raise" when a decomposition misses ``config.tol``.
        progress: a progress bar; by default only on a terminal.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no target, a tied weight, NaN in a weight, one that does not fit in max_memory, an adapter already
            there.
        TypeError: a quantised or integer weight.
        osora.ConvergenceError: see ``unconverged``.
    """
    config = OsoraConfig() if config is None else config
    if not isinstance(config, OsoraConfig):
        raise TypeError(f"config must be an OsoraConfig, got {type(config).__name__}")
    refuse_if_adapted(model)
    began = time.perf_counter()
    targets = find_targets(model, config)
    layers = []
    for target, factors in decompose_targets(
        targets, config, max_memory=max_memory, unconverged=unconverged, progress=progress
    ):
        if config.rank_for_energy is not None:
            target, factors = _keep_enough(target, factors, config.rank_for_energy)
        layers.append((target, OsoraLinear(target.module, factors, config.dropout)))
    install(model, layers, config, time.perf_counter() - began)
    return model


def merge_layers(layers: Mapping[str, OsoraLinear]) -> None:
    """Merge all of them or, if one cannot be, none."""
    done: list[OsoraLinear] = []
    for name, layer in layers.items():
        try:
            layer.merge()
        except ValueError as error:
            for earlier in done:
                earlier.unmerge()
            raise ValueError(f"{name}: {error}") from error
        done.append(layer)


def detach(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """Take the adapter off, in place: the very modules and tensors that were there, trainable or not as they were.

    Args:
        model: a model with an adapter, merged or not.
        merged: leave the merged weights in place of the base weights, as a plain model to save or serve.

    Returns:
        ``model`` itself.
    """
    state = state_of(model)
    layers = adapted_layers(model)
    if merged:
        merge_layers({name: layer for name, layer in layers.items() if not layer.merged})
    else:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, OsoraLinear):
            _replace(model, [name], module.base_layer)
    delattr(model, _STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the model is its base, bit for bit (a reference model for DPO, say). Raises ValueError if merged."""
    state_of(model)
    layers = list(adapted_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged: call osora.unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, o and s of every adapted layer, for an optimiser."""
    state_of(model)
    return [parameter for layer in adapted_layers(model).values() for parameter in (layer.o, layer.s)]
