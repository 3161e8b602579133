# SPDX-License-Identifier: Apache-2.0
"""Modules that an adapter trains whole (``modules_to_save``): which they are, and what cannot be one."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from osora.layers.adapted import AdaptedLinear
from osora.layers.quantised import kind_of, unsupported
from osora.layers.whole_module import WholeModule, copied
from osora.model.targets import (
    base_modules,
    name_matches,
    of_peft,
    uncompiled,
    unmatched_names,
    weight_holders,
    whole_modules,
    within,
)


@dataclass(frozen=True)
class Whole:
    """A module to train whole: every name it has in the model, and the module itself."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The name it goes by."""
        return self.names[0]

    def placed(self, there: WholeModule | None, adapter: str, values: nn.Module | None = None) -> "Copy":
        """Its copy for an adapter, ``values`` or one of the module as it is; ``there`` is what is in its place."""
        try:
            return Copy(self, there, adapter, copied(self.module) if values is None else values)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Copy:
    """A copy for an adapter, which is made before the model is touched."""

    whole: Whole
    there: WholeModule | None
    adapter: str
    values: nn.Module

    def put(self, model: nn.Module) -> WholeModule:
        """Put it into the model. In a module that no adapter trained before it is the active one."""
        if self.there is not None:
            self.there.add_adapter(self.adapter, self.values)
            return self.there
        new = WholeModule(self.whole.module, self.adapter, self.values)
        for name in self.whole.names:
            parent, _, last = name.rpartition(".")
            setattr(uncompiled(model).get_submodule(parent), last, new)
        return new


def _matches(model: nn.Module, wanted: Collection[str], exact: bool) -> list[Whole]:
    """The modules whose names end so, or are so, in the model's order, without those within others."""
    names_of: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in base_modules(model):
        names_of.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    everything = [name for names in names_of.values() for name in names]
    if unmatched := sorted(set(wanted) - set(everything)) if exact else unmatched_names(wanted, everything):
        raise ValueError(f"modules_to_save names {', '.join(map(repr, unmatched))}, which no module has")
    matching = [name for name in everything if name and (name in wanted if exact else name_matches(name, wanted))]
    outermost = {name for name in matching if within(name, (other for other in matching if other != name)) is None}
    return [
        Whole(tuple(names), modules[key]) for key, names in names_of.items() if any(name in outermost for name in names)
    ]


def _check_trainable(whole: Whole) -> None:
    name, module = whole.name, whole.module
    if type(module).forward is nn.Module.forward:
        raise TypeError(
            f"modules_to_save names {name}, a {type(module).__name__}, which has no forward: name the modules in it"
        )
    if not any(True for _ in module.parameters()):
        raise ValueError(f"modules_to_save names {name}, a {type(module).__name__}, which has no parameters to train")
    for inner, part in module.named_modules():
        odd = [key for key, p in part.named_parameters(recurse=False) if not p.is_floating_point()]
        if kind_of(part) is not None or unsupported(part) is not None or odd:
            where = f"{name}.{inner}" if inner else name
            raise TypeError(
                f"modules_to_save names {name}, and {where} is quantised: such weights cannot be trained. Keep it in "
                "full precision (llm_int8_skip_modules of BitsAndBytesConfig), or adapt it instead"
            )


def _check_not_tied(whole: Whole, model: nn.Module, holders: dict[int, set[int]]) -> None:
    own = {id(part) for part in whole.module.modules()}
    for key, parameter in whole.module.named_parameters():
        if outside := holders[id(parameter)] - own:
            other = next(name for name, module in base_modules(model) if id(module) in outside)
            raise ValueError(
                f"modules_to_save names {whole.name}, whose {key} is tied to that of {other}: a copy would untie them, "
                f"and {other} would stay as it was. Untie them first, here and before the adapter is loaded "
                f"(config.tie_word_embeddings = False, and {whole.name}.{key} = torch.nn.Parameter of a clone), or "
                "leave it out"
            )


def find_whole(
    model: nn.Module, wanted: Iterable[str] | None, *, exact: bool = False, planned: bool = False
) -> list[Whole]:
    """The modules of ``modules_to_save``, in the model's order; of one that an adapter trains already, the module.

    Args:
        model: with adapters or without.
        wanted: names that module names end in; None for none. What is within another match is part of that.
        exact: whether they are the whole names.
        planned: whether it is only asked: they may be without values, and other adapters are not looked at.

    Raises:
        ValueError: a name that no module has; a module without parameters, tied to another, in an adapter of PEFT, on
            the meta device; one that overlaps with what another adapter of the model adapts, or trains whole.
        TypeError: a module without a forward, such as a ModuleList, or with quantised weights.
    """
    if wanted is None:
        return []
    holders, there, outer = weight_holders(model), whole_modules(model), of_peft(model)
    adapted = [name for name, module in uncompiled(model).named_modules() if isinstance(module, AdaptedLinear)]
    found = _matches(model, tuple(wanted), exact)
    for whole in found:
        _check_trainable(whole)
        _check_not_tied(whole, model, holders)
        if planned or whole.name in there:  # all of what follows was looked at when it came
            continue
        for name in whole.names:
            inside = [each for each in [*adapted, *there] if within(each, [name])]
            if (other := (inside or [None])[0] or within(name, there)) is not None:
                raise ValueError(
                    f"modules_to_save names {name}, and another adapter of the model has {other}: adapters of one "
                    "model either adapt a module or train it whole; load them into copies of the model"
                )
            if (peft := within(name, outer)) is not None or any(within(each, [name]) for each in outer):
                raise ValueError(f"modules_to_save names {name}, which belongs to an adapter of PEFT ({peft or name})")
        if any(tensor.is_meta for tensor in whole.module.state_dict().values()):
            raise ValueError(f"{whole.name} is on the meta device and has no values: load the weights first")
    return found


def whole_names(wholes: Iterable[Whole]) -> list[str]:
    """Every name of every one of these modules."""
    return [name for whole in wholes for name in whole.names]


__all__ = ["Copy", "Whole", "find_whole", "whole_names"]
