# SPDX-License-Identifier: Apache-2.0
"""An adapter's two files (docs/format.md): read and checked by themselves, written whole or not at all.

``adapter_config.json`` is a configuration that PEFT reads, with a block ``"osora"`` that says which base weights and
which tensors belong to it; ``adapter_model.safetensors`` names the tensors as PEFT does. Nothing here knows a model.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osora.files import fingerprint
from osora.files.whole import finish, temporary_beside
from osora.reference import FLOATS

FORMAT_VERSION = 2
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
BLOCK = "osora"
_ROOT = "base_model.model."  # what PEFT puts before a module's name

# Of PEFT's own options. The first change nothing that is in the files, the others mean tensors that are not osora's.
PEFT_RECORDS = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode "
    "save_basis init_weights layers_pattern".split()
)
PEFT_EXTRAS = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}


class AdapterError(ValueError):
    """An adapter that cannot be loaded as it is: damaged, of another format, or made for another base."""


@dataclass(frozen=True)
class Method:
    """What a method keeps of a layer: tensors it trains, and where their shapes come from."""

    name: str
    trained: tuple[str, ...]

    @property
    def peft_type(self) -> str:
        """Its name in PEFT."""
        return self.name.upper()

    @property
    def values(self) -> tuple[str, ...]:
        """The kinds of tensors that every file has."""
        return (*self.trained, "S0")

    def key(self, module: str, kind: str) -> str:
        """The name of a tensor in the file."""
        return f"{_ROOT}{module}.{self.name}_{kind}" + (".weight" if kind in self.trained else "")


FILE_METHODS = {method.name: method for method in (Method("osora", ("o", "s")), Method("sorsa", ("u", "s", "v")))}
BASIS = ("U", "V")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_SHAPES = {"o": "d", "s": "r", "u": "dr", "v": "kr", "S0": "r", "U": "dr", "V": "kr"}


def shape_of(kind: str, d: int, k: int, r: int, on_input: bool = False) -> tuple[int, ...]:
    """The shape of a tensor for a weight [d, k] at rank r; o is [k] where O is on the input side."""
    if kind == "o" and on_input:
        return (k,)
    sizes = {"d": d, "k": k, "r": r}
    return tuple(sizes[letter] for letter in _SHAPES[kind])


_MODULE_FIELDS = {
    "name": str,
    "rank": int,
    "out_features": int,
    "in_features": int,
    "dtype": str,
    "weight_sha256": str,
    "weight_sketch": list,
    "delta_sketch": list,
    "basis_sketch": list,
    "values_sha256": str,
    "basis_sha256": str,
    "max_residual": float,
    "passes": int,
    "converged": bool,
    "method": str,
}

_SIZES = ("rank", "out_features", "in_features")


@dataclass(frozen=True)
class Description:
    """A valid ``adapter_config.json``."""

    path: Path
    method: Method
    options: dict[str, Any]  # what is beside the block: the method's options, and PEFT's
    save_basis: bool
    modules: dict[str, dict[str, Any]]  # by name, in the file's order

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors that the file has of each module."""
        return self.method.values + (BASIS if self.save_basis else ())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the method and its shape, by its name in the file."""
        on_input = self.options.get("side") == "input"
        return {
            self.method.key(name, kind): shape_of(
                kind, item["out_features"], item["in_features"], item["rank"], on_input
            )
            for name, item in self.modules.items()
            for kind in self.kinds
        }

    def contents(self) -> dict[str, Any]:
        """What the file says."""
        modules = list(self.modules.values())
        block = {"format_version": FORMAT_VERSION, "save_basis": self.save_basis, "modules": modules}
        return self.options | {BLOCK: block}

    def extras(self) -> dict[str, Any]:
        """The options in force that stand for tensors of PEFT's own: trained biases, whole modules, tokens."""
        found = {key: self.options.get(key, unset) for key, unset in PEFT_EXTRAS.items()}
        return {key: value for key, value in found.items() if value != PEFT_EXTRAS[key] and value not in (None, [], {})}


@dataclass(frozen=True)
class SavedAdapter:
    """Both files, read and checked: module name → kind → tensor."""

    description: Description
    tensors: dict[str, dict[str, Tensor]]


# -- read ------------------------------------------------------------------------------------------------------------


def _is_sketch(value: Any) -> bool:
    return len(value) == fingerprint.PROBES and all(isinstance(v, float) and math.isfinite(v) for v in value)


def _is_size(value: Any) -> bool:
    return 0 <= value <= sys.float_info.max  # an int may be beyond every float


def read_json(path: Path) -> dict[str, Any]:
    """The object in a configuration's file. Raises FileNotFoundError, or AdapterError for no JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter here: {path} does not exist")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def read_description(folder: str | os.PathLike[str]) -> Description:
    """The configuration of the adapter in ``folder``.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: it is not one of osora's, or not complete and well-formed.
    """
    path = Path(folder) / CONFIG_FILE
    return described(read_json(path), path)


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter of osora's is in ``folder``, or what is left of one."""
    try:
        return BLOCK in read_json(folder / CONFIG_FILE)
    except (FileNotFoundError, AdapterError):
        return False


def described(config: Mapping[str, Any], path: Path) -> Description:
    """The contents of an ``adapter_config.json``, checked; ``path`` is for messages. Raises AdapterError."""
    options = dict(config)
    block = options.pop(BLOCK, None)
    if "format_version" in options and "peft_type" not in options:
        raise AdapterError(
            f"{path} has format_version {options['format_version']!r}, of before osora's first release; this osora "
            f"reads {FORMAT_VERSION}: train the adapter again"
        )
    peft_type = options.get("peft_type")
    method = next((each for each in FILE_METHODS.values() if each.peft_type == peft_type), None)
    if method is None:
        raise AdapterError(f"{path} describes no osora adapter: peft_type is {peft_type!r}")
    if not isinstance(block, dict):
        raise AdapterError(
            f'{path} has no block "{BLOCK}": it says how an adapter is to be made, but was not written with one'
        )
    if block.get("format_version") != FORMAT_VERSION or isinstance(block["format_version"], bool):
        raise AdapterError(
            f"{path} has format_version {block.get('format_version')!r}, this osora reads {FORMAT_VERSION}: "
            "use the version of osora that wrote it, or a newer one"
        )
    for key, kind in {"save_basis": bool, "modules": list}.items():
        if not isinstance(block.get(key), kind):
            raise AdapterError(f"{path}: {key} is missing or no {kind.__name__}")
    if not block["modules"]:
        raise AdapterError(f"{path}: modules is empty")
    for module in block["modules"]:
        _check_module(path, module)
    modules = {module["name"]: module for module in block["modules"]}
    if len(modules) != len(block["modules"]):
        raise AdapterError(f"{path}: a module is listed twice")
    return Description(path, method, options, block["save_basis"], modules)


def _check_module(path: Path, module: Any) -> None:
    name = module.get("name") if isinstance(module, dict) else None
    which = f" (that of {name})" if isinstance(name, str) else ""
    for key, kind in _MODULE_FIELDS.items():
        value = module.get(key) if isinstance(module, dict) else None
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise AdapterError(f"{path}: a module's {key} is missing or no {kind.__name__}{which}")
        if kind is float and not _is_size(value):
            raise AdapterError(f"{path}: a module's {key} must be a finite number from 0 on{which}")
        if kind is list and not _is_sketch(value):
            raise AdapterError(f"{path}: a module's {key} must be {fingerprint.PROBES} finite numbers{which}")
        if key in _SIZES and module[key] < 1:
            raise AdapterError(f"{path}: a module's {key} must be at least 1, got {module[key]}{which}")
    if module["dtype"] not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise AdapterError(f"{path}: a module's dtype must be one of {allowed}, got {module['dtype']!r}{which}")
    if not isinstance(module.get("quantization", ""), str):
        raise AdapterError(f"{path}: a module's quantization must be a str{which}")


def method_options(description: Description, known: set[str]) -> dict[str, Any]:
    """The options that a method's configuration class ``known``. Raises AdapterError for one that nobody knows.

    An unknown option that is off (null, false, empty) changes nothing, whatever it would mean.
    """
    own = {key: value for key, value in description.options.items() if key in known}
    rest = {key: value for key, value in description.options.items() if key not in known}
    for key, value in rest.items():
        if key not in PEFT_RECORDS and key not in PEFT_EXTRAS and value not in (None, False, [], {}, ""):
            raise AdapterError(
                f"{description.path}: {description.method.name} has no option {key} (it is {value!r}); it has "
                f"{', '.join(sorted(known))}"
            )
    return own


def check_shapes(path: Path, description: Description, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless the file has the tensors that its description implies, in their shapes, and no other.

    Others are allowed where an option of PEFT stands for them (``modules_to_save``, ``bias``, ...).
    """
    shapes = description.shapes()
    if missing := sorted(set(shapes) - set(found)):
        raise AdapterError(f"{path} lacks {len(missing)} tensors, the first of which is {missing[0]}")
    extra = sorted(set(found) - set(shapes))
    if extra and not description.extras():
        raise AdapterError(f"{path} has {len(extra)} tensors {CONFIG_FILE} does not name, the first is {extra[0]}")
    for key, shape in shapes.items():
        if tuple(found[key]) != shape:
            raise AdapterError(f"{path}: {key} must have shape {list(shape)}, got {list(found[key])}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file, open. Raises FileNotFoundError, or AdapterError if it is none."""
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        why = f"; {pickled.name} is a pickle, which osora never reads" if pickled.is_file() else ""
        raise FileNotFoundError(f"{path} does not exist, though {CONFIG_FILE} does{why}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged, or no safetensors file: {error}") from error


def check_header(folder: str | os.PathLike[str], description: Description) -> None:
    """Raise as :func:`read_adapter` does for names and shapes, of the file's header alone: no tensor is read."""
    path = Path(folder) / TENSOR_FILE
    with opened(path) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    check_shapes(path, description, found)


def check_values(description: Description, name: str, tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise AdapterError unless a module's tensors are floating-point, finite, and those that were saved."""
    item = description.modules[name]
    for kind, tensor in tensors.items():
        key = description.method.key(name, kind)
        if tensor.dtype not in FLOATS or not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"{where}: {key} must hold finite floating-point values of 16 bits or more ({tensor.dtype})"
            )
    for field, kinds in (("values_sha256", description.method.values), ("basis_sha256", BASIS)):
        here = {kind: tensors[kind] for kind in kinds if kind in tensors}
        if here and fingerprint.tensors_digest(here, name) != item[field]:
            raise AdapterError(
                f"{where}: {', '.join(here)} of {name} are damaged, or not those that {CONFIG_FILE} was written with: "
                f"their {field} differs"
            )


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """The adapter in ``folder``, method and ranks as they were saved.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: a damaged, incomplete or foreign file; tensors of PEFT's own beside the method's.
    """
    folder = Path(folder)
    description = read_description(folder)
    if extras := description.extras():
        key, value = next(iter(extras.items()))
        raise AdapterError(
            f"{description.path}: the adapter was trained with {key}={value!r}, so that it has tensors beside the "
            "method's: load it with PEFT (osora.peft)"
        )
    path = folder / TENSOR_FILE
    with opened(path) as file:
        found = {key: file.get_tensor(key) for key in file.keys()}
    check_shapes(path, description, {key: tuple(tensor.shape) for key, tensor in found.items()})
    tensors = {
        name: {kind: found[description.method.key(name, kind)] for kind in description.kinds}
        for name in description.modules
    }
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        for _ in pool.map(lambda item: check_values(description, item[0], item[1], path), tensors.items()):
            pass
    return SavedAdapter(description, tensors)


# -- write -----------------------------------------------------------------------------------------------------------


def config_text(config: Mapping[str, Any]) -> str:
    """JSON with a line for each module: readable, and a third of the size of an indented one."""
    block = config.get(BLOCK)
    if not block:
        return json.dumps(config, indent=1, allow_nan=False) + "\n"
    modules = ",\n   ".join(json.dumps(module, allow_nan=False, separators=(",", ":")) for module in block["modules"])
    rest = json.dumps({**config, BLOCK: {**block, "modules": []}}, indent=1, allow_nan=False)
    return rest.replace('"modules": []', f'"modules": [\n   {modules}\n  ]') + "\n"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """``adapter_config.json``, whole or not at all."""
    path = folder / CONFIG_FILE
    with temporary_beside(path) as new:
        new.write_text(config_text(config), encoding="utf-8")
        finish(new)
        os.replace(new, path)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Both files: each written whole or not at all, the tensors first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / TENSOR_FILE, folder / CONFIG_FILE
    with temporary_beside(paths[0]) as new_tensors, temporary_beside(paths[1]) as new_config:
        try:
            save_file(dict(tensors), new_tensors, metadata={"format": "pt"})
        except SafetensorError as error:  # its name for a disk that is full
            raise OSError(f"{paths[0]} cannot be written, and what was there is left: {error}") from error
        new_config.write_text(config_text(config), encoding="utf-8")
        # Both are whole before either takes its place; the digests tell if a crash parts these two lines.
        for new in (new_tensors, new_config):
            finish(new)
        os.replace(new_tensors, paths[0])
        os.replace(new_config, paths[1])


__all__ = [
    "AdapterError",
    "Description",
    "Method",
    "SavedAdapter",
    "holds_adapter",
    "read_adapter",
    "read_description",
    "write_adapter",
    "write_config",
]
