# SPDX-License-Identifier: Apache-2.0
"""Whole tensors put into a copy of a checkpoint: over those of the same name, or as new ones."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from osora.files.base_folder import BaseFolder, BaseFolderError, read_header
from osora.files.whole import finish, temporary_beside

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK = 2**24


def check_puttable(base: BaseFolder, tensors: Mapping[str, Tensor]) -> None:
    """Raise BaseFolderError for a tensor whose place holds values of a dtype that nothing is rounded to, 8 bits say."""
    for key, tensor in tensors.items():
        stored = base.tensors.get(key)
        if (stored is not None and stored.dtype not in _DTYPES) or tensor.dtype not in _NAMES:
            dtype = tensor.dtype if stored is None else stored.dtype
            raise BaseFolderError(f"{key} of {base.folder} is {dtype}: use the checkpoint that it was made from")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _rewrite(path: Path, dropped: Iterable[str], added: Mapping[str, Tensor]) -> None:
    """A safetensors file without the tensors ``dropped``, and with those ``added``; whole or not at all."""
    with path.open("rb") as old, temporary_beside(path) as new:
        length = int.from_bytes(old.read(8), "little")
        header = json.loads(old.read(length))
        entries = {key: header.pop(key) for key in ("__metadata__",) if key in header}
        kept = {key: entry for key, entry in header.items() if key not in set(dropped)}
        found = kept | {
            key: {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [0, t.numel() * t.element_size()]}
            for key, t in added.items()
        }
        sizes = {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in found.items()}
        widths = {key: sizes[key] // max(1, math.prod(entry["shape"])) for key, entry in found.items()}
        # the widest values first, as safetensors does it: each tensor then begins at a multiple of its values' size
        order, end = sorted(found, key=lambda key: -widths[key]), 0
        for key in order:
            entries[key] = {**found[key], "data_offsets": [end, end + sizes[key]]}
            end += sizes[key]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with new.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                if key in added:
                    file.write(_bytes(added[key]))
                    continue
                old.seek(8 + length + kept[key]["data_offsets"][0])
                for begin in range(0, sizes[key], _BLOCK):
                    file.write(old.read(min(_BLOCK, sizes[key] - begin)))
        finish(new)
        os.replace(new, path)


def put_tensors(base: BaseFolder, folder: Path, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Put tensors into ``folder``, which has a copy of the base's files, and into their index.

    Args:
        base: the checkpoint that was copied.
        folder: of the copy.
        tensors: by their names there. Of a name that is there, the values are rounded to that tensor's dtype; the
            shape may be another. A new one goes into the last file, as it is.

    Returns:
        The names of those that were there, and of those that are new.
    """
    there = [key for key in tensors if key in base.tensors]
    new = [key for key in tensors if key not in base.tensors]
    for file in base.files:
        replaced: dict[str, Tensor] = {}
        for key in there:
            stored = base.tensors[key]
            if stored.file != file:
                continue
            value = tensors[key].to(_DTYPES[stored.dtype])
            if tuple(value.shape) == stored.shape:
                with open(folder / file, "r+b") as raw:
                    raw.seek(stored.begin)
                    raw.write(_bytes(value))
                    raw.flush()
                    os.fsync(raw.fileno())
            else:
                replaced[key] = value
        added = {key: tensors[key] for key in new} if file == base.files[-1] else {}
        if replaced or added:
            _rewrite(folder / file, replaced, replaced | added)
    if base.index is not None and (new or there):
        _renew_index(base, folder, new)
    return there, new


def _renew_index(base: BaseFolder, folder: Path, new: Iterable[str]) -> None:
    path = folder / str(base.index)
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(new, base.files[-1])
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        stored = [each for name in base.files for _, each in read_header(folder / name)]
        index["metadata"]["total_size"] = sum(each.end - each.begin for each in stored)
    with temporary_beside(path) as unfinished:
        unfinished.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        finish(unfinished)
        os.replace(unfinished, path)


__all__ = ["check_puttable", "put_tensors"]
