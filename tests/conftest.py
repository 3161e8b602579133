# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

import importlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends import NAMES, Backend, make_backend


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The operators of: the plain-torch reference, the CPU kernels, the CUDA kernels emulated, and on a card."""
    return make_backend(request.param)


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Every test starts from seed 0 and leaves the random state as it found it."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python_state)
    torch.set_rng_state(torch_state)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: whatever an operator leaves unwritten shows in its result."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """The benchmarks' modules by name, on one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as change:
        change.setenv("HF_HUB_OFFLINE", "1")
        change.syspath_prepend(Path(__file__).parents[1] / "bench")
        yield importlib.import_module
    torch.set_num_threads(threads)
