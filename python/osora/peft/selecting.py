# SPDX-License-Identifier: Apache-2.0
"""Which tensors make an adapter's file: those of a state dict that was given and, of the model, what is known anyway.

PEFT looks for names as pieces of text: an adapter called "0" takes every other one's tensors out of ``layers.0``. Here
a name is a whole part of a key, and every tensor is asked for by the module that it belongs to.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from osora.files.format import BASIS
from osora.layers.base_weight import is_conv1d, is_quantised
from osora.model.fresh import embeddings_of
from osora.model.targets import uncompiled
from osora.peft.layer import AdapterLayer, layers_of
from osora.peft.rollback import wrappers

if TYPE_CHECKING:
    from osora.peft.config import AdapterConfig

_MARK = "_osora_selects"
STASH = "_selected"  # an attribute of a config: what was selected last, for transformers' own save_pretrained
_ROOT = "base_model.model."
_AROUND = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def _plain(key: str) -> str:
    """A key without what wrappers around the model, or around modules in it, have put before and between."""
    key = ".".join(part for part in key.split(".") if part not in _AROUND)
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key.removeprefix(_ROOT)


class Source:
    """Tensors by their names in the bare model: given ones under whatever prefix, and the model's own."""

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Nothing is copied."""
        self.model, self._given = model, given
        self._plain: dict[str, Any] = {}
        for key, value in given.items():
            self._plain.setdefault(_plain(key), value)

    def given(self, key: str) -> Any:
        """What was given for a tensor of the model, None for nothing."""
        for name in (_ROOT + key, key):
            if name in self._given:
                return self._given[name]
        return self._plain.get(_plain(key))

    def own(self, key: str) -> Tensor | None:
        """The model's own, if it has one of that name."""
        parent, _, last = key.rpartition(".")
        try:
            module = self.model.get_submodule(parent)
        except AttributeError:
            return None
        found = module._parameters.get(last)
        return module._buffers.get(last) if found is None else found


@dataclass(frozen=True)
class Selection:
    """The tensors of one adapter."""

    own: dict[str, dict[str, Tensor]]  # layer's name -> kind -> tensor; U and V too where the file has them not
    beside: dict[str, Tensor]  # whole modules, biases, rows, embeddings: name in the file without its root -> tensor
    bases: dict[str, Any]  # layer's name -> its base layer, or its weight [d, k]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")  # a DTensor of FSDP2; a parameter under ZeRO-3


def _checked(key: str, tensor: Any, shape: tuple[int, ...], of: str, whole: bool = True) -> Tensor:
    """The tensor, which must be whole unless anything will do. Raises TypeError or ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{of} has {key} as a {type(tensor).__name__}, and not as a tensor")
    if not whole:
        return tensor.detach()
    if hasattr(tensor, "full_tensor") or tuple(tensor.shape) != tuple(shape):
        if _is_sharded(tensor) or not tensor.numel():
            raise ValueError(
                f"{key} of {of} is sharded over processes: load full_tensor() of every entry of its state_dict into "
                "an unsharded copy of the model and save that, or gather all of them and give save_pretrained a "
                "state_dict"
            )
        raise ValueError(f"{key} of {of} has shape {list(tensor.shape)}, and this adapter's has {list(shape)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{key} of {of} is sparse ({tensor.layout}): give a dense tensor, its to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{key} of {of} is on the meta device and has no values")
    return tensor.detach().contiguous()  # PEFT 0.18 leaves views to safetensors, which refuses them


class _Missing:
    """Of what an adapter trains: what was given, and what was not."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.given = 0
        self.keys: list[str] = []
        self.in_training = False

    def check(self) -> None:
        if self.keys and (self.given or self.in_training):
            raise ValueError(
                f"state_dict lacks {len(self.keys)} of the {len(self.keys) + self.given} tensors that the adapter "
                f"{self.adapter!r} trains, the first of which is {self.keys[0]}: give all of them. (What is frozen "
                "need not be given: basis and S0 are taken from the model.) Nothing was written"
            )


def _layer_tensors(
    layer: AdapterLayer, adapter: str, source: Source, save_basis: bool, missing: _Missing, of: str, whole: bool
) -> dict[str, Tensor]:
    formula, rank = layer.adapters[adapter].formula, layer.box("S0")[adapter].numel()
    d, k = layer.out_features, layer.in_features
    stored, found = layer.basis(adapter)[0].dtype, {}
    for kind, shape in (formula.shapes(d, k, rank) | {"S0": (rank,), "U": (d, rank), "V": (k, rank)}).items():
        key = f"{layer.name}.{layer.method}_{kind}"
        full = f"{key}.{adapter}" + (".weight" if kind in formula.kinds else "")
        value = None if kind in BASIS and not save_basis else source.given(full)
        if value is None and len(layer.adapters) == 1 and (save_basis or kind not in BASIS):
            value = source.given(key + (".weight" if kind in formula.kinds else ""))  # as get_peft_model_state_dict
        trained = kind in formula.trained
        if value is not None:
            value = _checked(full, value, shape, of, whole)
            if not value.is_floating_point():
                raise TypeError(f"{full} of state_dict must be floating-point, got {value.dtype}")
            value = value.to(stored if kind in BASIS else layer.exact)
            missing.given += trained
        else:
            box = layer.box(kind)[adapter]
            live = box.weight if kind in formula.kinds else box
            if trained:
                missing.keys.append(full)
                missing.in_training |= live.requires_grad
            value = _checked(full, live, shape, "the model", whole)
        found[kind] = value
    return found


def _base(layer: AdapterLayer, source: Source) -> Any:
    """What the base weight's fingerprint is of: the live one, or the given one where that is in pieces."""
    live: Any = layer.base_kept[0].weight if layer.base_kept else getattr(layer.base_layer, "weight", None)
    plain = is_quantised(layer.base_layer) or not isinstance(live, Tensor)  # the latter is refused as it is read
    if plain or not (_is_sharded(live) or live.is_meta or not live.numel()):
        return layer.base()
    key, turned = f"{layer.name}.base_layer.weight", is_conv1d(layer.base_layer)
    shape = (layer.in_features, layer.out_features) if turned else (layer.out_features, layer.in_features)
    given = source.given(key)
    weight = _checked(key, live if given is None else given, shape, "the model" if given is None else "state_dict")
    return weight.t() if turned else weight


def _names_beside(model: nn.Module, config: AdapterConfig, adapter: str, embeddings: set[str]) -> dict[str, str]:
    """What is saved beside the layers' tensors: name in the file → name in the model."""
    found: dict[str, str] = {}
    around = wrappers(model)
    for name, wrapper in around.items():
        if adapter in wrapper._adapters:
            there = wrapper.adapter_state_dict_load_map(adapter)
            found |= {f"{name}.{key}": f"{name}.{place}" for key, place in there.items()}

    def is_base(key: str) -> bool:
        """Whether it is of the model as it came, and no adapter's."""
        within = [name for name in around if key.startswith(f"{name}.")]
        return all(key.startswith(f"{name}.original_module.") for name in within)

    plain = set(embeddings)
    if config.bias == "all":
        plain |= {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    elif config.bias != "none":
        biases = {f"{name}.base_layer.bias" for name in layers_of(model, adapter)}
        plain |= {name for name, _ in model.named_parameters() if name in biases}
    return found | {key: key for key in sorted(plain) if is_base(key)}


def select(
    config: AdapterConfig,
    given: Mapping[str, Any] | None,
    embeddings: set[str] | None = None,
    strict: bool = True,
    whole: bool = True,
) -> Selection:
    """All tensors of an adapter that is in a model.

    Args:
        config: its own, which knows the model.
        given: tensors to take in the place of the model's.
        embeddings: names in the model of what PEFT saves of resized embeddings.
        strict: whether all that the adapter trains must be given, or nothing of an adapter that rests.
        whole: whether it is for a file; else pieces of sharded tensors will do, as accelerate asks for them.

    Raises:
        TypeError, ValueError: what is given is not whole; what is not given is in pieces, too.
    """
    if config.home is None:
        raise ValueError("this configuration is of no adapter in a model")
    model, adapter = config.home
    of = "state_dict" if strict else "the model"
    source, layers, missing = Source(model, given or {}), layers_of(model, adapter), _Missing(adapter)
    own = {
        name: _layer_tensors(layer, adapter, source, config.save_basis, missing, of, whole)
        for name, layer in layers.items()
    }
    beside, alone = {}, len(_adapters_in(model)) == 1
    for name, place in _names_beside(model, config, adapter, embeddings or set()).items():
        value, live = source.given(place), source.own(place)
        if value is None and name != place and alone:
            value = source.given(name)
        trained = live is not None and live.requires_grad
        if value is None and trained:
            missing.keys.append(place)
            missing.in_training = True
        missing.given += value is not None and trained
        if value is None and live is None:
            raise ValueError(f"the model has no {place}, which the adapter {adapter!r} is saved with")
        if value is None or not (live is None or _is_sharded(live) or not live.numel()):
            shape = tuple(live.shape)  # type: ignore[union-attr]  # one of the two is there
        else:
            shape = tuple(getattr(value, "shape", ()))  # the live one does not tell
        beside[name] = _checked(place, live if value is None else value, shape, of, whole)
    if strict and given is not None:
        missing.check()
    return Selection(own, beside, {name: _base(layer, source) for name, layer in layers.items()} if whole else {})


def _adapters_in(model: nn.Module) -> set[str]:
    """The names of the adapters in a model's layers and wrappers."""
    found = {name for module in model.modules() if isinstance(module, AdapterLayer) for name in module.adapters}
    return found.union(*(wrapper._adapters for wrapper in wrappers(model).values()))


# -- in the place of PEFT's own ----------------------------------------------------------------------------------------


class _Alone:
    """A model, as PEFT asks it, that seems to have one adapter."""

    def __init__(self, model: Any, adapter: str) -> None:
        self._model, self.peft_config = model, {adapter: model.peft_config[adapter]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _embeddings(original: Callable[..., Any], model: Any, prefix: str, adapter: str, wanted: Any) -> set[str]:
    """Names in the bare model of what PEFT saves of embeddings: it knows whether they were resized."""
    heads: list[Any] = embeddings_of(model)
    heads += [head.get_base_layer() for head in heads if isinstance(head, BaseTunerLayer)]
    places = [f"{name}." for name, module in model.named_modules() if any(module is head for head in heads)]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    everything = {key: tensor.detach() for key, tensor in named}  # a tensor for each name, by which it is known again
    chosen = original(
        _Alone(model, adapter), state_dict=dict(everything), adapter_name=adapter, save_embedding_layers=wanted
    )
    there = {id(tensor) for tensor in chosen.values()}
    return {
        key.removeprefix(prefix)
        for key, tensor in everything.items()
        if id(tensor) in there and key.startswith(tuple(places)) and not _is_adapters(model, key, adapter)
    }


def _is_adapters(model: Any, key: str, adapter: str) -> bool:
    names = [f"{name}." for name, module in model.named_modules() if isinstance(module, AdapterLayer)]
    return any(key.startswith(name) and not key.startswith(f"{name}base_layer.") for name in names)


def _gathered(model: nn.Module) -> dict[str, Any]:
    """What FSDP's first version gives of parameters that it keeps as one; of any other model they are there."""
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return model.state_dict() if flat else {}


def _selecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: Mapping[str, Any] | None = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: Any = "auto",
    ) -> dict[str, Any]:
        if state_dict is not None and not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict of tensors by name, got a {type(state_dict).__name__}")
        options = {"unwrap_compiled": unwrap_compiled, "save_embedding_layers": save_embedding_layers}
        whole = uncompiled(model)
        config: Any = getattr(whole, "peft_config", {}).get(adapter_name)
        home = getattr(config, "home", None)
        prefix = None
        if home is not None and home[1] == adapter_name:
            prefix = next((f"{n}." if n else "" for n, m in whole.named_modules() if m is home[0]), None)
        if prefix is None:
            return original(model, state_dict=state_dict, adapter_name=adapter_name, **options)
        embeddings = _embeddings(original, whole, prefix, adapter_name, save_embedding_layers)
        strict = state_dict is not None
        given = state_dict if strict else _gathered(whole)
        selection = select(config, given, embeddings, strict, whole=strict or _kept.get() is not None)
        if selection.bases:
            _remember(config, selection)
        method = config.method
        found = {
            f"{prefix}{name}.{method}_{kind}" + (".weight" if kind not in (*BASIS, "S0") else ""): tensor
            for name, tensors in selection.own.items()
            for kind, tensor in tensors.items()
            if kind not in BASIS or config.save_basis
        }
        return found | {f"{prefix}{name}": tensor for name, tensor in selection.beside.items()}

    setattr(get_peft_model_state_dict, _MARK, True)
    return get_peft_model_state_dict


def select_tensors() -> None:
    """Have PEFT's ``get_peft_model_state_dict`` do so; of adapters of other methods it gives what it gave."""
    original = peft.get_peft_model_state_dict
    if not hasattr(original, _MARK):
        ours = _selecting(original)
        for module in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
            module.get_peft_model_state_dict = ours  # type: ignore[attr-defined]


# -- from the tensors to what is said of them --------------------------------------------------------------------------

_kept: ContextVar[dict[int, Selection] | None] = ContextVar("selections", default=None)


@contextmanager
def selections_kept() -> Iterator[None]:
    """Within it, what is selected stays until it is described."""
    before = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(before)


def _remember(config: AdapterConfig, selection: Selection) -> None:
    if (kept := _kept.get()) is not None:
        kept[id(config)] = selection
    else:
        config.__dict__[STASH] = _as_long_as_others_have(selection)


def _as_long_as_others_have(selection: Selection) -> Callable[[], Selection | None]:
    own = {name: {kind: weakref.ref(t) for kind, t in group.items()} for name, group in selection.own.items()}
    beside = {name: weakref.ref(tensor) for name, tensor in selection.beside.items()}
    bases = selection.bases

    def again() -> Selection | None:
        found = {name: {kind: ref() for kind, ref in group.items()} for name, group in own.items()}
        others = {name: ref() for name, ref in beside.items()}
        if any(t is None for group in found.values() for t in group.values()) or None in others.values():
            return None
        return Selection(found, others, bases)  # type: ignore[arg-type]

    return again


def selected(config: AdapterConfig) -> Selection:
    """What was selected for the file that is being written; the model's tensors, if nothing was."""
    if (found := (_kept.get() or {}).get(id(config))) is not None:
        return found
    again = config.__dict__.pop(STASH, None)
    return (again() if again is not None else None) or select(config, None)


__all__ = ["STASH", "Selection", "select", "select_tensors", "selected", "selections_kept"]
