# SPDX-License-Identifier: Apache-2.0
"""The loops of csrc/cpu for each instruction set, and that bits do not depend on the number of threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backends import make_backend
from helpers import TOLERANCE, expected_linear, linear_case
from precision import assert_within

TESTS = Path(__file__).parent
SUMS = ("ds", "do")
CPU = make_backend("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# rows and columns around the tiles of cpu/outer_amx.cpp (32 of n, 32 of d, 16 of r, 2048 rows packed at a time) and the
# vectors of cpu/fold_lanes.h (16)
@pytest.mark.parametrize(
    "n, d, r",
    [
        (1, 1, 1),
        (2, 31, 15),
        (31, 33, 17),
        (32, 32, 32),
        (33, 64, 16),
        (63, 65, 33),
        (2047, 40, 8),
        (2049, 100, 40),
        (4099, 37, 5),
        (5, 300, 300),
        (64, 70, 513),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_all_rows(n, d, r, dtype):
    case = linear_case((n,), max(r, 6), d, min(r, d), dtype)
    dy = torch.randn(n, d, dtype=torch.float64).to(dtype)
    wish = expected_linear(case, dy)
    h = CPU.linear(*case.arguments)[1]
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o)
    _, ds, do = CPU.linear_backward(dy, h, *rest, False, True, True)
    for name, got in zip(SUMS, (ds, do), strict=True):
        assert_within(got, wish.value[name], TOLERANCE[dtype] * wish.size[name])


# Many rows for the weight's size, so that W + D Vᵀ is summed first (core/linear_plan.h), and sizes around its tiles (8
# or 6 rows of D, 32 columns of V, 24 rows for a thread); the last has few rows.
@pytest.mark.parametrize(
    "n, k, d, r",
    [(9, 1, 1, 1), (400, 31, 23, 5), (400, 33, 25, 8), (700, 96, 49, 17), (700, 70, 331, 64), (3, 70, 50, 5)],
)
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_input(n, k, d, r, layout, dtype):
    case = linear_case((n,), k, d, r, dtype)
    if layout == "columns":  # a Conv1D's
        case = case.replace(weight=case.weight.t().contiguous().t())
    elif layout == "gaps":
        case = case.replace(weight=torch.stack([case.weight, case.weight], 2)[:, :, 0])
    dy = torch.randn(n, d, dtype=torch.float64).to(dtype)
    h = CPU.linear(*case.arguments)[1]
    rest = (case.weight, case.U, case.V, case.S0)
    dx = CPU.linear_backward(dy, h, *rest, case.s, case.o, True, False, False)[0]
    wish = expected_linear(case, dy)
    assert_within(dx, wish.value["dx"], TOLERANCE[dtype] * wish.size["dx"])
    nothing = CPU.linear_backward(dy, h, *rest, 0 * case.s, 0 * case.o, True, False, False)[0]
    assert torch.equal(nothing, dy @ case.weight), "an adapter of zeros must give the base's gradient, bit for bit"


@pytest.mark.parametrize("n, k, d, r", [(300, 700, 333, 17), (64, 2048, 100, 64), (1500, 90, 576, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_same_bits_on_any_number_of_threads(n, k, d, r, dtype, threads):
    case = linear_case((n,), k, d, r, dtype)
    dy = torch.randn(n, d, dtype=torch.float64).to(dtype)
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o)
    found = set()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        for _ in range(5):
            h = CPU.linear(*case.arguments)[1]
            _, ds, do = CPU.linear_backward(dy, h, *rest, False, True, True)
            found.add(tuple(t.view(torch.uint8).numpy().tobytes() for t in (h, ds, do)))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_so(dtype):
    case = linear_case((40,), 20, 35, 6, dtype)
    U = case.U.clone()
    U[34, 5] = torch.nan
    U[1, 0] = torch.inf
    D = CPU.fold(U, case.S0, case.s, case.o)
    assert D[34, 5].isnan() and D[1, 0].isinf() and int(D.isfinite().sum()) == D.numel() - 2
    dy = torch.randn(40, 35).to(dtype)
    dy[39, 34] = torch.nan
    h = CPU.linear(*case.arguments)[1]
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o)
    _, ds, do = CPU.linear_backward(dy, h, *rest, False, True, True)
    assert ds.isnan().all() and do[34].isnan() and do[:34].isfinite().all()


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is the run with fewer instructions")
@pytest.mark.slow  # `make capabilities` runs these files so, in CI too
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_processors_with_fewer_instructions(capability):
    """What a processor without AMX, AVX-512 or AVX2 runs; torch's own variable holds ours back too."""
    libraries = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    chosen = ["test_cpu_paths.py", "test_fold.py", "test_panels.py"]
    which = "(test_cpu_paths or test_fold or width or strides) and not cuda and not emulated"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", which]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in chosen)],
        env=os.environ | libraries | {"ATEN_CPU_CAPABILITY": capability},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
