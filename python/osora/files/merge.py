# SPDX-License-Identifier: Apache-2.0
"""An adapter merged into a checkpoint on disk: a new checkpoint, one weight at a time, without the model."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from osora.files.base_folder import BaseFolder, BaseFolderError, Place
from osora.files.format import CONFIG_FILE
from osora.files.info import info_of_saved
from osora.files.load import load_layers
from osora.files.put_tensors import check_puttable, put_tensors
from osora.files.tensors import read_adapter
from osora.files.whole import new_folder, refuse_unreplaceable, sync
from osora.layers.adapted import AdaptedLinear
from osora.model.state import all_layers

# Weights in other formats would be the base's still, beside the merged ones: they are left out, and so is the card.
# By an adapter's config transformers would take the folder for that adapter's.
_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors", ".tflite"}
_CARD = "README.md"


@dataclass(frozen=True)
class MergedFolder:
    """What :func:`merge_saved` wrote."""

    folder: Path
    merged: tuple[str, ...]
    """Names of the tensors that were changed: merged into, or those of a module that was trained whole."""
    copied: tuple[str, ...]
    """Files that are the base's, byte for byte."""
    left_out: tuple[str, ...]
    """Files of the base that were not taken over: weights in other formats, the model card, configs of adapters, hidden
    files."""
    added: tuple[str, ...] = ()
    """Names of the tensors of modules trained whole that the base does not have: a new head's."""


def _merged_bytes(layer: AdaptedLinear, place: Place) -> memoryview:
    layer.merge()
    try:
        weight = layer.weight.detach()
    finally:
        layer.unmerge()
    weight = weight.t() if place.transposed else weight
    return weight.contiguous().view(torch.uint8).flatten().numpy().data


def _copy_rest(base: BaseFolder, to: Path) -> tuple[list[str], list[str]]:
    copied, left_out = [], []
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder)
        if path.is_dir() or str(name) in base.files:
            continue
        hidden = any(part.startswith(".") for part in name.parts)
        index = name.name.endswith(".index.json") and str(name) != base.index
        if hidden or index or name.suffix.lower() in _WEIGHTS or str(name) == _CARD or name.name == CONFIG_FILE:
            left_out.append(str(name))
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
        sync(to / name)
        copied.append(str(name))
    return copied, left_out


def merge_saved(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_memory: int | None = None,
    progress: bool | None = None,
    on_weight: Callable[[int, int], None] | None = None,
) -> MergedFolder:
    """Write a copy of a checkpoint with an adapter merged in: ``W0 + ΔW``, summed in float32 and rounded once.

    The bits are those of :func:`osora.merge` on the model loaded in the checkpoint's dtype. The model is never
    loaded: one weight is held at a time, beside the adapter. Modules that the adapter trained whole take the place of
    the base's, or stand beside what it has: a new head's ``num_labels`` is not in the config, and is to be given as for
    the base. ``out`` appears when all of it is on the disk.

    Args:
        base: folder of the checkpoint that the adapter was trained on, in safetensors files, with or without an index.
        adapter: what :func:`osora.save_adapter` wrote.
        out: the new folder. It must not exist, or be empty.
        max_memory: bytes that computing a basis again may take, as for :func:`osora.attach`.
        progress: a progress bar while a basis is computed again; by default only on a terminal.
        on_weight: called with the number of weights merged so far and of all.

    Raises:
        FileNotFoundError: no adapter, or no base folder.
        FileExistsError: ``out`` is there already, and not empty or no folder that can be replaced.
        AdapterError: a damaged adapter; another base; what :func:`osora.load_adapter` refuses.
        ValueError: ``base`` is no checkpoint in safetensors files (``BaseFolderError``); a merged weight would be NaN
            or infinite, naming it.
    """
    out = Path(out)
    refuse_unreplaceable(out)  # before any work
    saved = read_adapter(adapter)
    info = info_of_saved(adapter, saved)
    checkpoint = BaseFolder(base)
    if out.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise BaseFolderError(f"{out} is within the base's folder {checkpoint.folder}: choose another one")
    places = checkpoint.places(info)
    model = checkpoint.stand_in(places)
    load_layers(model, saved, max_memory=max_memory, progress=progress)
    layers = all_layers(model)
    wholes = saved.whole
    trained = {f"{name}.{key}": tensor for name, values in wholes.items() for key, tensor in values.items()}
    keys = checkpoint.keys_of(trained, places)
    whole = {keys[name]: tensor for name, tensor in trained.items()}
    check_puttable(checkpoint, whole)
    done = 0
    with new_folder(out) as unfinished:
        for name in checkpoint.files:
            shutil.copyfile(checkpoint.folder / name, unfinished / name)
            with open(unfinished / name, "r+b") as file:
                for module, layer in layers.items():
                    stored = checkpoint.tensors[places[module].key]
                    if stored.file != name:
                        continue
                    try:
                        new = _merged_bytes(layer, places[module])
                    except ValueError as error:
                        raise ValueError(f"{module}: {error}") from error
                    assert len(new) == stored.end - stored.begin
                    file.seek(stored.begin)
                    file.write(new)
                    done += 1
                    if on_weight is not None:
                        on_weight(done, len(layers))
                file.flush()
                os.fsync(file.fileno())
        copied, left_out = _copy_rest(checkpoint, unfinished)
        replaced, added = put_tensors(checkpoint, unfinished, whole)
        copied = [name for name in copied if not (whole and name == checkpoint.index)]
    merged = [places[name].key for name in layers] + replaced
    return MergedFolder(out, tuple(merged), tuple(copied), tuple(left_out), tuple(added))
