# SPDX-License-Identifier: Apache-2.0
"""The methods' configurations as PEFT wants them: the native ones' fields, and those that PEFT gives any method."""

import copy
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from osora import config as native
from osora.config import ALL_LINEAR
from osora.files.basis import check_missing
from osora.files.format import (
    BLOCK,
    CONFIG_FILE,
    FILE_METHODS,
    AdapterError,
    Description,
    described,
    read_json,
)
from osora.files.info import config_of
from osora.files.tensors import check_header
from osora.model.state import BasisNote
from osora.peft import saving
from osora.peft.options import knows_its_options
from osora.peft.registry import peft_type
from osora.peft.selecting import STASH

_OF_A_BASIS = {"basis": None, "missing": "raise"}  # options of the place where an adapter is made, not of the adapter


@dataclass
class AdapterConfig(PeftConfig):
    """What the configurations of both methods have. Use :class:`OsoraConfig` or :class:`SorsaConfig`."""

    native_class: ClassVar[type[native.AdapterConfig]]

    r: int = field(default=64, metadata={"help": "Rank: the number of singular triplets a layer trains on."})
    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR,
        metadata={"help": '"all-linear", names that module names end in, or a regular expression for whole names.'},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression to leave out."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropout on the adapter's branch."})
    tol: float = field(default=1e-3, metadata={"help": "Largest residual of a singular triplet."})
    seed: int = field(default=0, metadata={"help": "Of the decomposition's random start."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regular expression to rank."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, where layers_to_transform cannot tell it."}
    )
    rank_for_energy: float | None = field(
        default=None, metadata={"help": "Share of a weight's squared norm that its rank is to hold."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False starts from random changes instead of none, for tests."}
    )
    save_basis: bool = field(default=True, metadata={"help": "Whether the adapter's file holds U and V."})
    basis: str | None = field(default=None, metadata={"help": "Folder of a basis to read U, V and S0 from."})
    missing: str = field(default="raise", metadata={"help": '"raise" or "compute": layers that the basis lacks.'})
    osora: dict | None = field(default=None, repr=False, metadata={"help": "Of a saved adapter: what is in its file."})

    def __post_init__(self) -> None:
        """Check every field, as the native configuration does."""
        super().__post_init__()
        self.peft_type = peft_type(FILE_METHODS[self.native_class.method].peft_type)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")
        if self.bias not in ("none", "all", f"{self.method}_only"):
            raise ValueError(f'bias must be "none", "all" or "{self.method}_only", got {self.bias!r}')
        for name in ("init_weights", "save_basis"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.basis is not None:
            if not isinstance(self.basis, str | os.PathLike):
                raise TypeError(f"basis must be the folder of a basis, or None, got {self.basis!r}")
            self.basis = os.fspath(self.basis)
        check_missing(self.missing)
        self.native()

    @property
    def method(self) -> str:
        """The method's name in lower case, with which the names of its tensors begin."""
        return self.native_class.method

    def native(self) -> native.AdapterConfig:
        """The configuration of the native API with the same options. Raises TypeError or ValueError for a bad one."""
        return self.native_class.from_dict({f.name: getattr(self, f.name) for f in fields(self.native_class)})

    # -- files --

    def description(self) -> Description | None:
        """What the file said that this came from; None for one that came from no adapter. Raises AdapterError."""
        if self.osora is None:
            return None
        return described(self._options() | {BLOCK: self.osora}, Path(CONFIG_FILE))

    def _options(self) -> dict[str, Any]:
        unset = [key for key, value in _OF_A_BASIS.items() if getattr(self, key) == value]
        options = {key: value for key, value in asdict(self).items() if key not in ("osora", *unset)}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in options.items()} | {
            "peft_type": FILE_METHODS[self.native_class.method].peft_type
        }

    def to_dict(self) -> dict[str, Any]:
        """The options as ``adapter_config.json`` has them, without the block of a saved adapter."""
        return self._options()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "AdapterConfig":
        """As ``PeftConfig.from_pretrained``; of a local adapter the names and shapes of its tensors are checked too.

        Raises:
            osora.AdapterError: the adapter is damaged, of another format, or no adapter of osora's; an option that is
                unknown, or has a bad value.
            FileNotFoundError: there are no tensors, or only a pickle.
        """
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """What :meth:`from_pretrained` reads, checked as it says."""
        path = Path(path_json_file)
        contents = read_json(path)
        if not contents:
            raise AdapterError(f"{path} holds no options: it must be a JSON object with a peft_type")
        if any(path.parent.glob("adapter_model.*")):
            description = described(contents, path)
            check_header(path.parent, description)
            config_of(description)  # PEFT would pass over an option that it does not know
        return contents

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``: of an adapter that is in a model, with what its file is checked by.

        Raises:
            ValueError: the adapter has NaN or infinite values, or its parameters are sharded.
        """
        options = {key: value for key, value in self._options().items() if key not in _OF_A_BASIS}
        if kwargs.get("auto_mapping_dict") is not None:
            options["auto_mapping"] = kwargs["auto_mapping_dict"]
        saving.save(self, options, Path(save_directory))

    # -- the model it is in --

    _note: ClassVar[BasisNote | None] = None  # of an instance: which kept basis it came from

    def came_from(self, basis: BasisNote | None) -> None:
        """Remember the kept basis that the adapter came from: its file says so."""
        self.__dict__["_note"] = basis

    @property
    def note(self) -> BasisNote | None:
        """What :meth:`came_from` was told."""
        return self.__dict__.get("_note")

    _home: ClassVar[None] = None  # of an instance: the model without PEFT around it, and the adapter's name there

    def settle_in(self, model: nn.Module, adapter: str) -> None:
        """Remember the model that this configures an adapter of: saving it needs the base weights' fingerprints."""
        self.__dict__["_home"] = (model, adapter)

    @property
    def home(self) -> tuple[nn.Module, str] | None:
        """What :meth:`settle_in` was told."""
        return self.__dict__.get("_home")

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdapterConfig":
        """A copy for the copy of its model, if that is what is being copied, or for none."""
        new = copy.copy(self)
        new.__dict__ = {
            key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key not in ("_home", STASH)
        }
        memo[id(self)] = new
        if self.home is not None and id(self.home[0]) in memo:
            new.settle_in(memo[id(self.home[0])], self.home[1])
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_home", STASH)}


@knows_its_options
@dataclass
class OsoraConfig(AdapterConfig):
    """OSoRA as a PEFT method: the options of :class:`osora.OsoraConfig`, and PEFT's own.

    Args:
        r, target_modules, exclude_modules, dropout, tol, seed, rank_pattern, layers_to_transform, rank_for_energy:
            as in :class:`osora.OsoraConfig`. ``target_modules=None`` is "all-linear".
        train, side, initial_o: as in :class:`osora.OsoraConfig` (docs/ablations.md).
        layers_pattern: name of the list of layers, where ``layers_to_transform`` cannot tell it.
        bias: "none", "all", or "osora_only" for the biases of adapted layers.
        modules_to_save: modules to train and save whole.
        trainable_token_indices: rows of the embedding to train.
        init_weights: False starts from random changes instead of none. For tests.
        save_basis: whether the file holds U and V. Without them loading decomposes the base again, or reads the basis
            that the adapter came from, and checks.
        basis: folder of a basis of this base, as osora.initialise writes it: U, V and S0 are read, not computed. It is
            no part of the file, which says by itself what basis it came from.
        missing: "raise" or "compute", for layers that the basis does not have.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, naming it.
    """

    native_class: ClassVar[type[native.AdapterConfig]] = native.OsoraConfig

    train: str = field(default="both", metadata={"help": '"both", or "o" or "s" alone.'})
    side: str = field(default="output", metadata={"help": '"output" or "input", of O.'})
    initial_o: float | str = field(default=1.0, metadata={"help": "What O starts at."})


@knows_its_options
@dataclass
class SorsaConfig(AdapterConfig):
    """SORSA as a PEFT method: the options of :class:`osora.SorsaConfig`, and those that :class:`OsoraConfig` lists.

    Args:
        alpha, gamma, regularizer: as in :class:`osora.SorsaConfig`. The penalty needs nothing in the training loop.
        bias: "none", "all", or "sorsa_only" for the biases of adapted layers.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, naming it.
    """

    native_class: ClassVar[type[native.AdapterConfig]] = native.SorsaConfig

    alpha: float | None = field(default=None, metadata={"help": "The change is scaled by alpha / r; None is 1."})
    gamma: float = field(default=native.SorsaConfig.gamma, metadata={"help": "Weight of the orthonormality penalty."})
    regularizer: str = field(default=native.SorsaConfig.regularizer, metadata={"help": '"squared" or "paper".'})


__all__ = ["AdapterConfig", "OsoraConfig", "SorsaConfig"]
