# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: ``adapter_config.json`` and ``adapter_model.safetensors`` (docs/format.md).

With its basis an adapter stands alone. Without it, it is o, s and the singular values, and loading decomposes the base
weights again; either way the base is checked to be the one the adapter was trained on.
"""

import hashlib
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from osora import fingerprint
from osora.adapted import DEFAULT, AdaptedLinear, oriented_weight
from osora.config import METHODS, AdapterConfig
from osora.factors import Decomposition, check_max_memory
from osora.formulas import Basis, Formula, formula_of
from osora.layers import make_layer
from osora.patch import (
    AdapterState,
    adapted_layers,
    check_new_name,
    decompose_targets,
    install,
    install_beside,
    osora_layers,
    refuse_if_adapted,
    refuse_if_busy,
    state_of,
)
from osora.targets import Target, base_modules, check_is_linear, check_not_tied, weight_holders

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
SINGULAR_VALUES = "singular_values"  # of all modules, one after the other: a tensor each would cost more in headers
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
    "max_residual": float,
    "passes": int,
    "converged": bool,
    "method": str,
}


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AdapterError(ValueError):
    """An adapter that cannot be loaded as it is: damaged, of another format, or made for another base."""


# -- save ------------------------------------------------------------------------------------------------------------


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary file in ``path``'s folder: to be renamed to it when all is written, and else removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _finish(path: Path) -> None:
    """On the disk, and with the mode of any new file: mkstemp's 0600 would keep a group from reading the adapter."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _config_text(config: dict[str, Any]) -> str:
    """JSON with a line for each module: readable, and a third of the size of an indented one."""
    modules = ",\n  ".join(json.dumps(module, allow_nan=False, separators=(",", ":")) for module in config["modules"])
    rest = json.dumps({**config, "modules": []}, indent=1, allow_nan=False)
    return rest.replace('"modules": []', f'"modules": [\n  {modules}\n ]') + "\n"


def _base_weight(layer: AdaptedLinear) -> Tensor:
    """[out, in]; the kept one while the layer is merged."""
    return oriented_weight(layer.base_layer) if not layer.merged else layer.kept_weight()


def _describe(name: str, layer: AdaptedLinear, adapter: str) -> dict[str, Any]:
    weight, rank = _base_weight(layer), layer.formula(adapter).rank(layer.deltas(adapter))
    U, V, S0 = layer.basis(rank)
    return {
        "name": name,
        "rank": rank,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "weight_sha256": fingerprint.weight_digest(weight),
        "weight_sketch": fingerprint.weight_sketch(weight, name),
        "delta_sketch": fingerprint.factored_sketch(*layer.delta_factors(adapter), name),
        "basis_sketch": fingerprint.factored_sketch(U * S0, V, name),
        "max_residual": layer.max_residual,
        "passes": layer.passes,
        "converged": layer.converged,
        "method": layer.method,
    }


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, save_basis: bool = True, name: str | None = None
) -> None:
    """Write the model's active adapter, or the one of that name, to ``folder``, which is made if need be.

    Args:
        model: a model with an adapter, merged or not.
        folder: gets ``adapter_model.safetensors`` and ``adapter_config.json``, each written whole or not at all.
        save_basis: store U and V, in the base weight's dtype. Without them the file is a few kilobytes to megabytes
            and loading computes them again from the base; decompose with ``tol <= 1e-4`` then, so that another
            machine finds the same basis.
        name: which of several adapters; None for the active one. The name itself is not in the file.

    Raises:
        ValueError: no adapter, none of that name, NaN or infinite values in it, or a model sharded over processes.
        OSError: the folder cannot be written.
    """
    adapter = state_of(model).active if name is None else name
    state = state_of(model).of(adapter)
    layers = adapted_layers(model, adapter)
    for module, layer in layers.items():
        for key, tensor in layer.named_parameters():
            if hasattr(tensor, "full_tensor"):  # a DTensor, as FSDP2 makes it
                raise ValueError(
                    f"{module}.{key} is sharded over processes; load full_tensor() of every entry of its state_dict "
                    "into an unsharded copy of the model, and save that"
                )
    tensors: dict[str, Tensor] = {}
    values = []
    for module, layer in layers.items():
        formula = layer.formula(adapter)
        deltas = dict(zip(formula.kinds, (t.detach().to(layer.S0.dtype) for t in layer.deltas(adapter)), strict=True))
        U, V, S0 = layer.basis(deltas["s"].numel())
        for key, value in (deltas | ({"U": U, "V": V} if save_basis else {})).items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{module}.{key} has NaN or infinite values; the adapter is not saved")
            tensors[f"{module}.{key}"] = value.to("cpu").contiguous()
        values.append(S0.detach().cpu())
    tensors[SINGULAR_VALUES] = torch.cat([v.to(torch.promote_types(v.dtype, values[0].dtype)) for v in values])
    if not save_basis and state.config.tol > 1e-4:
        warnings.warn(
            f"saving without the basis, which was decomposed with tol={state.config.tol:g}: another machine may find "
            "one that differs by as much, and refuse the adapter; attach with OsoraConfig(tol=1e-4) to be safe",
            RuntimeWarning,
            stacklevel=2,
        )
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
        modules = list(pool.map(lambda item: _describe(item[0], item[1], adapter), layers.items()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / TENSOR_FILE, folder / CONFIG_FILE
    with _temporary_beside(paths[0]) as new_tensors, _temporary_beside(paths[1]) as new_config:
        save_file(tensors, new_tensors, metadata={"format": "pt"})
        config = {
            "method": state.config.method,
            "format_version": FORMAT_VERSION,
            "config": state.config.to_dict(),
            "save_basis": save_basis,
            "tensors_sha256": _file_sha256(new_tensors),
            "modules": modules,
        }
        new_config.write_text(_config_text(config), encoding="utf-8")
        # Both are whole before either takes its place; the checksum tells if a crash parts these two lines.
        for new in (new_tensors, new_config):
            _finish(new)
        os.replace(new_tensors, paths[0])
        os.replace(new_config, paths[1])


# -- load ------------------------------------------------------------------------------------------------------------


def _is_sketch(value: Any) -> bool:
    return len(value) == fingerprint.PROBES and all(isinstance(v, float) and math.isfinite(v) for v in value)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter here: {path} does not exist")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("method") not in METHODS:
        method = config.get("method", config.get("peft_type")) if isinstance(config, dict) else None
        raise AdapterError(f"{path} describes no osora adapter: method is {method!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version {config.get('format_version')!r}, this osora reads {FORMAT_VERSION}: "
            "use the version of osora that wrote it, or a newer one"
        )
    for key, kind in {"config": dict, "save_basis": bool, "tensors_sha256": str, "modules": list}.items():
        if not isinstance(config.get(key), kind):
            raise AdapterError(f"{path}: {key} is missing or no {kind.__name__}")
    if not config["modules"]:
        raise AdapterError(f"{path}: modules is empty")
    for module in config["modules"]:
        for key, kind in _MODULE_FIELDS.items():
            value = module.get(key) if isinstance(module, dict) else None
            if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
                raise AdapterError(f"{path}: a module's {key} is missing or no {kind.__name__}")
            if kind is list and not _is_sketch(value):
                raise AdapterError(f"{path}: a module's {key} must be {fingerprint.PROBES} finite numbers")
    names = [module["name"] for module in config["modules"]]
    if len(set(names)) != len(names):
        raise AdapterError(f"{path}: a module is listed twice")
    return config


def _read_tensors(path: Path, config: Mapping[str, Any], formula: Formula) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, though {CONFIG_FILE} does")
    if _file_sha256(path) != config["tensors_sha256"]:
        raise AdapterError(f"{path} is damaged, or not the file {CONFIG_FILE} was written with: its SHA-256 differs")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is no readable safetensors file: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for module in config["modules"]:
        name, r, d, k = module["name"], module["rank"], module["out_features"], module["in_features"]
        shapes |= {f"{name}.{kind}": shape for kind, shape in formula.shapes(d, k, r).items()}
        if config["save_basis"]:
            shapes |= {f"{name}.U": (d, r), f"{name}.V": (k, r)}
    shapes[SINGULAR_VALUES] = (sum(module["rank"] for module in config["modules"]),)
    if missing := sorted(set(shapes) - set(tensors)):
        raise AdapterError(f"{path} lacks {len(missing)} tensors, the first of which is {missing[0]}")
    if extra := sorted(set(tensors) - set(shapes)):
        raise AdapterError(f"{path} has {len(extra)} tensors {CONFIG_FILE} does not name, the first is {extra[0]}")
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            raise AdapterError(f"{path}: {key} must have shape {list(shapes[key])}, got {list(tensor.shape)}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterError(f"{path}: {key} must hold finite floating-point values ({tensor.dtype})")
    return tensors


def _find_module(model: nn.Module, described: Mapping[str, Any], holders: dict[int, set[int]]) -> nn.Module:
    name = described["name"]
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(f"the adapter is for {name}, which this model does not have") from error
    if isinstance(module, AdaptedLinear):
        module = module.base_layer
    try:
        check_is_linear(name, module)
        check_not_tied(name, module, holders)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    shape, wanted = tuple(oriented_weight(module).shape), (described["out_features"], described["in_features"])
    if shape != wanted:
        raise AdapterError(f"the adapter's {name} is {list(wanted)}, this model's is {list(shape)}")
    return module


def _check_base(described: Mapping[str, Any], weight: Tensor) -> str | None:
    """None if the weight is the saved one; else what is different, or raise if it is another weight."""
    name = described["name"]
    if fingerprint.weight_digest(weight) == described["weight_sha256"]:
        return None
    saved = getattr(torch, described["dtype"], None)
    refusal = AdapterError(
        f"the base weight {name} is not the one this adapter was trained on: load it on its own base model "
        f"(dtype {described['dtype']})"
    )
    if saved not in _FLOATS or saved == weight.dtype:
        raise refusal
    # Another dtype: the same weight, rounded? Each of the sketch's numbers then moves by the rounding alone.
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    allowed = 6 * max(fingerprint.rounding_unit(saved), fingerprint.rounding_unit(weight.dtype)) * norm
    now = fingerprint.weight_sketch(weight, name)
    if max(abs(a - b) for a, b in zip(now, described["weight_sketch"], strict=True)) > allowed:
        raise refusal
    return f"{described['dtype']} then, {str(weight.dtype).removeprefix('torch.')} now"


def _check_all_bases(described: list[dict[str, Any]], weights: list[Tensor]) -> None:
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        differences = [d for d in pool.map(_check_base, described, weights) if d is not None]
    if differences:
        warnings.warn(
            f"{len(differences)} base weights were rounded to another dtype since the adapter was saved "
            f"({differences[0]}); its function is the same up to that rounding",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_basis(
    described: Mapping[str, Any], formula: Formula, basis: Basis, saved: Mapping[str, Tensor], allowed: float, cure: str
) -> None:
    """Raise if U, V, S0 are not the basis that an adapter was trained in, judged by what it does to W and ΔW."""
    name = described["name"]
    U, V, S0 = basis
    start, change = U * S0, formula.factors(basis, [t.to(S0.device) for t in formula.named(saved)])
    for key, now, scale in (
        ("basis_sketch", fingerprint.factored_sketch(start, V, name), fingerprint.factored_norm(start, V)),
        ("delta_sketch", fingerprint.factored_sketch(*change, name), fingerprint.factored_norm(*change)),
        (SINGULAR_VALUES, S0.tolist(), float(saved["S0"].max())),
    ):
        wish = saved["S0"].tolist() if key == SINGULAR_VALUES else described[key]
        off = max(abs(a - b) for a, b in zip(now, wish, strict=True))
        if off > allowed * scale + 1e-12:
            raise AdapterError(
                f"{name}: {cure.format(f'{key} off by {off / (scale or 1):.1e}, allowed {allowed:.1e}')}"
            )


def _rebuilt_allows(tol: float) -> float:
    """What a basis computed again may change, relative: up to 10 tol where singular values are close (docs/svd.md)."""
    return max(1e-4, 10 * tol)


def _check_rebuilt(
    described: Mapping[str, Any], formula: Formula, layer: AdaptedLinear, saved: Mapping[str, Tensor], tol: float
) -> None:
    _check_basis(
        described,
        formula,
        (layer.U, layer.V, layer.S0),
        saved,
        _rebuilt_allows(tol),
        "the basis computed again is not the adapter's ({}): save the adapter with save_basis=True, or load it on a "
        f"base in the dtype it was trained on ({described['dtype']}), decomposed with a smaller tol",
    )


def _check_shared(
    described: Mapping[str, Any],
    formula: Formula,
    layer: AdaptedLinear,
    basis: Basis,
    saved: Mapping[str, Tensor],
    tol: float,
) -> None:
    """The model's basis for an adapter that was trained in one of its own: the same, as far as both are exact?"""
    allowed, saved_dtype = _rebuilt_allows(max(tol, layer.max_residual)), getattr(torch, described["dtype"], None)
    if saved_dtype not in _FLOATS:
        raise AdapterError(f"{described['name']}: dtype must be a floating-point type, got {described['dtype']!r}")
    if saved_dtype != layer.U.dtype:
        # U and V are rounded, an error of sqrt(2) units; a sketch may see some six times its root mean square
        units = [fingerprint.rounding_unit(dtype) for dtype in (saved_dtype, layer.U.dtype)]
        allowed = max(allowed, 6 * math.sqrt(2) * max(units))
    _check_basis(
        described,
        formula,
        basis,
        saved,
        allowed,
        "the adapters of a model share one basis, and this one was trained in another ({}): load it into a copy of the "
        "base model of its own, or train both from decompositions with a smaller tol and the same seed",
    )


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_memory: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Put a saved adapter on its base model, in place. If anything is wrong, the model is left as it was.

    With a name it may join adapters that are there. It shares their basis, if that is the one it was trained in, and
    waits: the active adapter stays what it was (:func:`osora.set_adapter`, :func:`osora.adapters_in_batch`).

    Args:
        model: the base model the adapter was trained on; another dtype of it is accepted with a warning.
        folder: what :func:`save_adapter` wrote.
        name: what to call it. None is for a model without any, where it is called "default".
        max_memory: bytes that computing a basis again may take, as for :func:`osora.attach`.
        progress: a progress bar while a basis is computed again; by default only on a terminal.

    Returns:
        ``model`` itself, with o and s trainable (of an adapter that joined others: frozen) and everything else frozen.

    Raises:
        FileNotFoundError: no adapter in ``folder``.
        AdapterError: a damaged or foreign file; another base; a basis that cannot be computed again, or is not the
            one that the model's other adapters share.
        ValueError: no name is given and the model has an adapter already; the name is taken; the model is merged; a
            weight cannot be decomposed within max_memory.
    """
    folder = Path(folder)
    began = time.perf_counter()
    check_max_memory(max_memory)
    if name is None:
        refuse_if_adapted(model)
        name = DEFAULT
    check_new_name(model, name)
    refuse_if_busy(model)
    there = {id(layer.base_layer): layer for layer in osora_layers(model).values()}
    description = _read_config(folder / CONFIG_FILE)
    try:
        config = METHODS[description["method"]].from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    formula = formula_of(config)
    tensors = _read_tensors(folder / TENSOR_FILE, description, formula)
    modules = {item["name"]: item for item in description["modules"]}
    targets = _find_targets(model, modules, config)
    _check_all_bases(list(modules.values()), [oriented_weight(target.module) for target in targets])

    S0 = dict(zip(modules, tensors[SINGULAR_VALUES].split([m["rank"] for m in modules.values()]), strict=True))
    wanting = [t for t in targets if not _has_basis(there.get(id(t.module)), modules[t.name]["rank"])]
    if description["save_basis"]:
        factors = {t.name: _stored_factors(modules[t.name], tensors, S0[t.name]) for t in wanting}
    else:
        rebuilt = decompose_targets(wanting, config, max_memory=max_memory, unconverged="warn", progress=progress)
        factors = {
            target.name: replace(found.leading(modules[target.name]["rank"]), S=S0[target.name])
            for target, found in rebuilt
        }

    new: list[tuple[Target, AdaptedLinear]] = []
    joined: list[tuple[Target, AdaptedLinear, dict[str, Tensor]]] = []
    for target in targets:
        item, found = modules[target.name], factors.get(target.name)
        saved = {kind: tensors[f"{target.name}.{kind}"] for kind in formula.kinds} | {"S0": S0[target.name]}
        if (layer := there.get(id(target.module))) is not None:
            basis = layer.basis(item["rank"]) if found is None else layer.widened(found)
            _check_shared(item, formula, layer, basis, saved, config.tol)
            joined.append((target, layer, saved))
            continue
        assert found is not None
        layer = make_layer(target.module, found, formula, config.dropout, name)
        with torch.no_grad():
            for key, value in saved.items():
                getattr(layer, key).copy_(value)
        if not description["save_basis"]:
            _check_rebuilt(item, formula, layer, saved, config.tol)
        new.append((target, layer))

    # All is checked: the model changes from here on.
    for target, layer, saved in joined:
        if target.name in factors:
            layer.widen(factors[target.name])
        layer.add_adapter(name, formula, saved)
    put = install_beside if there else install
    put(model, new, name, AdapterState(config, time.perf_counter() - began))
    return model


def _has_basis(layer: AdaptedLinear | None, rank: int) -> bool:
    return layer is not None and layer.S0.numel() >= rank


def _find_targets(model: nn.Module, modules: Mapping[str, Mapping[str, Any]], config: AdapterConfig) -> list[Target]:
    """The saved adapter's modules in this model, in the file's order."""
    names_of: dict[int, list[str]] = {}
    for name, module in base_modules(model):
        names_of.setdefault(id(module), []).append(name)
    holders = weight_holders(model)
    targets: list[Target] = []
    for item in modules.values():
        module = _find_module(model, item, holders)
        names = sorted(names_of[id(module)], key=lambda name: name != item["name"])
        if names[0] != item["name"] or any(module is target.module for target in targets):
            raise AdapterError(f"{item['name']} is another name of {names[0]} or of a module named before it")
        targets.append(Target(tuple(names), module, _rank_decomposed(item, config)))
    return targets


def _rank_decomposed(described: Mapping[str, Any], config: AdapterConfig) -> int:
    """The rank of the decomposition that a module's triplets are the first of: the same run gives the same bits."""
    if config.rank_for_energy is None:
        return described["rank"]
    most = min(described["out_features"], described["in_features"])
    return max(described["rank"], min(config.rank_for(described["name"]), most))


def _stored_factors(described: Mapping[str, Any], tensors: Mapping[str, Tensor], S0: Tensor) -> Decomposition:
    name = described["name"]
    residuals = torch.full((described["rank"],), float(described["max_residual"]), dtype=torch.float64)
    return Decomposition(
        name,
        tensors[f"{name}.U"],
        S0,
        tensors[f"{name}.V"],
        residuals,
        described["converged"],
        described["passes"],
        described["method"],
    )
