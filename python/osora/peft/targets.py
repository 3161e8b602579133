# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model PEFT gives an adapter: its own rules, with layers_to_transform as the native API has it."""

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from osora.config import ALL_LINEAR
from osora.files.lora import heads_of
from osora.model.fresh import fresh_parts, warn_of_fresh
from osora.model.state import all_layers
from osora.model.targets import (
    LEFT_OUT,
    check_has_values,
    check_is_linear,
    check_not_rewritten,
    check_not_tied,
    layer_index,
    log,
    rewritten,
    unlike_linear,
    unmatched_names,
    weight_holders,
)
from osora.peft.rollback import wrappers


def _index(config: Any, key: str) -> int | None:
    """The number of the layer that a module is in."""
    if not config.layers_pattern:
        return layer_index(key)
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    found = (re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", key) for pattern in patterns)
    return next((int(match[1]) for match in found if match), None)


def matches(config: Any, key: str) -> Any:
    """PEFT's answer for a module's name; whatever target_modules is, in the layers of layers_to_transform alone.

    PEFT looks at these for names that are ends of module names, and neither for an expression nor for "all-linear".
    """
    if config.layers_to_transform is None:
        return check_target_module_exists(config, key)
    everywhere = copy.copy(config)
    everywhere.layers_to_transform = everywhere.layers_pattern = None
    found = check_target_module_exists(everywhere, key)
    return found and _index(config, key) in config.native().layers_to_transform


def check_whole_modules(names: Iterable[str], boxes: Sequence[str]) -> None:
    """Raise ValueError for a name of ``modules_to_save`` by whose end PEFT takes an adapter's own containers, too."""
    for name in names:
        if box := next((box for box in boxes if box.endswith(name)), None):
            raise ValueError(
                f"modules_to_save {name!r} is also the end of {box}, where this adapter's own tensors are, and PEFT "
                "would train whole: give the module's full name, or rename it"
            )


def _is_within(name: str, whole: Iterable[str]) -> bool:
    """Whether a module is, or is in, one that is trained whole, by whose name's end PEFT finds it."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(each) for i in range(len(parts)) for each in whole)


def _ends(names: Iterable[str]) -> list[str]:
    return [name.rsplit(".", 1)[-1] for name in names]


def _plain(task: Any) -> str:
    return str(getattr(task, "value", task))


class Surroundings:
    """What the checks of targets ask about the whole model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        """Look at it before an adapter of ``config`` comes.

        Raises:
            ValueError: it has adapters of the native API.
        """
        if own := all_layers(model):
            raise ValueError(
                f"{next(iter(own))} has an adapter by osora.attach or osora.load_adapter, which PEFT would neither "
                "train nor save: call osora.detach(model) first, or stay with the native API (osora.add_adapter)"
            )
        ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        alike = [n for n, _ in model.named_modules() if f"{config.method}_" in n and not n.startswith(ours)]
        if alike and tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21):
            raise ValueError(
                f"PEFT {peft.__version__} takes {alike[0]} for a tensor of {config.method}'s, by its name: it would be "
                "trained and not saved; update to PEFT 0.21, or give the module another name"
            )
        self.everything = config.target_modules == ALL_LINEAR
        self.heads = heads_of(config.task_type, [name for name, _ in model.named_modules()])
        self.task = config.task_type
        self.rewritten, self.holders, self.whole = rewritten(model), weight_holders(model), wrappers(model)
        getter = getattr(model, "get_output_embeddings", None)
        self.head = getter() if callable(getter) else None
        kept = [*self.whole, *(config.modules_to_save or ())]
        fresh = {} if config.osora is not None and config.osora.get("others") else fresh_parts(model)
        self.fresh = {
            name: module
            for name, module in fresh.items()
            if not isinstance(module, nn.Embedding) and module is not self.head and not _is_within(name, kept)
        }
        warn_of_fresh(self.fresh, f"train it whole, with modules_to_save={_ends(self.fresh)!r}", stacklevel=7)
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        self.left_out = {name for key in self.rewritten for name in names.get(key, ())}
        unlike = ((name, unlike_linear(module)) for name, module in model.named_modules())
        self.unlike = {name: why for name, why in unlike if why is not None}
        self.unmatched = unmatched_names(config.target_modules, [name for found in names.values() for name in found])
        self.also = {key: found[1:] for key, found in names.items() if len(found) > 1}

    def is_left_out(self, key: str) -> bool:
        """Whether "all-linear" leaves a match out: in a head that is trained whole; fresh; the model writes into it.

        Raises:
            ValueError: it is named, or in another module that an adapter trains whole.
        """
        if self.everything and key in self.left_out:
            log.warning(LEFT_OUT, key)
            return True
        if self.everything and key in self.fresh:
            return True
        if self.everything and (why := self.unlike.get(key)) is not None:
            log.info("%s is left out: %s", key, why)
            return True
        if (head := self._head_of(key)) is not None:
            if self.everything:
                return True
            raise ValueError(
                f"target {key} is in {head}, which PEFT trains and saves whole for {_plain(self.task)}: leave it "
                f"out with exclude_modules=[{key.rsplit('.', 1)[-1]!r}], or leave task_type out"
            )
        for name, wrapper in self.whole.items():
            if key.startswith(f"{name}."):
                if self.everything and wrapper is self.head:
                    return True
                raise ValueError(
                    f"target {key} is within {name}, which another adapter trains (modules_to_save or "
                    f"trainable_token_indices): leave it out with exclude_modules=[{key.rsplit('.', 1)[-1]!r}]"
                )
        return False

    def warn_of_unmatched(self) -> None:
        """Name what ``target_modules`` lists and no module is called: PEFT says so only if nothing matches."""
        if self.unmatched:
            warnings.warn(
                f"target_modules names {', '.join(map(repr, self.unmatched))}, which no module has: the adapter is not "
                "there",
                RuntimeWarning,
                stacklevel=7,
            )

    def _head_of(self, key: str) -> str | None:
        return next((head for head in self.heads if key == head or key.startswith(f"{head}.")), None)

    def leave_out(self, config: Any) -> None:
        """Of "all-linear", take the heads out of the names that PEFT has put in its place."""
        if self.everything and isinstance(config.target_modules, set):
            config.target_modules = {key for key in config.target_modules if self._head_of(key) is None}

    def check(self, name: str, module: nn.Module) -> None:
        """Raise ValueError or TypeError for a module that cannot have an adapter, saying what to do."""
        if isinstance(module, BaseTunerLayer):
            raise ValueError(f"target {name} has an adapter of another method ({type(module).__name__}) already")
        if any(p.dim() > 2 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"target {name} is a {type(module).__qualname__}, whose weights have more than two dimensions "
                "(those of experts, or of a convolution): osora adapts matrices only; name other modules in "
                "target_modules, or leave this one out with exclude_modules"
            )
        check_is_linear(name, module)
        check_has_values(name, module)
        check_not_rewritten(name, module, self.rewritten)
        check_not_tied(name, module, self.holders)
        if names := self.also.get(id(module)):
            raise ValueError(
                f"target {name} is also in the model as {', '.join(names)}, and PEFT replaces a module in one place "
                "only; osora.attach adapts it in all, exclude_modules leaves it out"
            )


__all__ = ["Surroundings", "check_whole_modules", "matches"]
