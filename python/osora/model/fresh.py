# SPDX-License-Identifier: Apache-2.0
"""Parts of a model that its checkpoint does not have: a classifier's new head, embeddings that were resized.

They are random, and random otherwise when the model is made again: an adapter that is loaded then meets another model.
transformers marks what it has read; a marked parameter is not asked about, and one without a mark is looked for.
"""

import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from osora.layers.adapted import AdaptedLinear
from osora.layers.base_weight import is_conv1d, is_quantised
from osora.layers.whole_module import WholeModule
from osora.model.targets import base_modules, uncompiled

_READ = "_is_hf_initialized"  # transformers' mark on a parameter that came from the checkpoint


def _files(model: Any) -> list[Path]:
    """The safetensors files that the model was read from, in a folder or in the hub's cache; none if not known."""
    source = str(getattr(model, "name_or_path", "") or "")
    folder = Path(source) if source and Path(source).is_dir() else None
    hub = sys.modules.get("huggingface_hub")
    if source and folder is None and hub is not None:
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        for name in ("model.safetensors", "model.safetensors.index.json"):
            try:
                found = hub.try_to_load_from_cache(source, name, revision=revision)
            except ValueError:  # huggingface_hub's for what is no name of a repository
                return []
            folder = Path(found).parent if isinstance(found, str) else folder
    if folder is None:
        return []
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape in the checkpoint, from its headers; nothing where there is none to read."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in _files(model):
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError):
        return {}
    return shapes


def _stored(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a module's weight there, whose name may have a prefix more or less."""
    key = f"{name}.weight"
    found = (k for k in shapes if k == key or k.endswith(f".{key}") or key.endswith(f".{k}"))
    return next((shapes[k] for k in found), None)


def embeddings_of(model: Any) -> list[nn.Module]:
    """The input embedding and the output head of one of transformers' models, as far as it has them."""
    found = []
    for side in ("input", "output"):
        getter = getattr(model, f"get_{side}_embeddings", None)
        try:
            embedding = getter() if callable(getter) else None
        except NotImplementedError:  # a CLIP has two
            continue
        if isinstance(embedding, nn.Module):
            found.append(embedding.base_layer if isinstance(embedding, AdaptedLinear | WholeModule) else embedding)
    return found


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, module in base_modules(model):
        kind = isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)
        weight = module._parameters.get("weight")
        if kind and weight is not None and not is_quantised(module) and id(weight) not in seen:
            seen.add(id(weight))
            yield name, module


def fresh_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Name → linear layer or embedding that the model's checkpoint does not have as it is here.

    Empty for a model of which nothing is known: one that was made from a config, or that transformers did not read.
    """
    inner: Any = uncompiled(model)
    if not getattr(inner, "name_or_path", None) or not any(getattr(p, _READ, False) for p in inner.parameters()):
        return {}
    shapes, embeddings = _shapes(inner), embeddings_of(inner)
    prefix = f"{getattr(inner, 'base_model_prefix', '') or '?'}."
    found = {}
    for name, module in _candidates(inner):
        stored, weight = _stored(name, shapes), module._parameters["weight"]
        if any(module is embedding for embedding in embeddings):
            resized = stored is not None and weight is not None and stored[:1] != tuple(weight.shape[:1])
            if resized or (stored is None and not getattr(weight, _READ, False) and not shapes):
                found[name] = module
        elif stored is None and not getattr(weight, _READ, False) and (shapes or not name.startswith(prefix)):
            found[name] = module
    return found


def cure_of(lost: Collection[str]) -> str:
    """What to do about them: the adapter's own copy, or a checkpoint that has them."""
    return (
        f"train them whole, so that its file has them, with modules_to_save={sorted(lost)!r} in its config, or save "
        "that base with model.save_pretrained(folder) and load both from there"
    )


def warn_of_fresh(lost: Collection[str], cure: str, stacklevel: int) -> None:
    """One line about parts that neither the checkpoint nor an adapter's file has."""
    if lost:
        warnings.warn(
            f"the checkpoint does not have {', '.join(lost)} as here (new, or resized), nor will an adapter's file: "
            f"on a model made again from that checkpoint, the adapter gives something else; {cure}",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


__all__ = ["cure_of", "embeddings_of", "fresh_parts", "warn_of_fresh"]
