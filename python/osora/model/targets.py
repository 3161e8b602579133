# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model an adapter is for."""

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from osora.config import ALL_LINEAR, AdapterConfig
from osora.layers.adapted import AdaptedLinear
from osora.layers.base_weight import BaseWeight, base_weight, is_conv1d
from osora.layers.quantised import kind_of, refuse_unsupported, unsupported
from osora.layers.subclasses import is_linear_subclass
from osora.layers.whole_module import WholeModule

log = logging.getLogger("osora")


@dataclass(frozen=True)
class Target:
    """A linear layer to adapt: every name it has in the model (more than one if it is shared), its weight, its rank."""

    names: tuple[str, ...]
    module: nn.Module
    weight: BaseWeight
    rank: int
    note: str = ""

    @property
    def name(self) -> str:
        """The name its adapter goes by."""
        return self.names[0]


def name_matches(name: str, wanted: str | Iterable[str]) -> bool:
    """Whether a module's name is meant: it ends in one of the names, or is matched whole by the expression."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def unmatched_names(wanted: str | Iterable[str], names: Collection[str]) -> list[str]:
    """Of a list of module names those that none of the model's ``names`` ends in; nothing of an expression."""
    if isinstance(wanted, str):
        return []
    ends = {".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in range(len(parts))}
    return sorted(each for each in wanted if each not in ends)


def layer_index(name: str) -> int | None:
    """The first number in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _is_linear(module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or is_linear_subclass(module)
    return plain or is_conv1d(module) or kind_of(module) is not None


def unlike_linear(module: nn.Module) -> str | None:
    """Why "all-linear" leaves out a layer whose class is one of ``torch.nn.Linear``'s; None of any other module."""
    if not isinstance(module, nn.Linear) or _is_linear(module) or unsupported(module) is not None:
        return None
    return (
        f"it is a {type(module).__module__}.{type(module).__qualname__}, which does not compute what torch.nn.Linear "
        "does, or is never called"
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head.base_layer if isinstance(head, AdaptedLinear | WholeModule) else head


def check_is_linear(name: str, module: nn.Module) -> None:
    """Raise for a module whose forward is not that of a linear layer, or whose weight cannot be read."""
    refuse_unsupported(name, module)
    if (kind := kind_of(module)) is not None:
        try:
            kind.check(module)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if _is_linear(module):
        if not isinstance(module.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {name} is computed anew in each forward (by torch.nn.utils' weight_norm or prune), so "
                "that nothing can be merged into it: make it a parameter first, by remove_weight_norm or prune.remove"
            )
        return
    class_name = f"{type(module).__module__}.{type(module).__qualname__}"
    raise ValueError(
        f"target {name} is a {class_name}; osora adapts torch.nn.Linear and transformers' Conv1D, "
        "and bitsandbytes' quantised linears: name other modules in target_modules, or leave this one out with "
        "exclude_modules"
    )


def check_has_values(name: str, module: nn.Module) -> None:
    """Raise ValueError for a weight on the meta device."""
    if base_weight(module).device.type == "meta":
        raise ValueError(f"{name}.weight is on the meta device and has no values: load the weights first")


def rewritten(model: nn.Module) -> set[int]:
    """Identities of linear layers into whose weights the model itself writes: RWKV divides them in eval."""
    found = set()
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):  # transformers' RwkvModel
            blocks: Any = module.blocks
            found |= {id(layer) for block in blocks for layer in (block.attention.output, block.feed_forward.value)}
    return found


LEFT_OUT = "%s is left out: the model rescales its weight in place between training and evaluation"


def check_not_rewritten(name: str, module: nn.Module, found: set[int]) -> None:
    """Raise for one of those that :func:`rewritten` has ``found``."""
    if id(module) in found:
        raise ValueError(
            f"the model rescales the weight of {name} in place between training and evaluation: an adapter of it would "
            'fit one of them alone; exclude_modules leaves it out, as "all-linear" does'
        )


def check_not_tied(name: str, module: nn.Module, holders: dict[int, set[int]]) -> None:
    """Raise for a weight that another module holds too: merging would make two weights of one."""
    if len(holders[id(module.weight)]) > 1:
        raise ValueError(
            f"the weight of {name} is tied to another module's (an embedding's, most often): merging would silently "
            f"untie them, so it is refused; exclude_modules=[{name.rsplit('.', 1)[-1]!r}] leaves it out"
        )


def check_not_whole(names: Iterable[str], whole: Collection[str]) -> None:
    """Raise ValueError for a module, by its names, within one that another adapter trains ``whole``."""
    for name in names:
        if (outer := within(name, whole)) is not None:
            raise ValueError(
                f"target {name} is within {outer}, which another adapter trains whole (modules_to_save): leave it out "
                f"with exclude_modules=[{name.rsplit('.', 1)[-1]!r}], or load the two adapters into copies of the model"
            )


def weight_holders(model: nn.Module) -> dict[int, set[int]]:
    """Parameter identity → identities of the modules that hold it."""
    holders: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].add(id(module))
    return holders


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``, DataParallel, DistributedDataParallel and AveragedModel.

    In it modules have the names they are saved under.

    Raises:
        TypeError: what is no module, and FSDP's first wrapper, which flattens parameters.
    """
    _check_module(model)
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "this is a FullyShardedDataParallel, which flattens parameters: osora works with FSDP2 "
                "(torch.distributed.fsdp.fully_shard) that comes after attach"
            )
        inside = model._modules.get("_orig_mod")
        if isinstance(model, _WRAPPERS):
            inside = model.module
        if inside is None:
            return model
        model = inside


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters something has taken stock of already, TypeError for no model."""
    _check_module(model)
    while (inside := model._modules.get("_orig_mod")) is not None:
        model = inside
    if isinstance(model, nn.parallel.DistributedDataParallel | AveragedModel):
        raise ValueError(
            f"this is a {type(model).__name__}, which knows the parameters it was made with: an adapter that came now "
            f"would not be {'reduced' if 'Data' in type(model).__name__ else 'averaged'}. Give model.module its "
            f"adapter, or make another of its adapters the active one, and make the {type(model).__name__} after it"
        )


def of_peft(model: nn.Module) -> set[str]:
    """Names of PEFT's layers and wrappers; what is in them belongs to its adapters."""
    kinds = [
        getattr(sys.modules[where], kind)
        for where, kind in (
            ("peft.tuners.tuners_utils", "BaseTunerLayer"),
            ("peft.utils.other", "AuxiliaryTrainingWrapper"),
        )
        if where in sys.modules  # or the model has none
    ]
    return {name for name, module in uncompiled(model).named_modules() if isinstance(module, tuple(kinds))}


def check_not_of_peft(name: str, outer: set[str]) -> None:
    """Raise ValueError for a module within one of those that :func:`of_peft` has found."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) in outer:
            raise ValueError(
                f"target {name} belongs to an adapter of PEFT, in {'.'.join(parts[:i])}: one within it would be "
                "ignored, or adapt PEFT's. Unload that first (model.unload() or model.merge_and_unload()), or give the "
                "model osora.peft's methods instead"
            )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every name of every module, as if the model had no adapter: what is adapted or trained whole is its base."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = module.base_layer if isinstance(module, AdaptedLinear | WholeModule) else module
        yield name, module
        for child, inner in module._modules.items():
            if inner is not None:
                yield from walk(f"{name}.{child}" if name else child, inner)

    return walk("", uncompiled(model))


def whole_modules(model: nn.Module, adapter: str | None = None) -> dict[str, WholeModule]:
    """The modules that an adapter trains whole.

    Args:
        model: a model with adapters, or without, which has none.
        adapter: its name; None for those of any.

    Returns:
        Module name → what stands in the module's place, in the model's order; one that has several names once.
    """
    found = uncompiled(model).named_modules()
    wholes = {name: module for name, module in found if isinstance(module, WholeModule)}
    return {name: whole for name, whole in wholes.items() if adapter is None or adapter in whole.adapters()}


def within(name: str, outer: Iterable[str]) -> str | None:
    """The first of the modules ``outer`` that is the module ``name``, or that it is in."""
    return next((each for each in outer if name == each or name.startswith(f"{each}.")), None)


_NONE: Mapping[str, nn.Module] = MappingProxyType({})


def find_targets(
    model: nn.Module,
    config: AdapterConfig,
    fresh: Mapping[str, nn.Module] = _NONE,
    whole: Collection[str] = (),
    of_others: Collection[str] = (),
) -> list[Target]:
    """The layers ``config`` names, in the model's order; of one that has an adapter already, the base layer.

    Args:
        model: with adapters or without.
        config: which.
        fresh: :func:`osora.model.fresh.fresh_parts` of the model, which "all-linear" leaves out: their random weights
            are others in the next process, which would refuse the adapter.
        whole: names of the modules that the adapter trains whole: what is in them is not adapted.
        of_others: names of those that the model's other adapters do, which "all-linear" leaves out.

    Raises:
        ValueError: nothing matches; a match is to be trained whole, or is by another adapter; it is no linear layer;
            its weight is tied to another module; a ``rank_pattern`` matches nothing.
        TypeError: a match is quantised in a way that cannot be read.
    """
    names_of: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    for name, module in base_modules(model):
        names_of[id(module)].append(name)
        modules[id(module)] = module
    head, holders, own, outer = _output_head(model), weight_holders(model), rewritten(model), of_peft(model)
    everything = config.target_modules == ALL_LINEAR
    left_out = {id(head), *map(id, fresh.values())}
    layers: Any = config.layers_to_transform  # the config has brought it to a tuple, or None
    targets = []
    for key, names in names_of.items():
        module, name = modules[key], names[0]
        if everything:
            is_linear = _is_linear(module) or unsupported(module) is not None  # which is not left out in silence
            wanted = is_linear and key not in left_out
            if (why := unlike_linear(module)) is not None and key not in left_out:
                log.info("%s is left out: %s", name, why)
            if wanted and key in own:
                log.warning(LEFT_OUT, name)
                continue
        else:
            wanted = any(name_matches(n, config.target_modules) for n in names)
        if not wanted or not name:
            continue
        if config.exclude_modules is not None and any(name_matches(n, config.exclude_modules) for n in names):
            continue
        if layers is not None and layer_index(name) not in layers:
            continue
        if any(within(n, whole) or (everything and within(n, of_others)) for n in names):
            if not everything and (named := next((n for n in names if n in whole), None)) is not None:
                raise ValueError(
                    f"{named} is named by target_modules and by modules_to_save: it is either adapted or trained "
                    "whole; leave it out of one of them"
                )
            continue
        check_not_whole(names, of_others)
        check_not_of_peft(name, outer)
        check_is_linear(name, module)
        check_not_rewritten(name, module, own)
        check_not_tied(name, module, holders)
        weight = base_weight(module)
        asked, most = config.rank_for(name), min(weight.shape)
        note = f"rank {asked} clipped to {most}" if asked > most else ""
        targets.append(Target(tuple(names), module, weight, min(asked, most), note))
    endings = sorted({n.rsplit(".", 1)[-1] for n, m in base_modules(model) if n and _is_linear(m)})
    linear = f"the model's linear layers end in: {', '.join(endings) or 'none at all'}"
    if not targets:
        raise ValueError(
            f"no module matches target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r}; {linear}"
        )
    if unmatched := unmatched_names(config.target_modules, [n for names in names_of.values() for n in names]):
        raise ValueError(f"target_modules names {', '.join(map(repr, unmatched))}, which no module has; {linear}")
    check_rank_pattern(config.rank_pattern, [target.name for target in targets])
    return targets


def check_rank_pattern(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise ValueError for a key of ``rank_pattern`` that matches none of the targets' ``names``."""
    for pattern in patterns:
        if not any(re.fullmatch(rf"(.*\.)?(?:{pattern})", name) for name in names):
            raise ValueError(f"rank_pattern {pattern!r} matches no target, the first of which is {names[0]}")
