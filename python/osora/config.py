# SPDX-License-Identifier: Apache-2.0
"""What an adapter is asked to be. A wrong value fails where it is written, and says what it was."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

ALL_LINEAR = "all-linear"
REGULARIZERS = ("squared", "paper")


def _check_regex(where: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:  # the latter two of what re cannot hold
        raise ValueError(f"{where}: {pattern!r:.200} is not a regular expression: {error}") from error


def names_or_regex(where: str, value: Any) -> str | tuple[str, ...]:
    """A regular expression, or names that module names end in."""
    if isinstance(value, str):
        _check_regex(where, value)
        return value
    if isinstance(value, Sequence | set | frozenset) and value and all(isinstance(n, str) and n for n in value):
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    raise TypeError(f"{where} must be a regular expression or a non-empty list of module names, got {value!r}")


def _checked_names(where: str, value: Any) -> tuple[str, ...] | None:
    """Names that module names end in, and no expression; None for none."""
    if value is None or (isinstance(value, Sequence | set | frozenset) and not isinstance(value, str) and not value):
        return None
    if isinstance(value, str):
        raise TypeError(f"{where} must be a list of module names, got the str {value!r}: did you mean [{value!r}]?")
    return names_or_regex(where, value)  # type: ignore[return-value]  # of a list it is a tuple


def _targets(value: Any) -> str | tuple[str, ...]:
    """As :func:`names_or_regex`; "all-linear" in any case, and alone in a list, as people write it for PEFT."""
    alone = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if isinstance(alone, str) and alone.lower() == ALL_LINEAR:
        return ALL_LINEAR
    return names_or_regex("target_modules", value)


def _checked_int(where: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{where} must be at least {least}, got {value}")
    return value


def _checked_float(where: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond every float
        pass
    raise TypeError(f"{where} must be a finite number, got {value!r}")


def _check_scale(where: str, size: float) -> None:
    if not 1e-20 <= size <= 1e20:
        raise ValueError(f"{where} must be from 1e-20 to 1e20 in size, so that float32 holds its products, got {size}")


def _check_one_of(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class AdapterConfig:
    """What the configs of all methods have: which linear layers are adapted, and at which rank.

    Args:
        r: rank, the number of singular triplets a layer trains on. Clipped to min(out_features, in_features) per
            module, with a note in the summary.
        target_modules: "all-linear" (every linear layer except the output head), names that module names end in
            (``["q_proj", "v_proj"]``), or one regular expression for whole module names.
        exclude_modules: names or a regular expression, taken away from the targets.
        dropout: probability with which entries of x are dropped on the adapter's branch while training, 0 <= p < 1.
            The branch carries the principal part of the weight, so 0 is the default.
        tol: largest residual allowed for a singular triplet, see :func:`osora.truncated_svd`. Use 1e-4 or less to save
            adapters without their basis.
        seed: of the decomposition's random start.
        rank_pattern: module name or regular expression → rank, for modules that differ from ``r``.
        layers_to_transform: only layers with these indices (the first number in a module's name).
        rank_for_energy: a share 0 < p <= 1 of a weight's squared Frobenius norm. ``r`` (or ``rank_pattern``'s rank) is
            then the most that a module may take: it keeps the fewest leading triplets that hold this share. Where even
            ``r`` of them hold less, it keeps ``r``, with a note in the summary.
        modules_to_save: names that module names end in (``["classifier"]``): these modules are trained whole, each
            adapter its own copy of them, and saved with it. They are not adapted (docs/whole_modules.md).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, naming it.
    """

    method: ClassVar[str] = ""  # its name in files

    r: int = 64
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    dropout: float = 0.0
    tol: float = 1e-3
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    rank_for_energy: float | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check every field and bring it to one form."""
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (the dataclass is frozen)
        _checked_int("r", self.r, 1)
        _checked_int("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        put("target_modules", _targets(self.target_modules))
        if self.exclude_modules is not None:
            put("exclude_modules", names_or_regex("exclude_modules", self.exclude_modules))
        for name in ("dropout", "tol", "rank_for_energy"):
            value = getattr(self, name)
            if name == "rank_for_energy" and value is None:
                continue
            put(name, _checked_float(name, value))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in 0 <= p < 1, got {self.dropout}")
        if self.tol <= 0:
            raise ValueError(f"tol must be positive, got {self.tol}")
        if self.rank_for_energy is not None and not 0 < self.rank_for_energy <= 1:
            raise ValueError(f"rank_for_energy must be in 0 < p <= 1, got {self.rank_for_energy}")
        if not isinstance(self.rank_pattern, Mapping):
            raise TypeError(f"rank_pattern must map module names to ranks, got {self.rank_pattern!r}")
        for pattern, rank in self.rank_pattern.items():
            if not isinstance(pattern, str):
                raise TypeError(f"rank_pattern must map module names to ranks, got the name {pattern!r}")
            _check_regex("rank_pattern", pattern)
            _checked_int(f"rank_pattern[{pattern!r}]", rank, 1)
        put("rank_pattern", dict(self.rank_pattern))
        put("modules_to_save", _checked_names("modules_to_save", self.modules_to_save))
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            if not isinstance(layers, int | Iterable):
                raise TypeError(f"layers_to_transform must be an int or a list of ints, got {layers!r}")
            layers = (layers,) if isinstance(layers, int) else tuple(layers)
            if not layers:
                raise ValueError("layers_to_transform must not be empty; leave it out to adapt every layer")
            put("layers_to_transform", tuple(_checked_int("layers_to_transform", n, 0) for n in layers))

    def rank_for(self, name: str) -> int:
        """The rank asked for the module ``name``, before clipping; the first pattern that matches wins.

        With ``rank_for_energy`` it is the most that the module may take.
        """
        for pattern, rank in self.rank_pattern.items():
            if re.fullmatch(rf"(.*\.)?(?:{pattern})", name):
                return rank
        return self.r

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json can write; :meth:`from_dict` is the way back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Raise ValueError for a key this version does not know, which it would otherwise ignore in silence."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(frozen=True)
class OsoraConfig(AdapterConfig):
    """OSoRA: trains changes of a weight's top singular values and of its output scales (docs/method.md).

    Args:
        r: rank, the number of singular triplets a layer trains on. Clipped to min(out_features, in_features) per
            module, with a note in the summary.
        target_modules: "all-linear" (every linear layer except the output head), names that module names end in
            (``["q_proj", "v_proj"]``), or one regular expression for whole module names.
        exclude_modules: names or a regular expression, taken away from the targets.
        dropout: probability with which entries of x are dropped on the adapter's branch while training, 0 <= p < 1.
            The branch carries the principal part of the weight, so 0 is the default.
        tol: largest residual allowed for a singular triplet, see :func:`osora.truncated_svd`. Use 1e-4 or less to save
            adapters without their basis.
        seed: of the decomposition's random start.
        rank_pattern: module name or regular expression → rank, for modules that differ from ``r``.
        layers_to_transform: only layers with these indices (the first number in a module's name).
        rank_for_energy: a share 0 < p <= 1 of a weight's squared Frobenius norm. ``r`` (or ``rank_pattern``'s rank) is
            then the most that a module may take: it keeps the fewest leading triplets that hold this share. Where even
            ``r`` of them hold less, it keeps ``r``, with a note in the summary.
        modules_to_save: names that module names end in (``["classifier"]``): these modules are trained whole, each
            adapter its own copy of them, and saved with it. They are not adapted (docs/whole_modules.md).

        train: "both", or "o" or "s" alone. The other one stays as it is at the start, and is no trainable parameter.
        side: "output", O scales the rows of the weight's top part; or "input", it scales its columns, and o is
            [in_features].
        initial_o: a number that O starts at, or "ones". The start is the base model whatever it is (docs/ablations.md).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, naming it.
    """

    method: ClassVar[str] = "osora"

    train: str = "both"
    side: str = "output"
    initial_o: float | str = 1.0

    def __post_init__(self) -> None:
        """Check the fields of its own as well."""
        super().__post_init__()
        _check_one_of("train", self.train, ("both", "o", "s"))
        _check_one_of("side", self.side, ("output", "input"))
        value = 1.0 if self.initial_o == "ones" else self.initial_o
        if isinstance(value, str):
            raise ValueError(f'initial_o must be a number or "ones", got {value!r}')
        value = _checked_float("initial_o", value)
        object.__setattr__(self, "initial_o", value)
        if value != 0:
            _check_scale("initial_o", abs(value))
        if self.initial_o == 0 and self.train == "s":
            raise ValueError('initial_o=0 with train="s" trains nothing: O is 0 and stays 0')


@dataclass(frozen=True)
class SorsaConfig(AdapterConfig):
    """SORSA: trains a weight's top singular triplets themselves (docs/method.md).

    Args:
        r: rank, the number of singular triplets a layer trains on. Clipped to min(out_features, in_features) per
            module, with a note in the summary.
        target_modules: "all-linear" (every linear layer except the output head), names that module names end in
            (``["q_proj", "v_proj"]``), or one regular expression for whole module names.
        exclude_modules: names or a regular expression, taken away from the targets.
        dropout: probability with which entries of x are dropped on the adapter's branch while training, 0 <= p < 1.
            The branch carries the principal part of the weight, so 0 is the default.
        tol: largest residual allowed for a singular triplet, see :func:`osora.truncated_svd`. Use 1e-4 or less to save
            adapters without their basis.
        seed: of the decomposition's random start.
        rank_pattern: module name or regular expression → rank, for modules that differ from ``r``.
        layers_to_transform: only layers with these indices (the first number in a module's name).
        rank_for_energy: a share 0 < p <= 1 of a weight's squared Frobenius norm. ``r`` (or ``rank_pattern``'s rank) is
            then the most that a module may take: it keeps the fewest leading triplets that hold this share. Where even
            ``r`` of them hold less, it keeps ``r``, with a note in the summary.
        modules_to_save: names that module names end in (``["classifier"]``): these modules are trained whole, each
            adapter its own copy of them, and saved with it. They are not adapted (docs/whole_modules.md).

        alpha: the adapter's ΔW is scaled by alpha / r, with the rank r that a layer has. None, the paper's: 1.
        gamma: weight of the penalty on ``U`` and ``V`` that keeps their columns orthonormal: gamma times the mean over
            all factors. 0 for none. Each optimiser step gets its gradient by itself (docs/sorsa.md).
        regularizer: "squared" is ``‖QᵀQ − I‖_F²`` of a factor Q, "paper" is ``‖QᵀQ − I‖_F``, whose gradient has full
            size however small the deviation is.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, naming it.
    """

    method: ClassVar[str] = "sorsa"

    alpha: float | None = None
    gamma: float = 1.0
    regularizer: str = "squared"

    def __post_init__(self) -> None:
        """Check the fields of its own as well."""
        super().__post_init__()
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _checked_float("alpha", self.alpha))
            if self.alpha <= 0:
                raise ValueError(f"alpha must be positive, got {self.alpha}")
            _check_scale("alpha", self.alpha)
        object.__setattr__(self, "gamma", _checked_float("gamma", self.gamma))
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")
        _check_one_of("regularizer", self.regularizer, REGULARIZERS)


CONFIGS: dict[str, type[AdapterConfig]] = {kind.method: kind for kind in (OsoraConfig, SorsaConfig)}
