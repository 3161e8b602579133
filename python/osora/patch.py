# SPDX-License-Identifier: Apache-2.0
"""An adapter's way into a model and out of it: decompose, wrap, freeze; and all of it back."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from osora.adapted import DEFAULT, AdaptedLinear
from osora.bases import base_weight, dense_weight, is_quantised, oriented_weight
from osora.config import AdapterConfig, OsoraConfig, SorsaConfig
from osora.factors import Decomposition, Unconverged, check_matrix, check_max_memory, decompose, svd_plan
from osora.formulas import formula_of
from osora.layers import make_layer
from osora.quantised import allow_packing, keep_order
from osora.regularizer import Penalty
from osora.spectrum import captured_energy, rank_for_energy
from osora.targets import Target, find_targets, uncompiled

log = logging.getLogger("osora")

_STATE = "_osora"  # attribute of an adapted model
_BATCH_ENTRIES = 2**24  # weight entries decomposed in one call: bounds the factors held at once


@dataclass
class AdapterState:
    """What one adapter was asked to be, and what came of it."""

    config: AdapterConfig
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)  # module name -> what is worth a line
    penalty: Penalty | None = None  # of SORSA, as long as the adapter is there

    def begin(self, model: nn.Module, name: str) -> None:
        """The adapter is in the model from now on: say what is worth a line, and penalise what is to be penalised."""
        if isinstance(self.config, SorsaConfig):
            layers = list(adapted_layers(model, name).values())
            self.penalty = Penalty(layers, name, self.config.gamma, self.config.regularizer)
        for module, note in self.notes.items():
            log.info("%s: %s", module, note)


@dataclass
class State:
    """What was done to a model: enough to undo it, and to say what it was."""

    required_grad: dict[str, bool]  # parameter name in the model as it came -> requires_grad
    active: str
    adapters: dict[str, AdapterState]  # in the order they came
    in_order: list[nn.Module] = field(default_factory=list)  # quantised layers that may be packed when it is detached

    @property
    def current(self) -> AdapterState:
        """The active adapter's."""
        return self.adapters[self.active]

    def of(self, name: str) -> AdapterState:
        """The adapter's; raises ValueError if there is none of that name."""
        if name not in self.adapters:
            raise ValueError(f"this model has no adapter {name!r}; it has {', '.join(map(repr, self.adapters))}")
        return self.adapters[name]


def state_of(model: nn.Module) -> State:
    """The model's adapter state; raises ValueError if it has no adapter."""
    state = getattr(model, _STATE, None)
    if not isinstance(state, State):
        raise ValueError(
            "this model has no osora adapter: call osora.attach(model, config) or osora.load_adapter first"
        )
    return state


def has_adapter(model: object) -> bool:
    """Whether an adapter has been attached to this very model."""
    return isinstance(getattr(model, _STATE, None), State)


def osora_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name → layer that any adapter is in, in the model's order; a shared layer once."""
    found = uncompiled(model).named_modules()
    return {name: module for name, module in found if isinstance(module, AdaptedLinear)}


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdaptedLinear]:
    """Name → layer that the adapter is in, or the active one, in the model's order; a shared layer once."""
    layers = osora_layers(model).items()
    if adapter is None:
        return {name: layer for name, layer in layers if layer.adapter is not None}
    return {name: layer for name, layer in layers if adapter in layer.adapters()}


def refuse_if_busy(model: nn.Module) -> None:
    """Raise ValueError where adapters cannot be exchanged now: merged, or within a batch of several."""
    for name, layer in osora_layers(model).items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: call osora.unmerge(model) first")
        if layer.batch is not None:
            raise ValueError("adapters cannot be exchanged within adapters_in_batch")


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise TypeError or ValueError for a name that no further adapter of the model can have."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {name!r}")
    if not name or "." in name:
        raise ValueError(
            f"an adapter's name must not be empty nor have a dot (it is part of state_dict keys): {name!r}"
        )
    state = getattr(model, _STATE, None)
    if isinstance(state, State) and name in state.adapters:
        raise ValueError(f"this model has an adapter {name!r} already: remove it first, or take another name")


# -- decompose -------------------------------------------------------------------------------------------------------


def batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, dtype and device together, in batches of bounded size."""
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        weight = base_weight(target.module)
        groups[(*weight.shape, target.rank, weight.stored, weight.device)].append(target)
    for group in groups.values():
        size = max(1, _BATCH_ENTRIES // base_weight(group[0].module).numel)
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _check_fits(target: Target, max_memory: int) -> None:
    weight = base_weight(target.module)
    plan = svd_plan(weight.shape, target.rank, weight.stored, weight.device)
    if plan.bytes > max_memory:
        raise ValueError(
            f"{target.name}.weight {list(weight.shape)} takes {plan.bytes} bytes to decompose at rank {target.rank}, "
            f"and max_memory is {max_memory}: allow more, take a smaller r, or leave it out with exclude_modules"
        )


def decompose_targets(
    targets: list[Target],
    config: AdapterConfig,
    *,
    max_memory: int | None,
    unconverged: Unconverged,
    progress: bool | None,
) -> Iterator[tuple[Target, Decomposition]]:
    """Each target with its factors, as they come; a bar on a terminal unless ``progress`` says otherwise."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # slow to import

    check_max_memory(max_memory)
    for target in targets:  # all of them before any work
        if not is_quantised(target.module):
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
                [dense_weight(target.module) for target in batch],  # of quantised ones copies, which go with the batch
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


def with_enough(target: Target, S: Tensor, norm: Tensor | float, fraction: float) -> Target:
    """The target with the fewest triplets that hold ``fraction`` of its weight's energy, or all of them and a note."""
    energy = captured_energy(S, norm)
    rank = rank_for_energy(energy, fraction)
    if rank is not None:
        return replace(target, rank=rank)
    held = math.floor(float(energy[-1]) * 1e4) / 1e4  # rounded up, it could read as enough
    note = f"rank {target.rank} holds {held} of the energy, rank_for_energy={fraction:g} asks for more"
    return replace(target, note="; ".join(filter(None, (target.note, note))))


def rank_note(factors: Decomposition) -> str:
    """What is worth a line where a weight has a smaller rank than the triplets that were asked for, else nothing."""
    zeros, asked = int(factors.below_floor.sum()), factors.S.numel()
    return f"its weight has rank {asked - zeros} to rounding, less than {asked}" if zeros else ""


def kept(target: Target, factors: Decomposition, config: AdapterConfig) -> tuple[Target, Decomposition]:
    """What an adapter keeps of a decomposition, by its ``rank_for_energy``; and a note of triplets that are zero."""
    if config.rank_for_energy is not None:
        target = with_enough(target, factors.S, factors.norm, config.rank_for_energy)
        factors = factors.leading(target.rank)
    return replace(target, note="; ".join(filter(None, (target.note, rank_note(factors))))), factors


# -- in and out ------------------------------------------------------------------------------------------------------


def _replace(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(uncompiled(model).get_submodule(parent), last, module)


Layers = list[tuple[Target, AdaptedLinear]]


def install(model: nn.Module, layers: Layers, name: str, adapter: AdapterState) -> None:
    """Wrap the targets in their finished layers and freeze everything else: the model's first adapter."""
    required_grad = {name: p.requires_grad for name, p in uncompiled(model).named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for target, layer in layers:
        _replace(model, target.names, layer)
    setattr(uncompiled(model), _STATE, State(required_grad, name, {name: adapter}, keep_order(model)))
    adapter.begin(model, name)


def install_beside(model: nn.Module, layers: Layers, name: str, adapter: AdapterState) -> None:
    """A further adapter, which waits: ``layers`` are the new ones; those that were there have its o and s already."""
    for target, layer in layers:
        layer.select_adapter(None)
        layer.requires_grad_(False)
        _replace(model, target.names, layer)
    state_of(model).adapters[name] = adapter
    adapter.begin(model, name)


def notes_of(targets: Iterable[Target]) -> dict[str, str]:
    """Module name → its target's note."""
    return {target.name: target.note for target in targets if target.note}


def unwrap(model: nn.Module, layers: Iterable[AdaptedLinear]) -> None:
    """Put their base layers back in their places, under every name they have."""
    identities = {id(layer) for layer in layers}
    for name, module in list(uncompiled(model).named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLinear) and id(module) in identities:
            _replace(model, [name], module.base_layer)


def refuse_if_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model has an adapter already."""
    if getattr(model, _STATE, None) is not None or osora_layers(model):
        raise ValueError(
            "this model has an osora adapter already: call osora.detach(model) before attaching another, or give the "
            "new one a name with osora.add_adapter(model, name) or osora.load_adapter(model, folder, name=name)"
        )


def attach(
    model: nn.Module,
    config: AdapterConfig | None = None,
    *,
    name: str = DEFAULT,
    max_memory: int | None = None,
    unconverged: Unconverged = "warn",
    progress: bool | None = None,
) -> nn.Module:
    """Give ``model`` an adapter, in place, and freeze everything else.

    The output is unchanged, bit for bit: the adapter starts as nothing. If anything is wrong with the model or the
    config, an error comes before the model is touched.

    Args:
        model: any ``nn.Module`` with linear layers.
        config: an :class:`osora.OsoraConfig` or :class:`osora.SorsaConfig`; by default OSoRA on every
            linear layer but the output head, at rank 64.
        name: the adapter's, to tell it from those that osora.add_adapter and osora.load_adapter put beside it.
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
    formula = formula_of(config)
    refuse_if_adapted(model)
    check_new_name(model, name)
    began = time.perf_counter()
    targets = find_targets(model, config)
    layers = []
    for target, factors in decompose_targets(
        targets, config, max_memory=max_memory, unconverged=unconverged, progress=progress
    ):
        target, factors = kept(target, factors, config)
        layers.append((target, make_layer(target.module, factors, formula, config.dropout, name)))
    notes = notes_of(target for target, _ in layers)
    install(model, layers, name, AdapterState(config, time.perf_counter() - began, notes))
    return model


def merge_layers(layers: Mapping[str, AdaptedLinear], requantize: bool = False) -> None:
    """Merge all of them or, if one cannot be, none."""
    done: list[AdaptedLinear] = []
    for name, layer in layers.items():
        try:
            layer.merge(requantize)
        except ValueError as error:
            for earlier in done:
                earlier.unmerge()
            raise ValueError(f"{name}: {error}") from error
        done.append(layer)


def detach(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """Take every adapter off, in place: the very modules and tensors that were there, trainable or not as they were.

    Args:
        model: a model with an adapter, merged or not.
        merged: leave the active adapter's merged weights in place of the base weights, as a plain model to save or
            serve. Quantised ones are merged first, by ``osora.merge(model, requantize=True)``.

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
    unwrap(model, osora_layers(model).values())
    allow_packing(state.in_order)
    delattr(uncompiled(model), _STATE)
    for name, parameter in uncompiled(model).named_parameters():
        parameter.requires_grad_(state.required_grad.get(name, parameter.requires_grad))
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the model is its base, bit for bit (a reference model for DPO, say). Raises ValueError if merged."""
    state_of(model)
    layers = list(osora_layers(model).values())
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
    """The trained parameters, the active adapter's in every layer that it is in, for an optimiser.

    Of OSoRA o and s, of SORSA u, s and v, layer by layer.
    """
    active = state_of(model).active
    return [parameter for layer in adapted_layers(model).values() for parameter in layer.trained(active)]
