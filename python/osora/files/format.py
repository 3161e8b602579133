# SPDX-License-Identifier: Apache-2.0
"""An adapter's two files (docs/format.md): read and checked by themselves, written whole or not at all.

``adapter_config.json`` is a configuration that PEFT reads, with a block ``"osora"`` that says which base weights and
which tensors belong to it; ``adapter_model.safetensors`` names the tensors as PEFT does. Nothing here knows a model.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from osora.files.together import replace_together
from osora.files.whole import finish, temporary_beside, why_unreadable
from osora.layers import fingerprint
from osora.model.state import BasisNote
from osora.reference import FLOATS

FORMAT_VERSION = 2
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
BLOCK = "osora"
_ROOT = "base_model.model."  # what PEFT puts before a module's name

# Of PEFT's own options. The first change nothing that is in the files, the others mean tensors that are not osora's.
PEFT_RECORDS = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode "
    "save_basis init_weights layers_pattern basis missing".split()
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

    @staticmethod
    def other_key(name: str) -> str:
        """The name in the file of a tensor that is no method's: a whole module's, a bias, an embedding."""
        return f"{_ROOT}{name}"


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

_WHOLE_FIELDS = {"name": str, "numbers": int, "values_sha256": str}
_SIZES = ("rank", "out_features", "in_features")


@dataclass(frozen=True)
class Description:
    """A valid ``adapter_config.json``."""

    path: Path
    method: Method
    options: dict[str, Any]  # what is beside the block: the method's options, and PEFT's
    save_basis: bool
    modules: dict[str, dict[str, Any]]  # by name, in the file's order
    others: tuple[str, ...] | None = None  # the file's further tensors by name: whole modules, rows, embeddings
    whole: tuple[dict[str, Any], ...] | None = None  # of others, an entry for each module that was trained whole
    basis: BasisNote | None = None  # which kept basis it came from
    read: tuple[str, ...] = ()  # modules whose weights the model read itself, so that a plain LoRA is not this adapter

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of tensors that the file has of each module."""
        return self.method.values + (BASIS if self.save_basis else ())

    @property
    def other_names(self) -> frozenset[str]:
        """The names of :attr:`others` in the model."""
        return frozenset(key.removeprefix(_ROOT) for key in self.others or ())

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
        block: dict[str, Any] = {"format_version": FORMAT_VERSION, "save_basis": self.save_basis}
        others = {"others": list(self.others)} if self.others else {}
        basis = {"basis": asdict(self.basis)} if self.basis else {}
        whole = {"whole": list(self.whole)} if self.whole else {}
        read = {"read": list(self.read)} if self.read else {}
        return self.options | {BLOCK: block | others | whole | basis | read | {"modules": modules}}

    def whole_keys(self, keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Of a file's further ``keys``: module trained whole → name within it → key; and the keys of no such module.

        A file without entries for these modules, as PEFT writes it: ``modules_to_save`` has ends of their names.
        """
        wanted = self.options.get("modules_to_save")
        ends = tuple(each for each in wanted if isinstance(each, str)) if isinstance(wanted, list | tuple) else ()
        names = None if self.whole is None else {each["name"] for each in self.whole}
        found: dict[str, dict[str, str]] = {}
        rest = []
        for key in sorted(keys):
            parts = key.removeprefix(_ROOT).split(".")
            outer = [".".join(parts[:i]) for i in range(1, len(parts))]
            module = next((n for n in outer if (n.endswith(ends) if names is None else n in names)), None)
            if module is None or not key.startswith(_ROOT):
                rest.append(key)
            else:
                found.setdefault(module, {})[key[len(_ROOT) + len(module) + 1 :]] = key
        return found, rest

    def extras(self) -> dict[str, Any]:
        """The options in force that stand for tensors of PEFT's own: trained biases, whole modules, tokens."""
        found = {key: self.options.get(key, unset) for key, unset in PEFT_EXTRAS.items()}
        return {key: value for key, value in found.items() if value != PEFT_EXTRAS[key] and value not in (None, [], {})}


# -- read ------------------------------------------------------------------------------------------------------------


def _is_sketch(value: Any) -> bool:
    return len(value) == fingerprint.PROBES and all(isinstance(v, float) and math.isfinite(v) for v in value)


def _is_size(value: Any) -> bool:
    return 0 <= value <= sys.float_info.max  # an int may be beyond every float


def read_json(path: Path) -> dict[str, Any]:
    """The object in a configuration's file. Raises FileNotFoundError, or AdapterError for no JSON."""
    if path.parent.is_file():
        raise FileNotFoundError(f"no adapter here: {path.parent} is a file, and an adapter is a folder: give that")
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
    if not os.fspath(folder):
        raise FileNotFoundError("no adapter here: the folder's name is empty")
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
    others = block.get("others")
    if others is not None and not (isinstance(others, list) and all(isinstance(key, str) for key in others)):
        raise AdapterError(f"{path}: others is no list of tensors' names")
    others = None if others is None else tuple(others)
    whole, basis = _whole(path, block, others or ()), _basis_note(path, block.get("basis"))
    read = block.get("read", [])
    if not (isinstance(read, list) and all(isinstance(name, str) for name in read)):
        raise AdapterError(f"{path}: read is no list of modules' names")
    return Description(path, method, options, block["save_basis"], modules, others, whole, basis, tuple(read))


def _whole(path: Path, block: Mapping[str, Any], others: Sequence[str]) -> tuple[dict[str, Any], ...] | None:
    whole = block.get("whole")
    if whole is None:
        return None
    if not isinstance(whole, list):
        raise AdapterError(f"{path}: whole is no list")
    for each in whole:
        for key, kind in _WHOLE_FIELDS.items():
            value = each.get(key) if isinstance(each, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
                raise AdapterError(f"{path}: {key} of a module trained whole is missing or no {kind.__name__}")
    names = [each["name"] for each in whole]
    for name in names:
        inside = f"{_ROOT}{name}."
        if names.count(name) > 1 or any(name.startswith(f"{other}.") for other in names):
            raise AdapterError(f"{path}: {name}, trained whole, is listed twice, or within another")
        if not any(key.startswith(inside) for key in others):
            raise AdapterError(f"{path}: {name}, trained whole, has no tensor among others")
    return tuple(whole)


def _basis_note(path: Path, note: Any) -> BasisNote | None:
    if note is None:
        return None
    if not isinstance(note, dict) or not all(isinstance(note.get(key), str) for key in ("fingerprint", "folder")):
        raise AdapterError(f"{path}: basis must name a fingerprint and a folder")
    return BasisNote(note["fingerprint"], note["folder"])


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


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    check: Callable[[Path, Path], None] | None = None,
) -> None:
    """Both files: each written whole or not at all, the tensors first; ``check`` reads them back before.

    Raises:
        ValueError: the folder's name is not UTF-8; what ``check`` raises.
        OSError: the folder cannot be written.
    """
    if (why := why_unreadable(folder)) is not None:
        raise ValueError(why)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / TENSOR_FILE, folder / CONFIG_FILE
    with temporary_beside(paths[0]) as new_tensors, temporary_beside(paths[1]) as new_config:
        try:
            save_file(dict(tensors), new_tensors, metadata={"format": "pt"})
        except SafetensorError as error:  # its name for a disk that is full
            raise OSError(f"{paths[0]} cannot be written, and what was there is left: {error}") from error
        new_config.write_text(config_text(config), encoding="utf-8")
        # both are whole before either takes its place
        for new in (new_tensors, new_config):
            finish(new)
        if check is not None:
            check(new_config, new_tensors)
        replace_together({paths[0]: new_tensors, paths[1]: new_config})


__all__ = [
    "AdapterError",
    "Description",
    "Method",
    "holds_adapter",
    "read_description",
    "write_adapter",
    "write_config",
]
