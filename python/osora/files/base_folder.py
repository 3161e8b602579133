# SPDX-License-Identifier: Apache-2.0
"""A base model on disk as safetensors files, of which single weights are looked at without loading the model.

A tensor taken from it is the file, mapped into memory: pages are read when they are used, and given back when memory is
short.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from osora.files.format import AdapterError
from osora.files.info import AdapterInfo, SavedModule
from osora.files.renamed import Renamed, renamed
from osora.layers import fingerprint

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


class BaseFolderError(ValueError):
    """A folder that is no checkpoint in safetensors files, or a damaged one."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its file's name in the folder, and its bytes in that file."""

    file: str
    dtype: str
    """As safetensors names it: F32, BF16."""
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Place:
    """A module's weight in a checkpoint: the tensor's name there, and whether it is stored as [in, out]."""

    key: str
    transposed: bool


def read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Tensor name → where it is, of each tensor in a safetensors file. Raises BaseFolderError."""
    try:
        with safe_open(path, framework="pt") as file:  # checks the whole header, offsets against the size included
            keys = list(file.keys())
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseFolderError(f"{path} is no readable safetensors file: {error}") from error
    for key in keys:
        begin, end = header[key]["data_offsets"]
        where = 8 + length
        yield key, Stored(path.name, header[key]["dtype"], tuple(header[key]["shape"]), where + begin, where + end)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseFolderError(f"{path} is not valid JSON: {error}") from error


def _shards(folder: Path) -> tuple[list[str], str | None]:
    """Names of the safetensors files, and of their index if there is one."""
    if (folder / SINGLE).is_file():
        return [SINGLE], None
    indices = sorted(path.name for path in folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise BaseFolderError(
            f"{folder} has several checkpoints ({', '.join(indices)}): leave one of their indices there"
        )
    if indices:
        index = _json(folder / indices[0])
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            raise BaseFolderError(f"{folder / indices[0]} has no weight_map")
        files = sorted({str(name) for name in names.values()})
        for name in files:
            if Path(name).name != name or not (folder / name).is_file():
                raise BaseFolderError(f"{folder / indices[0]} names {name!r}, which is no file beside it")
        return files, indices[0]
    alone = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if len(alone) == 1:
        return alone, None
    raise BaseFolderError(
        f"{folder} holds no checkpoint in safetensors files ({SINGLE}, or shards with an index): osora reads no "
        "pickled weights; load the model with transformers and write it anew with model.save_pretrained(folder)"
    )


class BaseFolder:
    """The weights of a checkpoint folder, one file or shards with an index.

    Args:
        folder: as ``model.save_pretrained`` writes it, or a downloaded snapshot of the hub.

    Raises:
        FileNotFoundError: no such folder.
        BaseFolderError: no safetensors in it, a damaged file, or an index that does not fit them.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read the headers alone."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no folder: a folder with a checkpoint in it is needed")
        self.files, self.index = _shards(self.folder)
        self.tensors: dict[str, Stored] = {}
        for name in self.files:
            for key, stored in read_header(self.folder / name):
                if key in self.tensors:
                    raise BaseFolderError(f"{key} is in {self.tensors[key].file} and in {name}")
                self.tensors[key] = stored
        if self.index is not None:
            listed = _json(self.folder / self.index)["weight_map"]
            for key, file in listed.items():
                if key not in self.tensors or self.tensors[key].file != file:
                    raise BaseFolderError(f"{self.folder / self.index} says that {key} is in {file}, and it is not")

    def tensor(self, key: str) -> Tensor:
        """The tensor in its file, which is mapped, not read."""
        with safe_open(self.folder / self.tensors[key].file, framework="pt") as file:
            return file.get_tensor(key)

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``, or nothing where there is none."""
        path = self.folder / "config.json"
        found = _json(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def rules(self) -> Renamed:
        """How transformers names the tensors in the model; asked once."""
        return renamed(self.folder, self.tensors)

    def as_in_model(self) -> dict[str, str]:
        """The name in its model, as transformers makes it → the name here, of all tensors that are kept as they are."""
        rules = self.rules
        sources = {*rules.keys.values(), *(key for keys in rules.made.values() for key in keys)}
        return rules.keys | {key: key for key in self.tensors if key not in sources}

    # -- an adapter's modules --

    def _fits(self, module: SavedModule, key: str | None) -> bool:
        wanted = (module.out_features, module.in_features)
        stored = self.tensors.get(key or "")
        return stored is not None and stored.shape in (wanted, wanted[::-1])

    def _mappings(self, modules: tuple[SavedModule, ...], known: Mapping[str, str]) -> list[dict[str, str]]:
        """Module name → tensor name, in each way that fits; ``known`` are tensors' names, as the model has them."""
        names = [module.name for module in modules]
        exact = {name: f"{name}.weight" for name in names}
        if all(key in known for key in exact.values()):
            return [{name: known[key] for name, key in exact.items()}]
        found: set[tuple[str, str]] = set()
        first = names[0].split(".")
        for dropped in range(len(first)):
            old, rest = "".join(f"{part}." for part in first[:dropped]), ".".join(first[dropped:]) + ".weight"
            if not all(name.startswith(old) for name in names):
                break
            for key in known:
                if key != rest and not key.endswith(f".{rest}"):
                    continue
                new = key.removesuffix(rest)
                if all(self._fits(m, known.get(f"{new}{m.name.removeprefix(old)}.weight")) for m in modules):
                    found.add((old, new))
        mappings = [
            {name: known[f"{new}{name.removeprefix(old)}.weight"] for name in names} for old, new in sorted(found)
        ]
        return [m for i, m in enumerate(mappings) if m not in mappings[:i]]

    def _keys(self, modules: tuple[SavedModule, ...]) -> dict[str, str]:
        """Module name → tensor name. A checkpoint may lack the prefix of the model's names, or have one more.

        Where that finds nothing, transformers is asked how it renames the checkpoint's tensors.
        """
        different = self._mappings(modules, {key: key for key in self.tensors})
        if not different:
            rules = self.rules
            different = self._mappings(modules, rules.keys)
            if not different:
                self._refuse(modules, rules)
        if len(different) == 1:
            return different[0]
        first = modules[0].name
        raise AdapterError(
            f"{self.folder} has several sets of weights for the adapter's modules: {first} could be "
            + " or ".join(m[first] for m in different)
        )

    def _refuse(self, modules: tuple[SavedModule, ...], rules: Renamed) -> NoReturn:
        for module in modules:
            for key, sources in rules.made.items():
                if f".{key}".endswith(f".{module.name}.weight"):
                    raise AdapterError(
                        f"the adapter is for {module.name}, whose weight transformers computes from "
                        f"{', '.join(sources[:3])} of {self.folder} as it loads: save the model anew with "
                        "model.save_pretrained(folder, save_original_format=False), and take that folder"
                    )
        known = self.tensors.keys() | rules.keys.keys()
        missing = next((m.name for m in modules if f"{m.name}.weight" not in known), modules[0].name)
        raise AdapterError(f"the adapter is for {missing}, and {self.folder} has no weight of that name{rules.note}")

    def _orientation(self, module: SavedModule, key: str) -> bool:
        """Whether the weight is stored as [in, out]. Of a square one the fingerprint tells."""
        wanted, shape = (module.out_features, module.in_features), self.tensors[key].shape
        if shape not in (wanted, wanted[::-1]):
            raise AdapterError(
                f"the adapter's {module.name} is {list(wanted)}, {key} of {self.folder} is {list(shape)}"
            )
        if wanted[0] != wanted[1]:
            return shape != wanted
        weight = self.tensor(key)
        if not weight.is_floating_point():
            return False  # refused later, as a quantised weight
        for turned in (False, True):
            if fingerprint.weight_digest(weight.t() if turned else weight) == module.weight_sha256:
                return turned
        off = []
        for turned in (False, True):
            now = fingerprint.weight_sketch(weight.t() if turned else weight, module.name)
            off.append(max(abs(a - b) for a, b in zip(now, module.weight_sketch, strict=True)))
        return off[1] < off[0]

    def places(self, info: AdapterInfo) -> dict[str, Place]:
        """Module name → where its weight is.

        Raises:
            AdapterError: a weight is not there or has another shape.
        """
        keys = self._keys(info.modules)
        return {m.name: Place(keys[m.name], self._orientation(m, keys[m.name])) for m in info.modules}

    def keys_of(self, names: Iterable[str], places: Mapping[str, Place]) -> dict[str, str]:
        """Names of tensors in the model → their names here, be they here or not; ``places`` tell how names differ."""
        module, place = next(iter(places.items()))
        theirs, ours = f"{module}.weight".split("."), place.key.split(".")
        while theirs and ours and theirs[-1] == ours[-1]:
            theirs.pop(), ours.pop()
        old, new = ("".join(f"{part}." for part in parts) for parts in (theirs, ours))
        found, rules = {}, None
        for name in names:
            moved = new + name.removeprefix(old) if name.startswith(old) else name
            key = next((each for each in (moved, name) if each in self.tensors), None)
            if key is None:
                rules = self.as_in_model() if rules is None else rules
                key = rules.get(name, moved)
            found[name] = key
        return found

    def stand_in(self, places: Mapping[str, Place]) -> nn.Module:
        """A model of nothing but the named linear layers, with their weights in the files: to load an adapter on."""
        root = nn.Module()
        for name, place in places.items():
            weight = self.tensor(place.key)
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise AdapterError(
                    f"{place.key} of {self.folder} is {self.tensors[place.key].dtype}, a quantised weight: use the "
                    "checkpoint it was made from"
                )
            with torch.device("meta"):
                layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(weight.t() if place.transposed else weight, requires_grad=False)
            layer.out_features, layer.in_features = layer.weight.shape
            *parents, last = name.split(".")
            parent = root
            try:
                for part in parents:
                    if part not in parent._modules:
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.add_module(last, layer)
            except (KeyError, AttributeError) as error:
                raise AdapterError(f"{name!r} cannot be the name of a module: {error}") from error
        return root
