# SPDX-License-Identifier: Apache-2.0
"""One operator, several implementations: what the `backend` fixture hands to a test.

Every backend takes and returns CPU tensors, so that a test function is written once.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from root import ROOT
from torch import Tensor

NAMES = ("reference", "cpu", "emulated", "cuda")


def required(what: str) -> bool:
    """OSORA_REQUIRE_CUDA=1, OSORA_REQUIRE_EMULATION=1, OSORA_REQUIRE_NVCC=1: what is missing fails, not skips."""
    return os.environ.get(f"OSORA_REQUIRE_{what}") == "1"


def unavailable(what: str, reason: str) -> None:
    """Skip with a reason, or fail where `what` is required."""
    if required(what):
        pytest.fail(f"{reason} (OSORA_REQUIRE_{what}=1)")
    pytest.skip(reason)


def emulation_folder() -> Path:
    """Where the build put the emulator's programs and library: tests/emulation/CMakeLists.txt."""
    if folder := os.environ.get("OSORA_EMULATION_DIR"):
        return Path(folder)
    if folder := os.environ.get("OSORA_BUILD_DIR"):
        return Path(folder) / "tests/emulation"
    return ROOT / "build/emulation"


def load_from_build(name: str) -> None:
    """A library of torch operators that the build makes beside the emulator's."""
    library = emulation_folder().parent / name
    if not library.exists():
        unavailable("EMULATION", f"no {library}: build with -DOSORA_EMULATION=ON and set OSORA_BUILD_DIR")
    torch.ops.load_library(library)


class OtherRounding:
    """torch.ops.osora, but its SVD runs on a machine that rounds otherwise; see tests/rounding."""

    def __init__(self, seed: int) -> None:
        import osora  # noqa: F401  (registers torch.ops.osora)

        load_from_build("rounding/libosora_rounding.so")
        torch.ops.osora_rounding.round_by(seed)

    def __getattr__(self, operator: str) -> Any:
        return getattr(torch.ops.osora_rounding if operator == "truncated_svd" else torch.ops.osora, operator)


class Backend:
    """The operators of one implementation, with CPU tensors in and out.

    Asking for an operator that it does not have skips the test.
    """

    def __init__(self, name: str, operators: Any, device: str = "cpu") -> None:
        self.name = name
        self.device = device
        self._operators = operators

    def __repr__(self) -> str:
        return f"Backend({self.name})"

    def __getattr__(self, operator: str) -> Any:
        if operator.startswith("_"):
            raise AttributeError(operator)
        function = getattr(self._operators, operator, None)
        if function is None:
            pytest.skip(f"backend {self.name} has no operator {operator}")

        def call(*args: Any) -> Any:
            return _move(function(*_move(args, self.device)), "cpu")

        return call

    def fold_backward(self, U: Tensor, P: Tensor, S0: Tensor, s: Tensor, o: Tensor, *need: bool) -> Any:
        """With need_s and need_o true unless given."""
        return self.__getattr__("fold_backward")(U, P, S0, s, o, *(need or (True, True)))


def _move(value: Any, device: str) -> Any:
    # A tensor that is there already stays as it is: its strides and its offset are part of a test.
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device) for item in value)
    return value


def _reference() -> ModuleType:
    from osora import reference

    return reference


def _compiled() -> Any:
    import osora  # noqa: F401  (registers torch.ops.osora)

    return torch.ops.osora


def make_backend(name: str) -> Backend:
    """The backend of that name; skips or fails where it cannot run."""
    if name == "reference":
        return Backend(name, _reference())
    if name == "cpu":
        return Backend(name, _compiled())
    if name == "emulated":
        library = emulation_folder() / "libosora_emulated.so"
        if not library.exists():
            unavailable("EMULATION", f"no {library}: build with -DOSORA_EMULATION=ON and set OSORA_BUILD_DIR")
        torch.ops.load_library(library)
        return Backend(name, torch.ops.osora_emulated)
    if not torch.cuda.is_available():
        unavailable("CUDA", "no CUDA card")
    import osora

    if not osora.build_info()["cuda"]:
        unavailable("CUDA", "osora was built without CUDA")
    return Backend("cuda", _compiled(), "cuda")
