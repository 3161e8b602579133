# SPDX-License-Identifier: Apache-2.0
"""Quantised linear layers as bases: what their storage stands for, read without being touched (docs/quantised.md).

bitsandbytes' 4-bit and 8-bit layers are known. A layer's kind is read from its class: the storage alone deceives, since
four-bit codes may lie in a tensor that says it is float32.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from osora.reference import FLOATS

_ROWS = 2**22  # entries unpacked at a time

# Where quantised linear layers come from that are not supported: the first part of their class's module, or of their
# weight's.
_FOREIGN = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "gptqmodel": "GPTQ or AWQ",
    "hqq": "HQQ",
    "optimum": "Quanto",
    "quark": "Quark",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


@dataclass
class Kept:
    """A base layer's own weight and state while a merged one stands in its place."""

    weight: nn.Parameter
    state: dict[str, Any] = field(default_factory=dict)  # attribute of the layer -> what it was


class Kind(Protocol):
    """One way in which a linear layer stores its weight."""

    def name(self, module: nn.Module) -> str:
        """For people and files: ``bnb-nf4``, ``bnb-fp4``, ``bnb-int8``."""

    def check(self, module: nn.Module) -> None:
        """Raise ValueError or TypeError for a layer that is not ready, saying what to do."""

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating-point type that the basis of an adapter is kept in."""

    def dense(self, module: nn.Module) -> Tensor:
        """The weight that the storage stands for: [out_features, in_features], float32, a new tensor."""

    def digest(self, module: nn.Module) -> str:
        """SHA-256 of the codes, hexadecimal: the same however the layer packs them."""

    def replace(self, module: nn.Module, weight: Tensor, keep: Callable[[Kept], None]) -> None:
        """Put ``weight`` [out_features, in_features] in, quantised as its own, after ``keep`` has what is there."""

    def check_gradient(self, module: nn.Module) -> None:
        """Raise RuntimeError where the layer, as it is now, would give its x a wrong gradient."""


def _hash(label: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(label.encode())
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu").contiguous().numpy().data)
    return digest.hexdigest()


class Bnb4bit:
    """``bitsandbytes.nn.Linear4bit``: blocks of codes of 4 bits (nf4 or fp4), each with a scale.

    On a CPU with AVX512-BF16, bitsandbytes packs the codes in another order at the first forward in eval mode, and
    rounds the scales to bfloat16. Its own ``dequantize_4bit`` reads that order wrongly; here both are read.
    """

    @staticmethod
    def _state(module: Any) -> Any:
        # FSDP may replace the parameter by a plain one; the layer has its state too
        state = getattr(module.weight, "quant_state", None)
        return getattr(module, "quant_state", None) if state is None else state

    def name(self, module: Any) -> str:
        """``bnb-nf4`` or ``bnb-fp4``."""
        state = self._state(module)
        return f"bnb-{module.weight.quant_type if state is None else state.quant_type}"

    def check(self, module: Any) -> None:
        """Raise where the weights are not there or not quantised yet."""
        state, weight = self._state(module), module.weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise ValueError("it is on the meta device and has no values: load the weights first")
        if state is None:
            raise ValueError("it is not quantised yet: move the model to its device first, model.to(device)")
        if len(state.shape) != 2:
            raise ValueError(f"its quantised weight has shape {list(state.shape)}, and must be a matrix")

    def shape(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        d, k = self._state(module).shape
        return int(d), int(k)

    def dtype(self, module: Any) -> torch.dtype:
        """That of the weight before it was quantised, which a model's other weights have."""
        state = self._state(module)
        packed = getattr(state, "packing_format_for_cpu", False)
        return state.original_dtype if packed else state.dtype

    @torch.no_grad()
    def dense(self, module: Any) -> Tensor:
        """[d, k] float32, a new tensor."""
        from bitsandbytes import functional

        state, stored = self._state(module), module.weight.detach()
        if not getattr(state, "packing_format_for_cpu", False):
            wide = copy.copy(state)  # the state's own dtype would round what the codes and scales stand for
            wide.dtype = torch.float32
            return functional.dequantize_4bit(stored.as_subclass(Tensor).reshape(-1, 1), wide)
        codes, table = self._codes(module), state.code.float()
        scales = state.absmax.t().float()  # [d, k / blocksize]
        d, k = codes.shape
        dense = torch.empty(d, k, device=codes.device)
        rows = max(1, _ROWS // k)
        for begin in range(0, d, rows):
            part = slice(begin, begin + rows)
            values = table[codes[part].int()].view(-1, scales.shape[1], state.blocksize)
            dense[part] = (values * scales[part, :, None]).flatten(1)
        return dense

    def _codes(self, module: Any) -> Tensor:
        """[d, k] uint8, one code an entry, in the weight's order."""
        state = self._state(module)
        stored = module.weight.detach().as_subclass(Tensor)
        d, k = self.shape(module)
        stored = stored.contiguous().view(torch.uint8)
        if not getattr(state, "packing_format_for_cpu", False):
            halves = torch.stack([stored.flatten() >> 4, stored.flatten() & 15], 1)
            return halves.flatten()[: d * k].view(d, k)
        # 32 bytes hold two columns of 32 rows: the first rows' 32 codes in the low halves, the others' in the high ones
        groups = stored.view(-1, 32)
        columns = torch.cat([groups & 15, groups >> 4], 1)
        return columns.view(d // 32, k // 2, 32, 2).transpose(1, 2).reshape(d, k)

    def digest(self, module: Any) -> str:
        """SHA-256 of the codes."""
        # not the scales: bitsandbytes itself rounds and nests them again. A sketch of the weight sees to them.
        d, k = self.shape(module)
        return _hash(f"{self.name(module)}|{d}|{k}|{self._state(module).blocksize}|", self._codes(module))

    @torch.no_grad()
    def replace(self, module: Any, weight: Tensor, keep: Callable[[Kept], None]) -> None:
        """Quantised as the layer's own weight is."""
        from bitsandbytes.nn import Params4bit

        state, old = self._state(module), module.weight
        nested = state.original_nested if getattr(state, "packing_format_for_cpu", False) else state.nested
        new = Params4bit(
            weight.contiguous(),
            requires_grad=False,
            compress_statistics=nested,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            quant_storage=module.quant_storage,
        ).to(weight.device)
        new.quant_state.dtype = self.dtype(module)  # it was quantised from float32, without a rounding in between
        keep(Kept(old, {"quant_state": module.quant_state}))
        module.weight, module.quant_state = new, new.quant_state

    def check_gradient(self, module: Any) -> None:
        """Raise RuntimeError for the order of codes that has a product without a derivative."""
        if getattr(self._state(module), "packing_format_for_cpu", False):
            raise RuntimeError(
                "bitsandbytes has packed this 4-bit weight for inference on a CPU, in a forward in eval mode before "
                "the adapter came, and gives no gradient through it: load the base model again and attach the adapter "
                "before the first forward"
            )


class Bnb8bit:
    """``bitsandbytes.nn.Linear8bitLt``: int8 codes, with a scale for each row.

    Columns of x with an outlier run in 16 bits; the weight is the same for them, and so is the adapter's branch.
    """

    @staticmethod
    def _scales(module: Any) -> Tensor | None:
        # the first forward moves them from the weight to the layer's state
        scales = getattr(module.weight, "SCB", None)
        return module.state.SCB if scales is None else scales

    def _own_scales(self, module: Any) -> Tensor:
        scales = self._scales(module)
        if scales is None:
            raise ValueError("the 8-bit weight has lost its scales (SCB): load the model anew")
        return scales

    def name(self, module: Any) -> str:
        """``bnb-int8``."""
        return "bnb-int8"

    def check(self, module: Any) -> None:
        """Raise where the weights are not there or not quantised yet."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        if module.state.has_fp16_weights:
            raise ValueError(
                "it has has_fp16_weights=True, which keeps a 16-bit weight and quantises it in each forward: make it "
                "with has_fp16_weights=False"
            )
        if weight.is_meta:
            raise ValueError("it is on the meta device and has no values: load the weights first")
        if weight.dtype != torch.int8 or self._scales(module) is None:
            raise ValueError("it is not quantised yet: move the model to its device first, model.to(device)")

    def shape(self, module: Any) -> tuple[int, int]:
        """(out_features, in_features)."""
        d, k = module.weight.shape
        return int(d), int(k)

    def dtype(self, module: Any) -> torch.dtype:
        """The bias's; without one float16, which is what bitsandbytes quantised the weight from."""
        bias = module.bias
        return bias.dtype if isinstance(bias, Tensor) and bias.dtype in FLOATS[1:] else torch.float16

    @torch.no_grad()
    def dense(self, module: Any) -> Tensor:
        """[d, k] float32, a new tensor."""
        codes, scales = module.weight.detach().as_subclass(Tensor), self._own_scales(module)
        return codes.float() * (scales.to(codes.device, torch.float32)[:, None] / 127)

    def digest(self, module: Any) -> str:
        """SHA-256 of the codes and their scales."""
        scales = self._own_scales(module)
        codes = module.weight.detach().as_subclass(Tensor)
        d, k = self.shape(module)
        return _hash(f"{self.name(module)}|{d}|{k}|", codes, scales.float())

    @torch.no_grad()
    def replace(self, module: Any, weight: Tensor, keep: Callable[[Kept], None]) -> None:
        """Quantised as the layer's own weight is."""
        from bitsandbytes import functional
        from bitsandbytes.nn import Int8Params

        half = weight.to(torch.float16)
        if not bool(half.isfinite().all()):
            raise ValueError("merging gives weights beyond float16, from which bitsandbytes quantises to 8 bits")
        codes, scales, _ = functional.int8_vectorwise_quant(half)
        state = copy.copy(module.state)
        state.reset_grads()
        keep(Kept(module.weight, {"state": module.state}))
        module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
        module.state = state

    def check_gradient(self, module: Any) -> None:
        """Nothing to refuse."""


_KINDS: dict[str, Kind] = {"Linear4bit": Bnb4bit(), "Linear8bitLt": Bnb8bit()}


_known: dict[type, Kind | None] = {}  # asked in each forward


def _kind_of_class(layer: type) -> Kind | None:
    if layer not in _known:
        names = (c.__name__ for c in layer.__mro__ if c.__module__.startswith("bitsandbytes.") and c.__name__ in _KINDS)
        name = next(names, None)
        _known[layer] = None if name is None else _KINDS[name]
    return _known[layer]


def kind_of(module: Any) -> Kind | None:
    """How a layer's weight is quantised; None for one that is not, or not in a way known here."""
    return module.kind if isinstance(module, AsItWas) else _kind_of_class(type(module))


class AsItWas:
    """A layer whose weight was replaced, as it was before: for whoever reads its weight."""

    def __init__(self, module: nn.Module, kept: Kept) -> None:
        """Nothing is copied."""
        self.kind, self.of = kind_of(module), type(module)
        self.weight, self.bias = kept.weight, module.bias
        for name, value in kept.state.items():
            setattr(self, name, value)


def restore(module: nn.Module, kept: Kept) -> None:
    """Undo :meth:`Kind.replace`: the very weight and state that were there."""
    module.weight = kept.weight
    for name, value in kept.state.items():
        setattr(module, name, value)


_PACKS = "support_avx512bf16_for_cpu"  # of Linear4bit: whether an eval forward on the CPU may pack its codes anew


def keep_order(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU; gives the layers that might have been.

    A packed weight has rounded scales and no derivative, so that after the first evaluation training would go wrong.
    """
    layers = [module for module in model.modules() if kind_of(module) is not None and getattr(module, _PACKS, False)]
    for layer in layers:
        setattr(layer, _PACKS, False)
    return layers


def allow_packing(layers: Iterable[nn.Module]) -> None:
    """Undo :func:`keep_order`."""
    for layer in layers:
        setattr(layer, _PACKS, True)


def unsupported(module: nn.Module) -> str | None:
    """What quantises a linear layer that cannot be a base; None for every other module."""
    if kind_of(module) is not None:
        return None
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    for thing in (module, weight):
        if thing is not None and type(thing).__module__.split(".")[0] in _FOREIGN:
            if thing is weight or "linear" in type(thing).__name__.lower():
                return _FOREIGN[type(thing).__module__.split(".")[0]]
    if "linear" not in type(module).__name__.lower():
        return None
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return f"a {type(weight).__name__} of bitsandbytes outside its own layer"
    if hasattr(module, "qweight") or hasattr(module, "W_q"):
        return f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(weight, Tensor) and weight.dtype not in FLOATS:
        return f"{type(module).__module__}.{type(module).__qualname__} with a weight in {weight.dtype}"
    return None


def refuse_unsupported(name: str, module: nn.Module) -> None:
    """Raise TypeError for a quantised layer that cannot be a base, naming it and the cures."""
    if (by := unsupported(module)) is not None:
        raise TypeError(
            f"{name} is quantised by {by}, which osora does not read; it takes bitsandbytes' Linear4bit and "
            "Linear8bitLt, and layers that are not quantised: dequantise the model (model.dequantize() of "
            f"transformers), or leave it out with exclude_modules=[{name.rsplit('.', 1)[-1]!r}]"
        )
