# SPDX-License-Identifier: Apache-2.0
"""What a training run is asked to do. A wrong value fails where it is written, and says what it was."""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from osora.config import CONFIGS, AdapterConfig
from osora.files.info import adapter_info

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
# What docs/compare.md found to be near the best; there SORSA's is a hundredth of OSoRA's.
DEFAULT_LR = {"osora": 1e-2, "sorsa": 3e-4}
_ELSEWHERE = {"r": "rank", "seed": "seed"}  # fields of the adapter's config with a setting of their own
Check = Callable[[str, Any], Any]


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"{name} must be a path, got {value!r}")
    return Path(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def _whole(least: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if not least <= value < 2**63:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        return value

    return check


def _number(least: float, *, above: bool = False, below: float = math.inf) -> Check:
    """From ``least`` on, or above it, and below ``below``."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (least < value if above else least <= value) or not value < below:
            limit = f"{'above' if above else 'at least'} {least:g}" + (
                "" if below == math.inf else f", below {below:g}"
            )
            raise ValueError(f"{name} must be a finite number {limit}, got {value!r}")
        return float(value)

    return check


def _one_of(*allowed: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        return value

    return check


def _options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map names to values, got {value!r}")
    for key, own in _ELSEWHERE.items():
        if key in value:
            raise ValueError(f"{name}.{key} is set by {own}, outside of {name}")
    return dict(value)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS: dict[str, Check] = {
    "model": _path,
    "data": _path,
    "output": _path,
    "eval_data": _or_none(_path),
    "start": _or_none(_path),
    "max_length": _whole(2),
    "method": _one_of(*CONFIGS),
    "rank": _whole(1),
    "adapter": _options,
    "save_basis": _boolean,
    "epochs": _or_none(_number(0, above=True)),
    "steps": _or_none(_whole(1)),
    "batch_size": _whole(1),
    "gradient_accumulation": _whole(1),
    "lr": _or_none(_number(0, above=True)),
    "lr_o": _or_none(_number(0)),
    "lr_s": _or_none(_number(0)),
    "lr_u": _or_none(_number(0)),
    "lr_v": _or_none(_number(0)),
    "relative_s": _or_none(_boolean),
    "weight_decay": _number(0),
    "max_grad_norm": _number(0),
    "schedule": _one_of("cosine", "linear", "constant"),
    "warmup": _number(0, below=1),
    "seed": _whole(0),
    "dtype": _one_of("float32", "bfloat16"),
    "bf16": _boolean,
    "gradient_checkpointing": _boolean,
    "device": _one_of("auto", "cpu", "cuda"),
    "eval_steps": _or_none(_whole(1)),
    "log_steps": _whole(1),
    "save_steps": _whole(1),
    "keep_checkpoints": _or_none(_whole(1)),
    "resume": _boolean,
}


def _as_started(folder: Path) -> dict[str, Any]:
    """The settings that an adapter to begin with was made with. Raises as :func:`osora.adapter_info`."""
    info = adapter_info(folder)
    plain = info.config.to_dict()
    usual = CONFIGS[info.method]().to_dict()
    options = {name: value for name, value in plain.items() if name not in _ELSEWHERE and value != usual[name]}
    return {"method": info.method, "rank": info.config.r, "adapter": options, "save_basis": info.has_basis}


def _check_started(settings: "TrainSettings") -> None:
    """Raise ValueError where settings say otherwise than the adapter that is begun with, which they do not change."""
    info = adapter_info(settings.start or "")
    if settings.method != info.method:
        raise ValueError(f"the adapter in {settings.start} is of {info.method}, method is {settings.method}")
    there, asked = info.config.to_dict(), settings.config.to_dict()
    own = {name: (there[name], asked[name]) for name in there if name not in ("seed", "tol")}
    if other := [f"{name} is {was!r} there, {now!r} here" for name, (was, now) in own.items() if was != now]:
        raise ValueError(f"the adapter in {settings.start} was made otherwise, and stays so: {'; '.join(other)}")


@dataclass(frozen=True)
class TrainSettings:
    """A training run: docs/cli.md, "osora train", says what each setting means.

    Raises:
        TypeError, ValueError: a value of the wrong type, out of range, or that does not go with another one, naming it.
    """

    model: Path
    data: Path
    output: Path
    eval_data: Path | None = None
    start: Path | None = None
    max_length: int = 1024
    method: str = "osora"
    rank: int = 64
    adapter: dict[str, Any] = field(default_factory=dict)
    save_basis: bool = True
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    lr: float | None = None
    lr_o: float | None = None
    lr_s: float | None = None
    lr_u: float | None = None
    lr_v: float | None = None
    relative_s: bool | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    seed: int = 0
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    device: str = "auto"
    eval_steps: int | None = None
    log_steps: int = 10
    save_steps: int = 100
    keep_checkpoints: int | None = 2
    resume: bool = False

    def __post_init__(self) -> None:
        """Check every setting, and those that depend on others."""
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs:g}) are both given: give one")
        if self.eval_steps is not None and self.eval_data is None:
            raise ValueError("eval_steps is given, but no eval_data")
        config = self.config
        if not self.save_basis and config.tol > 1e-4:
            raise ValueError(
                f"save_basis is false, and adapter.tol {config.tol:g}: without its basis an adapter needs at most 1e-4"
            )
        for kind in "osuv":
            if getattr(self, f"lr_{kind}") is not None and kind not in self.trained:
                raise ValueError(f"lr_{kind} is given, but what is trained is {', '.join(self.trained)}")
        if self.relative_s and "s" not in self.trained:
            raise ValueError(f"relative_s is given, but what is trained is {', '.join(self.trained)}")

    @property
    def config(self) -> AdapterConfig:
        """The adapter's config. A ``tol`` that is not given fits ``save_basis``."""
        options = {"r": self.rank, "seed": self.seed} | self.adapter
        if not self.save_basis:
            options = {"tol": 1e-4} | options
        try:
            return CONFIGS[self.method].from_dict(options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter: {error}") from error

    @property
    def trained(self) -> str:
        """The kinds of numbers that are trained, a letter each."""
        if self.method == "sorsa":
            return "usv"
        only: str = getattr(self.config, "train")  # noqa: B009  (OSoRA's alone)
        return "os" if only == "both" else only

    @property
    def rates(self) -> dict[str, Any]:
        """For :func:`osora.parameter_groups`."""
        relative = self.method == "osora" and "s" in self.trained if self.relative_s is None else self.relative_s
        rates = {f"lr_{kind}": getattr(self, f"lr_{kind}") for kind in "osuv"}
        lr = DEFAULT_LR[self.method] if self.lr is None else self.lr
        return {"lr": lr, "weight_decay": self.weight_decay, "relative_s": relative, **rates}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json can write."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """Raise ValueError for an unknown name or a missing one."""
        known = [setting.name for setting in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"there is no setting {name!r}; {hint}The settings are {', '.join(known)}")
        for name in ("model", "data", "output"):
            if values.get(name) is None:
                raise ValueError(f"the setting {name} is missing (--{name})")
        if values.get("start") is not None:
            values = _as_started(_path("start", values["start"])) | dict(values)
        made = cls(**values)
        if made.start is not None:
            _check_started(made)
        return made


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-3 as the number that YAML 1.2 and JSON say it is, and refuses a name that is given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            _refuse_twice(names)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _refuse_twice(names: list[Any]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given twice")


def _json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file, by its name's end YAML, TOML or JSON; not yet checked: :meth:`TrainSettings.from_dict`.

    Raises:
        FileNotFoundError, ValueError: no such file, another ending, a syntax error, or no mapping of names to values.
        ModuleNotFoundError: pyyaml or (before Python 3.11) tomli is missing.
    """
    path = Path(path)
    readers = dict(zip(SUFFIXES, (_yaml, _yaml, _toml, _json), strict=True))
    if path.suffix not in readers:
        raise ValueError(f"{path}: the settings must be in a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = readers[path.suffix](path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, TOML and UTF-8 too
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply to be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must map settings to values, and holds {type(found).__name__}")
    return found


__all__ = ["TrainSettings", "read_settings"]
