# SPDX-License-Identifier: Apache-2.0
"""What a model knows of its adapters: their configs, which one is active, and how to undo them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.distributed.fsdp import FSDPModule

from osora.config import AdapterConfig, SorsaConfig
from osora.layers import AdaptedLinear
from osora.layers.first_step import watch_first_step
from osora.layers.late import can_come_late
from osora.layers.offloaded import is_offloaded
from osora.layers.penalty import Penalty
from osora.layers.read_weight import Place, Readers
from osora.layers.sharded import is_sharded
from osora.layers.whole_module import WholeModule
from osora.model.targets import refuse_wrapped, uncompiled, whole_modules

log = logging.getLogger("osora")

_ATTRIBUTE = "_osora"  # of an adapted model


@dataclass(frozen=True)
class BasisNote:
    """Which kept basis (docs/basis.md) an adapter came from: the fingerprint of its index, and its folder."""

    fingerprint: str
    folder: str


@dataclass
class AdapterState:
    """What one adapter was asked to be, and what came of it."""

    config: AdapterConfig
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)  # module name -> what is worth a line
    whole: list[str] = field(default_factory=list)  # names of the modules that it trains whole
    penalty: Penalty | None = None  # of SORSA, as long as the adapter is there
    basis: BasisNote | None = None
    layers: tuple[str, ...] = ()  # names of those that it came into

    def begin(self, model: nn.Module, name: str) -> None:
        """The adapter is in the model from now on: say what is worth a line, and penalise what is to be penalised."""
        layers, readers = adapted_layers(model, name), state_of(model).readers
        for module, layer in layers.items():
            layer.place = Place(module, readers)
        self.layers = tuple(layers)
        watched = {**layers, **whole_modules(model, name)}
        watch_first_step(watched, lambda layer: layer.trained(name) if name in layer.adapters() else ())
        if isinstance(self.config, SorsaConfig):
            self.penalty = Penalty(list(layers.values()), name, self.config.gamma, self.config.regularizer)
        for module, note in self.notes.items():
            log.info("%s: %s", module, note)


@dataclass
class State:
    """What was done to a model: enough to undo it, and to say what it was."""

    required_grad: dict[str, bool]  # parameter name in the model as it came -> requires_grad
    active: str
    adapters: dict[str, AdapterState]  # in the order they came
    in_order: list[nn.Module] = field(default_factory=list)  # quantised layers that may be packed when it is detached
    readers: Readers = field(default_factory=Readers)  # of weights that the model itself uses

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
    state = getattr(uncompiled(model), _ATTRIBUTE, None)
    if not isinstance(state, State):
        raise ValueError(
            "this model has no osora adapter: call osora.attach(model, config) or osora.load_adapter first"
        )
    return state


def has_adapter(model: object) -> bool:
    """Whether an adapter has been attached to this very model."""
    return isinstance(model, nn.Module) and isinstance(getattr(uncompiled(model), _ATTRIBUTE, None), State)


def remember(model: nn.Module, state: State) -> None:
    """Give a model that has no adapter its state."""
    setattr(uncompiled(model), _ATTRIBUTE, state)


def forget(model: nn.Module) -> None:
    """Take the state of a model's adapters away."""
    delattr(uncompiled(model), _ATTRIBUTE)


def all_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name → layer that any adapter is in, in the model's order; a shared layer once."""
    found = uncompiled(model).named_modules()
    return {name: module for name, module in found if isinstance(module, AdaptedLinear)}


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdaptedLinear]:
    """The layers of one adapter.

    Args:
        model: a model with adapters, or without, which has none.
        adapter: its name; None for the active one.

    Returns:
        Module name → layer, in the model's order; a layer that has several names once.
    """
    layers = all_layers(model).items()
    if adapter is None:
        return {name: layer for name, layer in layers if layer.adapter is not None}
    return {name: layer for name, layer in layers if adapter in layer.adapters()}


def trained_whole(model: nn.Module, adapter: str) -> dict[str, WholeModule]:
    """Name → the modules that an adapter of the model trains whole. Raises ValueError where one is there no more."""
    found = whole_modules(model, adapter)
    if gone := [name for name in state_of(model).of(adapter).whole if name not in found]:
        raise ValueError(
            f"{gone[0]}, which the adapter {adapter!r} trains whole, was replaced in the model since (by resizing "
            "embeddings, say), so that what was trained is lost: change the model first, and then attach the adapter"
        )
    return found


def refuse_if_busy(model: nn.Module) -> None:
    """Raise ValueError where adapters cannot be exchanged now: merged, or within a batch of several."""
    for name, layer in all_layers(model).items():
        if layer.merged:
            raise ValueError(f"{name}: the adapter is merged: call osora.unmerge(model) first")
        if layer.batch is not None:
            raise ValueError("adapters cannot be exchanged within adapters_in_batch")


def refuse_incomplete(model: nn.Module, adapter: str) -> None:
    """Raise ValueError where a module that an adapter came into has it no more: what is left is another adapter."""
    modules = dict(uncompiled(model).named_modules(remove_duplicate=False))
    for name in state_of(model).of(adapter).layers:
        module = modules.get(name)  # None where layers of the model were dropped
        if module is not None and not (isinstance(module, AdaptedLinear) and adapter in module.adapters()):
            raise ValueError(
                f"the adapter {adapter!r} was put into {name}, which has it no more (the module was exchanged, or a "
                "call was cut off): remove the adapter and load or attach it again"
            )


_GATHER = (
    "load full_tensor() of every entry of its state_dict (under ZeRO 3, what deepspeed's zero_to_fp32 gives) into an "
    "unsharded copy of the model, and take that"
)


def refuse_late(model: nn.Module, layers: Mapping[str, nn.Module], wish: str, kept: bool = False) -> None:
    """Raise ValueError where an adapter comes too late, since no process has a whole weight of these layers any more.

    Args:
        model: they are in it.
        layers: module name → layer.
        wish: what cannot be done with the weights.
        kept: whether there is a basis of them, so that it need not be done where the adapter can be trained as it is.
    """
    sharded_by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    if kept:
        layers = {name: layer for name, layer in layers.items() if not can_come_late(layer, sharded_by_fsdp)}
    cure = "attach the adapter before the model is sharded"
    if wish == "decomposed" and not kept:
        cure += ", or give attach a basis of it that was made on disk (basis=FOLDER, of osora init)"
    for layer in layers.values():
        weight = layer._parameters.get("weight")
        if hasattr(weight, "ds_id"):
            cure += (
                " (a model that from_pretrained makes within the life of transformers' HfDeepSpeedConfig for ZeRO 3 "
                "never is whole: load and adapt it before that object, and Trainer's arguments, are made)"
            )
            break
        if hasattr(weight, "full_tensor") and not sharded_by_fsdp:
            cure = (
                "its weight is split by a tensor parallel plan, and osora does not split adapters: load the model "
                "without tp_plan, and train it by FSDP2 or DDP"
            )
            break
    refuse_sharded(layers, wish, cure)


def refuse_sharded(layers: Mapping[str, nn.Module], wish: str, cure: str = _GATHER) -> None:
    """Raise ValueError where no process has a whole tensor of these layers, so that they cannot be "saved", say."""
    for module, layer in layers.items():
        for key, tensor in layer.named_parameters():
            if is_sharded(tensor):
                raise ValueError(f"{module}.{key} is sharded over processes, and cannot be {wish} there: {cure}")
    if wish != "decomposed":  # which tells of osora.count_parameters, for shapes alone
        refuse_valueless(layers, wish)


def refuse_valueless(layers: Mapping[str, nn.Module], wish: str) -> None:
    """Raise ValueError for a tensor of these layers on the meta device, unless accelerate brings it when it is used."""
    for module, layer in layers.items():
        for key, tensor in layer.named_parameters():
            if tensor.is_meta and not is_offloaded(layer.get_submodule(key.rpartition(".")[0])):
                raise ValueError(f"{module}.{key} is on the meta device and has no values, and cannot be {wish}")


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise TypeError or ValueError for a name that no further adapter of the model can have."""
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {name!r}")
    if not name or "." in name:
        raise ValueError(
            f"an adapter's name must not be empty nor have a dot (it is part of state_dict keys): {name!r}"
        )
    state = getattr(uncompiled(model), _ATTRIBUTE, None)
    if isinstance(state, State) and name in state.adapters:
        raise ValueError(f"this model has an adapter {name!r} already: remove it first, or take another name")


def refuse_if_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model has an adapter already, or is wrapped so that it is too late for one."""
    refuse_wrapped(model)
    if getattr(uncompiled(model), _ATTRIBUTE, None) is not None or all_layers(model):
        raise ValueError(
            "this model has an osora adapter already: call osora.detach(model) before attaching another, or give the "
            "new one a name with osora.add_adapter(model, name) or osora.load_adapter(model, folder, name=name)"
        )
