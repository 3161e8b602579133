# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model do once for all of them within one forward call: the folds, and ``x V`` of one x.

A call begins and ends with the model's forward and is its thread's alone (:mod:`osora.model.together`). Nothing that
was made in it is used after it: optimisers and replayed CUDA graphs write without counting, so that versions say
nothing from one call to the next. A layer outside of any call (checkpointing's second forward, say) does its own.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from osora.layers.base_weight import has_hooks, is_quantised, oriented_weight
from osora.layers.formulas import leading
from osora.ops.common import is_transformed, is_watched

if TYPE_CHECKING:
    from osora.layers.adapted import AdaptedLinear

_ops = torch.ops.osora
_PLAIN = (Tensor, nn.Parameter)
_DECODED_ROWS = 8  # csrc/core/linear_plan.h: up to so many rows a card takes no D
JOINED_ON = ("cuda",)  # devices where siblings share a product; on a CPU it brought nothing (docs/decisions/0011)
_ROWS_PER_COLUMN = 2  # joining V of two siblings moves as many bytes as the x that is not read again, at this many rows

_UNKNOWN: Any = object()
Key = tuple[torch.dtype, torch.device, Hashable]
"""What is folded in one launch: dtype, device, and how work is done there."""


class Sources:
    """What a layer computes with in a call: looked up once, and known again at the price of a few comparisons."""

    __slots__ = ("D", "S0", "U", "V", "adapter", "base", "key", "now", "o", "s", "stamp", "weight")

    def __init__(self, adapter: str, base: nn.Module, weight: Tensor, behind: tuple[Tensor, ...]) -> None:
        self.adapter, self.base, self.weight = adapter, base, weight
        self.o, self.s, *basis = behind
        self.U, self.V, self.S0 = leading((basis[0], basis[1], basis[2]), self.s.numel())
        self.now = _now(weight.device)
        self.key = weight.dtype, weight.device, self.now
        self.stamp = behind, tuple([tensor._version for tensor in behind])
        self.D: Tensor | None = None

    def are_of(self, layer: "AdaptedLinear") -> bool:
        """Whether the layer still is what it was: the same tensors, unchanged, used in the same way."""
        if layer.adapter != self.adapter or not _takes_part(layer) or layer._modules["base_layer"] is not self.base:
            return False
        if self.base._parameters.get("weight") is not self.weight or has_hooks(self.base):
            return False
        (o, s, U, V, S0), versions = self.stamp
        deltas, basis = layer._parameters, layer._buffers
        return (
            deltas.get("o") is o
            and deltas.get("s") is s
            and basis.get("U") is U
            and basis.get("V") is V
            and basis.get("S0") is S0
            and (o._version, s._version, U._version, V._version, S0._version) == versions
        )


def _takes_part(layer: "AdaptedLinear") -> bool:
    if not layer.together or layer.adapter is None or layer.base_kept or not layer.enabled or layer.batch is not None:
        return False
    return layer.dropout == 0 or not layer.training


def sources_of(layer: "AdaptedLinear") -> Sources | None:
    """What the layer would compute with if it were called now; None where it must do so on its own."""
    # Containers and not attributes: torch looks for those in one container after the other, and there are many layers.
    if not _takes_part(layer) or not layer.formula(layer.adapter).standard:  # type: ignore[arg-type]
        return None
    base, deltas, basis = layer._modules["base_layer"], layer._parameters, layer._buffers
    weight = base._parameters.get("weight")  # type: ignore[union-attr]
    if weight is None or weight.is_meta or has_hooks(base) or is_quantised(base):  # type: ignore[arg-type]
        return None
    behind: Any = deltas.get("o"), deltas.get("s"), basis.get("U"), basis.get("V"), basis.get("S0")
    # Replicas and parametrised modules have theirs elsewhere, shards are of other types or empty, and some tensors are
    # on their way from one device to another. What inference mode made has no version.
    device = weight.device
    for tensor in behind:
        if type(tensor) not in _PLAIN or tensor.device != device or tensor.is_inference():
            return None
    o, s, U, V, S0 = behind
    if o.numel() != U.shape[0] or s.numel() > S0.numel() or not U.dtype == V.dtype == weight.dtype:
        return None
    if weight.requires_grad or U.requires_grad or V.requires_grad or S0.requires_grad:
        return None  # refused where a layer computes on its own
    return Sources(layer.adapter, base, weight, behind)  # type: ignore[arg-type]


def _now(device: torch.device) -> Hashable:
    """How work on a device is done at this moment: what was made otherwise is not used."""
    # a tensor of inference mode cannot be kept for a backward
    inference = torch.is_inference_mode_enabled()
    if device.type != "cuda":
        return inference
    return inference, torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


# -- who reads one x -------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What two layers must have in common to share a product with their x."""

    in_features: int
    dtype: torch.dtype
    device: torch.device


def siblings(layers: Mapping[str, Shape]) -> list[list[str]]:
    """Names of layers that may read one x, in groups of two or more: those of one parent module and one shape."""
    groups: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in layers.items():
        groups.setdefault((name.rpartition(".")[0], shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


class Group:
    """Layers that are believed to read one x. One that was seen with another leaves, for a group of such ones."""

    def __init__(self, members: Iterable["AdaptedLinear"]) -> None:
        self.members = tuple(members)
        self._others: Group | None = None

    def leave(self, layer: "AdaptedLinear") -> "Group":
        """The group that takes the layer."""
        self.members = tuple(member for member in self.members if member is not layer)
        if self._others is None:
            self._others = Group(())
        self._others.members = (*self._others.members, layer)
        return self._others


class Known:
    """What calls of a model have learned of it: whom to fold together, and who reads one x.

    Several threads may use one. Each write replaces a whole value, and a lost one costs a product, no more.
    """

    def __init__(self, layers: Mapping[str, "AdaptedLinear"]) -> None:
        self.layers = tuple(layers.values())
        shapes = {name: Shape(layer.in_features, layer.V.dtype, layer.V.device) for name, layer in layers.items()}
        groups = [Group(layers[name] for name in names) for names in siblings(shapes)]
        self.group = {layer: group for group in groups for layer in group.members}

    def was_wrong(self, layer: "AdaptedLinear") -> None:
        """The layer did not read the x of its group."""
        if (group := self.group.get(layer)) is not None:
            self.group[layer] = group.leave(layer)


# -- one call --------------------------------------------------------------------------------------------------------


class _Joint(NamedTuple):
    """``x V`` of several layers, for those that have not come yet."""

    x: "weakref.ref[Tensor]"  # only to know it again
    version: int
    key: Key
    parts: dict["AdaptedLinear", tuple[Sources, Tensor]]

    def is_of(self, x: Tensor, key: Key) -> bool:
        return self.x() is x and self.version == x._version and self.key == key


class Call:
    """One forward call of a model, on one thread."""

    def __init__(self, learn: Callable[[], Known]) -> None:
        self._learn = learn
        self._known: Known | None = None
        self._sources: dict[AdaptedLinear, Sources | None] = {}
        self._asked: dict[AdaptedLinear, None] = {}
        self._folded: set[Key] = set()
        self._joint: _Joint | None = None

    @property
    def known(self) -> Known:
        """Looked up when a layer first asks: a call in which none does costs nothing."""
        if self._known is None:
            self._known = self._learn()
        return self._known

    def sources(self, layer: "AdaptedLinear") -> Sources | None:
        """The layer's, with its D: folded with everyone's when the first one asks. None if it has changed since."""
        sources = self._sources.get(layer, _UNKNOWN)
        if sources is _UNKNOWN:
            sources = self._sources[layer] = sources_of(layer)
        if sources is None:
            return None
        self._asked[layer] = None
        if sources.D is None:
            self._fold(sources)
        return sources if sources.now == _now(sources.weight.device) and sources.are_of(layer) else None

    def _fold(self, first: Sources) -> None:
        batch = [first]
        if first.key not in self._folded:
            self._folded.add(first.key)
            for layer in self.known.layers:
                if layer not in self._sources:
                    self._sources[layer] = sources_of(layer)
            found = [each for each in self._sources.values() if each is not None and each.D is None]
            batch = [each for each in found if each.key == first.key]
        with torch._C._AutoDispatchBelowAutograd():  # no derivative, and no Python between us and the operator
            folded = _ops.fold_many(
                [each.U for each in batch],
                [each.S0 for each in batch],
                [each.s for each in batch],
                [each.o for each in batch],
            )
        for sources, D in zip(batch, folded, strict=True):
            sources.D = D

    def h(self, layer: "AdaptedLinear", x: Tensor, sources: Sources) -> Tensor | None:
        """``x V`` of the layer if its siblings read the same x, all by the product that the first of them made."""
        group = self.known.group.get(layer)
        if group is None or x.device.type not in JOINED_ON or type(x) not in _PLAIN or x.is_inference():
            return None
        joint, key = self._joint, sources.key
        if joint is not None and layer in joint.parts:
            made_of, part = joint.parts.pop(layer)
            if joint.is_of(x, key):
                return part if made_of is sources else None
            self.known.was_wrong(layer)
            return None
        if len(group.members) < 2 or (joint is not None and joint.is_of(x, key)):  # called again with the same x
            return None
        members = {layer: sources}
        for member in group.members:
            found = self._sources.get(member)
            if found is not None and member is not layer and found.key == key:
                members[member] = found
        ranks = [each.V.shape[1] for each in members.values()]
        if len(ranks) < 2 or x.numel() < _ROWS_PER_COLUMN * sum(ranks) * x.shape[-1]:
            return None
        self._forget_joint()
        with torch._C._AutoDispatchBelowAutograd():
            joined = torch.cat([each.V for each in members.values()], 1)
            parts = _ops.down(x.to(joined.dtype), joined).split(ranks, 1)
        waiting = {m: (each, h) for (m, each), h in zip(members.items(), parts, strict=True)}
        _, mine = waiting.pop(layer)
        self._joint = _Joint(weakref.ref(x), x._version, key, waiting)
        return mine

    def _forget_joint(self) -> None:
        joint, self._joint = self._joint, None
        for layer in joint.parts if joint is not None else ():
            self.known.was_wrong(layer)

    def close(self) -> None:
        """The end of the forward."""
        self._forget_joint()
        if self._asked:
            self.known.layers = tuple(self._asked)


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[object, Call]] = []


_calls = _Calls()


def is_seen_through() -> bool:
    """Whether compilers, tracers or transforms look on: for them a layer is a function of its own tensors."""
    return is_watched() or is_transformed() or torch._C._get_tracing_state() is not None


def open_call(owner: object, learn: Callable[[], Known]) -> None:
    """A forward of ``owner`` begins on this thread."""
    # One that is open already was interrupted before its end, or calls itself: in either case it makes nothing more.
    close_call(owner)
    _calls.stack.append((owner, Call(learn)))


def close_call(owner: object) -> None:
    """A forward of ``owner`` ends on this thread, and with it those that began within it; nothing if none is open."""
    stack = _calls.stack
    if any(each is owner for each, _ in stack):
        while True:
            each, call = stack.pop()
            call.close()
            if each is owner:
                return


def linear_together(layer: "AdaptedLinear", x: Tensor) -> Tensor | None:
    """The layer's y within a call, by what is there for all layers; None where it must compute on its own."""
    if torch.compiler.is_compiling() or not _calls.stack or is_seen_through():
        return None
    V = layer._buffers.get("V")
    if V is None or x.device != V.device or x.shape[-1:] != V.shape[:1]:
        return None
    if x.is_cuda and x.numel() <= _DECODED_ROWS * x.shape[-1]:
        return None
    dtype, kind = V.dtype, x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        if torch.get_autocast_dtype(kind) != dtype:
            return None  # it would be the fold of factors that were cast, each for itself
    elif x.dtype != dtype:
        return None
    call = _calls.stack[-1][1]
    if (sources := call.sources(layer)) is None:
        return None
    h = call.h(layer, x, sources)
    base, bias = sources.base, sources.base._parameters.get("bias")
    if x.dtype != dtype:
        x = x.to(dtype)
    cast = None if bias is None or bias.dtype == dtype else bias.to(dtype)
    return _ops.linear_trained(
        x,
        oriented_weight(base),
        bias if cast is None else cast,
        sources.U,
        sources.V,
        sources.S0,
        sources.s,
        sources.o,
        False,
        h,
        sources.D,
    )


__all__ = [
    "JOINED_ON",
    "Call",
    "Group",
    "Known",
    "Shape",
    "Sources",
    "close_call",
    "is_seen_through",
    "linear_together",
    "open_call",
    "siblings",
    "sources_of",
]
