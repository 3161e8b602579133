# SPDX-License-Identifier: Apache-2.0
"""The tensors' file of an adapter, read and checked against its description (:mod:`osora.files.format`)."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from osora.files.evidence import describe_whole
from osora.files.format import BASIS, CONFIG_FILE, TENSOR_FILE, AdapterError, Description, read_description
from osora.files.whole import why_unreadable
from osora.layers import fingerprint
from osora.reference import FLOATS


@dataclass(frozen=True)
class SavedAdapter:
    """Both files, read and checked: module name → kind → tensor."""

    description: Description
    """With an entry for each module of :attr:`whole`."""
    tensors: dict[str, dict[str, Tensor]]
    whole: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Of modules that were trained whole: module name → name in it → tensor."""


def check_shapes(path: Path, description: Description, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterError unless the file has the tensors that its description implies, in their shapes, and no other.

    Others are allowed where the description names them; if it does not say, where an option of PEFT stands for them
    (``modules_to_save``, ``bias``, ...).
    """
    shapes, others = description.shapes(), description.others
    if missing := sorted((set(shapes) | set(others or ())) - set(found)):
        raise AdapterError(f"{path} lacks {len(missing)} tensors, the first of which is {missing[0]}")
    extra = sorted(set(found) - set(shapes) - set(others or ()))
    if extra and (others is not None or not description.extras()):
        raise AdapterError(f"{path} has {len(extra)} tensors {CONFIG_FILE} does not name, the first is {extra[0]}")
    for key, shape in shapes.items():
        if tuple(found[key]) != shape:
            raise AdapterError(f"{path}: {key} must have shape {list(shape)}, got {list(found[key])}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file, open. Raises FileNotFoundError, or AdapterError if it is none."""
    if (why := why_unreadable(path)) is not None:
        raise AdapterError(why)
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
    """Raise as :func:`read_adapter` does for names and shapes, of the header, and for the values of whole modules.

    No other tensor is read: PEFT hands those of the method over, and nobody hands over the modules trained whole.
    """
    path = Path(folder) / TENSOR_FILE
    with opened(path) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        check_shapes(path, description, found)
        if description.whole is not None:
            whole, _ = description.whole_keys(found.keys() - description.shapes().keys())
            for name, inside in whole.items():
                values = {key: file.get_tensor(stored) for key, stored in inside.items()}
                check_whole(description, name, values, path)


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


def check_whole(
    description: Description, name: str, tensors: Mapping[str, Tensor], where: Path | str
) -> dict[str, Any]:
    """The entry of a module trained whole. Raises AdapterError unless its tensors are finite, and those it tells of."""
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{where}: {description.method.other_key(f'{name}.{key}')} holds NaN or infinite values")
    entry = describe_whole(name, tensors)
    if description.whole is not None and entry not in description.whole:
        raise AdapterError(
            f"{where}: the tensors of {name} are damaged, or not those that {CONFIG_FILE} was written with: their "
            "values_sha256 differs"
        )
    return entry


def _refuse_others(description: Description) -> None:
    """Raise AdapterError for options of PEFT's that mean tensors which nothing here reads."""
    for key, value in description.extras().items():
        if key != "modules_to_save":
            raise AdapterError(
                f"{description.path}: the adapter was trained with {key}={value!r}, so that it has tensors beside the "
                "method's: load it with PEFT (osora.peft)"
            )


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """The adapter in ``folder``, method and ranks as they were saved.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: a damaged, incomplete or foreign file; tensors beside the method's that are no whole module's.
    """
    description, folder = read_description(folder), Path(folder)
    _refuse_others(description)
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
    keys, rest = description.whole_keys(found.keys() - description.shapes().keys())
    if rest:
        raise AdapterError(
            f"{path} has {len(rest)} tensors beside the method's that belong to no module of modules_to_save, the "
            f"first is {rest[0]} (an embedding that was resized, say): load it with PEFT (osora.peft)"
        )
    whole = {name: {inner: found[key] for inner, key in inside.items()} for name, inside in keys.items()}
    if "modules_to_save" in description.extras() and not whole:
        raise AdapterError(
            f"{description.path}: the adapter was trained with modules_to_save="
            f"{description.options['modules_to_save']!r}, and {path.name} has no tensor of such a module"
        )
    entries = tuple(check_whole(description, name, values, path) for name, values in whole.items())
    return SavedAdapter(replace(description, whole=entries), tensors, whole)


__all__ = ["SavedAdapter", "check_header", "check_shapes", "check_values", "check_whole", "opened", "read_adapter"]
