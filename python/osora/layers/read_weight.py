# SPDX-License-Identifier: Apache-2.0
"""What a model gets that reads the weight of an adapted layer itself, instead of calling the layer.

State-space models, WavLM, poolers and others take ``layer.weight`` into a product of their own. What they get stands
for ``W0 + ΔW``: shape, dtype and device are known without any work, as models that look at nothing else expect; the
first function that needs values makes them, and their gradient is that of the adapter.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from osora.layers.base_weight import is_conv1d, is_quantised, oriented_weight
from osora.layers.formulas import Basis, Deltas, Formula
from osora.reference import accumulate_dtype

log = logging.getLogger("osora")


_CALL = nn.Module._call_impl.__code__


def _within_a_module() -> bool:
    """Whether a module is being called now."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


@dataclass
class Readers:
    """The adapted layers of a model whose weights something has read."""

    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Remember a layer, and say so once a model; but not where someone looks at a weight between two forwards."""
        if name in self.names or not _within_a_module():
            return
        self.names.append(name)
        if len(self.names) == 1:
            log.warning(
                "the model reads %s.weight itself instead of calling the layer. It gets W0 + ΔW, which is right, and "
                "costs a product of the weight's size at each read; osora.summary(model) names all such layers",
                name,
            )


@dataclass(frozen=True)
class Place:
    """Where a layer is."""

    name: str = "an adapted layer"
    readers: Readers | None = None


class Source(NamedTuple):
    """Where the values come from."""

    make: Callable[[], Tensor]
    """W0 + ΔW."""
    place: Place


_PROPERTIES = """dtype device shape ndim layout itemsize nbytes requires_grad is_leaf grad_fn is_cuda is_cpu is_meta
    is_sparse is_quantized is_mps is_xpu is_mkldnn is_nested""".split()
_METHODS = """size dim stride numel nelement ndimension element_size is_contiguous is_floating_point is_complex
    get_device __len__""".split()
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_WRITING = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class ReadWeight(Tensor):
    """A weight without values of its own; each function but those of metadata gets :meth:`values`.

    A function of autograd written in Python takes it as it is, and hands its gradient on to the adapter; one in C++ or
    CUDA that reads memory past torch finds none, and says so.
    """

    source: "Source"
    made: dict[bool, Tensor]

    @staticmethod
    def __new__(cls, base: Tensor, source: "Source") -> "ReadWeight":
        """Of the base weight's shape, strides, dtype and device."""
        read: ReadWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        read.source, read.made = source, {}
        return read

    def values(self) -> Tensor:
        """``W0 + ΔW``, with the adapter's derivative where gradients are on."""
        grad = torch.is_grad_enabled()
        if grad not in self.made:
            if (readers := self.source.place.readers) is not None:
                readers.add(self.source.place.name)
            self.made[grad] = self.source.make()
        return self.made[grad]

    def __repr__(self) -> str:  # type: ignore[override]
        """As the tensor that it stands for."""
        return repr(self.values())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Metadata from what is known, everything else on the values."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        writes = name in _WRITING or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if writes and args and isinstance(args[0], ReadWeight):
            raise RuntimeError(
                f"{args[0].source.place.name}.weight is that of an adapted layer, W0 + ΔW, and {name} would write into "
                "it: a model that changes its own weights cannot be adapted there; exclude_modules leaves the layer out"
            )
        args, kwargs = tree_map_only(ReadWeight, ReadWeight.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Of what comes here past :meth:`__torch_function__`, saving and detaching for autograd are expected."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map_only(ReadWeight, ReadWeight.values, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Linked(torch.autograd.Function):
    """The weight as a node of autograd's graph, for functions that look at no more than that."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, source: Source, *tensors: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(*tensors)
        return ReadWeight(base, source)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[2:]
        wanted = [tensor for tensor, yes in zip(ctx.saved_tensors, needed, strict=True) if yes]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.source.make(), wanted, grads[0], allow_unused=True))
        return None, None, *(next(found) if yes else None for yes in needed)


def read_weight(
    base_layer: nn.Module,
    parts: Sequence[tuple[Formula, Basis, Deltas]],
    place: Place,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """``W0 + Σ ΔW`` of adapters on a layer, for a model that reads the weight: in W0's layout, dtype and place.

    It is summed in float32 (float64) and rounded once, as a merge is, when values are asked for; ``check``, if given,
    is called before and may refuse them. A quantised base is given as it is stored.
    """
    weight: Tensor = base_layer.weight  # type: ignore[assignment]
    if is_quantised(base_layer):
        return weight

    def make() -> Tensor:
        if check is not None:
            check()
        total = oriented_weight(base_layer).to(accumulate_dtype(weight.dtype))
        for formula, basis, deltas in parts:
            left, right = formula.traced_factors(basis, deltas)
            total = total + left @ right.to(left.dtype).t()
        total = total.to(weight.dtype)
        return total.t() if is_conv1d(base_layer) else total

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return make()
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func differentiates and batches the sum itself
        return make()
    source = Source(make, place)
    tensors = [weight, *(delta for _, _, deltas in parts for delta in deltas)]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return ReadWeight(weight.detach(), source)
    return _Linked.apply(weight.detach(), source, *tensors)  # type: ignore[no-any-return]
