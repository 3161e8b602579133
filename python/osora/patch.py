# SPDX-License-Identifier: Apache-2.0
"""An adapter's way into a model and out of it: find the targets, decompose, wrap, freeze; and all of it back."""

import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from osora.config import ALL_LINEAR, OsoraConfig
from osora.factors import Decomposition, Unconverged, check_matrix, decompose
from osora.layers import OsoraLinear, is_conv1d, oriented_weight

log = logging.getLogger("osora")

_STATE = "_osora"  # attribute of an adapted model
_BATCH_ENTRIES = 2**24  # weight entries decomposed in one call: bounds the factors held at once


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt: every name it has in the model (more than one if it is shared), and its rank."""

    names: tuple[str, ...]
    module: nn.Module
    rank: int
    note: str = ""

    @property
    def name(self) -> str:
        """The name its adapter goes by."""
        return self.names[0]


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


# -- which layers ----------------------------------------------------------------------------------------------------


def _matches(name: str, wanted: str | Iterable[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def check_is_linear(name: str, module: nn.Module) -> None:
    """Raise for an explicitly named module whose forward is not that of a plain linear layer."""
    if _is_linear(module):
        return
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    raise ValueError(
        f"target {name} is a {kind}; osora adapts torch.nn.Linear and transformers' Conv1D: name other modules in "
        "target_modules, or leave this one out with exclude_modules"
    )


def _bypassed(model: nn.Module) -> set[int]:
    """Identities of linear layers whose parent may use their weights without calling them."""
    parents = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {id(layer) for parent in parents for layer in (parent.linear1, parent.linear2)}


def check_not_tied(name: str, module: nn.Module, holders: dict[int, set[int]]) -> None:
    """Raise for a weight that another module holds too: merging would make two weights of one."""
    if len(holders[id(module.weight)]) > 1:
        raise ValueError(
            f"the weight of {name} is tied to another module's (an embedding's, most often): merging would silently "
            f"untie them, so it is refused; exclude_modules=[{name.rsplit('.', 1)[-1]!r}] leaves it out"
        )


def weight_holders(model: nn.Module) -> dict[int, set[int]]:
    """Parameter identity → identities of the modules that hold it."""
    holders: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].add(id(module))
    return holders


def find_targets(model: nn.Module, config: OsoraConfig) -> list[Target]:
    """The layers ``config`` names, in the model's order.

    Raises:
        ValueError: nothing matches; a match is no plain linear layer; its weight is tied to another module; a
            ``rank_pattern`` matches nothing.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of[id(module)].append(name)
        modules[id(module)] = module
    head, holders, bypassed = _output_head(model), weight_holders(model), _bypassed(model)
    everything = config.target_modules == ALL_LINEAR
    layers = config.layers_to_transform
    assert layers is None or isinstance(layers, tuple)  # OsoraConfig has brought it to this form
    targets = []
    for key, names in names_of.items():
        module, name = modules[key], names[0]
        if everything:
            wanted = _is_linear(module) and module is not head and key not in bypassed
        else:
            wanted = any(_matches(n, config.target_modules) for n in names)
        if not wanted or not name:
            continue
        if config.exclude_modules is not None and any(_matches(n, config.exclude_modules) for n in names):
            continue
        if layers is not None and _layer_index(name) not in layers:
            continue
        check_is_linear(name, module)
        if key in bypassed:
            raise ValueError(
                f"target {name} belongs to a torch.nn.TransformerEncoderLayer, which reads its weight in eval mode "
                "without calling it: an adapter would be ignored; exclude_modules leaves it out"
            )
        check_not_tied(name, module, holders)
        asked, most = config.rank_for(name), min(oriented_weight(module).shape)
        note = f"rank {asked} clipped to {most}" if asked > most else ""
        targets.append(Target(tuple(names), module, min(asked, most), note))
    if not targets:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if n and _is_linear(m)})
        raise ValueError(
            f"no module matches target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}; the model's linear "
            f"layers end in: {', '.join(linear) or 'none at all'}"
        )
    for pattern in config.rank_pattern:
        if not any(re.fullmatch(rf"(.*\.)?(?:{pattern})", target.name) for target in targets):
            raise ValueError(f"rank_pattern {pattern!r} matches no target, the first of which is {targets[0].name}")
    return targets


# -- decompose -------------------------------------------------------------------------------------------------------


def _batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, dtype and device together, in batches of bounded size."""
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        weight = oriented_weight(target.module)
        groups[(*weight.shape, target.rank, weight.dtype, weight.device)].append(target)
    for group in groups.values():
        size = max(1, _BATCH_ENTRIES // oriented_weight(group[0].module).numel())
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def decompose_targets(
    targets: list[Target], config: OsoraConfig, *, unconverged: Unconverged, progress: bool | None
) -> Iterator[tuple[Target, Decomposition]]:
    """Each target with its factors, as they come; a bar on a terminal unless ``progress`` says otherwise."""
    for target in targets:  # all of them before any work
        check_matrix(oriented_weight(target.module), f"{target.name}.weight")
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=progress is False, transient=progress is None) as bar:
        if progress is None and not bar.console.is_terminal:
            bar.disable = True
        task = bar.add_task("decomposing", total=len(targets))
        for batch in _batches(targets):
            found = decompose(
                [oriented_weight(target.module) for target in batch],
                batch[0].rank,
                names=[target.name for target in batch],
                tol=config.tol,
                seed=config.seed,
                unconverged=unconverged,
            )
            for target, factors in zip(batch, found, strict=True):
                yield target, factors
                bar.advance(task)


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
    unconverged: Unconverged = "warn",
    progress: bool | None = None,
) -> nn.Module:
    """Give ``model`` an OSoRA adapter, in place, and freeze everything else.

    The output is unchanged, bit for bit: the adapter starts as nothing. If anything is wrong with the model or the
    config, an error comes before the model is touched.

    Args:
        model: any ``nn.Module`` with linear layers.
        config: what to adapt; by default every linear layer but the output head, at rank 64.
        unconverged: "warn" or "raise" when a decomposition misses ``config.tol``.
        progress: a progress bar; by default only on a terminal.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no target, a tied weight, NaN in a weight, an adapter already there.
        TypeError: a quantised or integer weight.
        osora.ConvergenceError: see ``unconverged``.
    """
    config = OsoraConfig() if config is None else config
    if not isinstance(config, OsoraConfig):
        raise TypeError(f"config must be an OsoraConfig, got {type(config).__name__}")
    refuse_if_adapted(model)
    began = time.perf_counter()
    targets = find_targets(model, config)
    layers = [
        (target, OsoraLinear(target.module, factors, config.dropout))
        for target, factors in decompose_targets(targets, config, unconverged=unconverged, progress=progress)
    ]
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
            module.base_layer.train(module.training)
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


# -- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted layer: its weight's shape [out_features, in_features], rank, and the proof of its factors."""

    name: str
    shape: tuple[int, int]
    rank: int
    trainable: int
    max_residual: float
    passes: int
    converged: bool
    method: str
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """The numbers of an adapted model; ``print`` it for a table."""

    modules: tuple[ModuleSummary, ...]
    trainable: int
    total: int
    seconds: float

    @property
    def share(self) -> float:
        """Trainable numbers over the base model's."""
        return self.trainable / max(1, self.total)

    @property
    def max_residual(self) -> float:
        """The largest certified residual of any singular triplet."""
        return max(module.max_residual for module in self.modules)

    @property
    def converged(self) -> bool:
        """Whether every decomposition reached its tolerance."""
        return all(module.converged for module in self.modules)

    def __str__(self) -> str:
        """Shapes with their counts, and the totals."""
        groups: dict[tuple, list[ModuleSummary]] = defaultdict(list)
        for module in self.modules:
            groups[(*module.shape, module.rank, module.method)].append(module)
        lines = [f"{'layers':>6}  {'weight':>14}  {'rank':>5}  {'trainable':>10}  {'method':>8}  {'max residual':>12}"]
        for (d, k, rank, method), group in groups.items():
            trainable, residual = sum(m.trainable for m in group), max(m.max_residual for m in group)
            lines.append(
                f"{len(group):>6}  {f'{d} x {k}':>14}  {rank:>5}  {trainable:>10,}  {method:>8}  {residual:>12.1e}"
            )
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} ({self.share:.3%}); decomposed in {self.seconds:.1f} s, "
            f"largest residual {self.max_residual:.1e}" + ("" if self.converged else ", NOT ALL CONVERGED")
        )
        lines += [f"{module.name}: {module.note}" for module in self.modules if module.note]
        return os.linesep.join(lines)


def _base_numbers(model: nn.Module) -> int:
    own = {id(t) for layer in adapted_layers(model).values() for t in (layer.o, layer.s)}
    return sum(p.numel() for p in model.parameters() if id(p) not in own)


def summary(model: nn.Module) -> Summary:
    """How many numbers are trained, of how many, and how well each weight was decomposed."""
    state = state_of(model)
    modules = tuple(
        ModuleSummary(
            name,
            (layer.out_features, layer.in_features),
            layer.rank,
            layer.o.numel() + layer.s.numel(),
            layer.max_residual,
            layer.passes,
            layer.converged,
            layer.method,
            state.notes.get(name, ""),
        )
        for name, layer in adapted_layers(model).items()
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Summary(modules, trainable, _base_numbers(model), state.seconds)
