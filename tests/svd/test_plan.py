# SPDX-License-Identifier: Apache-2.0
"""What a truncated SVD will do and take is known in advance, and is what it does."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from matrices import check, lanczos_basis, powers, quietly, randn, solve, with_spectrum

from osora import reference
from osora.svd import truncated
from osora.svd.plan import svd_plan
from osora.svd.truncated import truncated_svd


@pytest.mark.parametrize(
    "d, k, r, dtype, method",
    [
        # 24 r d k + 3.5e8 against (0.75 max + 4 min) min^2, in multiply-adds
        (576, 576, 64, torch.float32, "lanczos"),  # 8.6e8 < 9.1e8
        (576, 576, 80, torch.float32, "gram"),  # 9.9e8
        (576, 1536, 64, torch.bfloat16, "gram"),  # 1.7e9 > 1.1e9
        (1024, 1024, 64, torch.float64, "lanczos"),
        (192, 576, 64, torch.float32, "gram"),  # and no room: the basis of 144 is more than half of 192
        (300, 300, 300, torch.float32, "gram"),
        (1, 50, 1, torch.float32, "gram"),
        (50, 1, 1, torch.float64, "gram"),
    ],
)
def test_the_plan_is_a_function_of_shape_and_rank(d, k, r, dtype, method):
    found = quietly(with_spectrum(d, k, powers(min(d, k), -0.4)).to(dtype), r)
    assert found.converged and found.method == method


@pytest.mark.parametrize("method", ["auto", "lanczos", "gram", "full", "lowrank"])
@pytest.mark.parametrize("d, k, r", [(576, 576, 64), (150, 400, 16), (300, 300, 4)])
def test_the_plan_in_advance_is_what_was_done(d, k, r, method):
    plan = svd_plan((d, k), r, method=method)
    found = quietly(with_spectrum(d, k, powers(min(d, k), -0.4)).float(), r, method=method)
    assert plan.method == found.method and plan.bytes > 0
    if plan.method == "lanczos":
        assert plan.basis == lanczos_basis(r) and r < plan.keep < plan.basis
        assert found.passes < found.columns <= found.passes * max(plan.block, r), "a pass is a block, or the answer"
    else:
        assert (plan.block, plan.keep, plan.basis) == (0, 0, 0)
    if plan.method == "lowrank":  # 16 iterations of two products with r columns and, at least, a start and an end
        assert found.passes >= 34 and found.columns >= 34 * r


def test_the_plan_knows_the_dtype_the_device_and_the_threads(threads):
    sizes = {dtype: svd_plan((600, 500), 16, dtype, method="lanczos").bytes for dtype in reference.FLOATS}
    assert sizes[torch.float32] == sizes[torch.bfloat16] == sizes[torch.float16] < sizes[torch.float64]
    on_card = [svd_plan((600, 500), 16, dtype, "cuda:1").bytes for dtype in (torch.bfloat16, torch.float32)]
    assert on_card[1] - on_card[0] == 2 * 600 * 500, "a copy of the weight, in its own dtype"
    assert svd_plan((600, 500), 16, device=torch.device("cuda", 1)) == svd_plan((600, 500), 16, device="cuda")
    few = svd_plan(torch.Size([2048, 2048]), 16)
    threads(torch.get_num_threads() + 1)
    assert svd_plan((2048, 2048), 16).bytes > few.bytes, "sums per group of panels"
    assert svd_plan((500, 600), 16) == svd_plan((500, 600), 16), "and nothing else"


@pytest.mark.parametrize(
    "rank, widths",
    [
        (1, (16, 17, 65)),
        (8, (16, 24, 72)),
        (32, (16, 48, 96)),
        (64, (32, 96, 192)),
        (100, (48, 150, 294)),
        (128, (64, 192, 384)),
        (256, (64, 384, 576)),
        (287, (64, 430, 622)),
        (288, (72, 432, 648)),
        (512, (128, 768, 1152)),
        (1024, (128, 1536, 2304)),
    ],
)
def test_a_card_takes_wider_blocks_and_three_of_them_or_more(rank, widths):
    plan = svd_plan((8192, 8192), rank, torch.bfloat16, "cuda", "lanczos")
    assert (plan.block, plan.keep, plan.basis) == widths


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (((5,), 1), ValueError, r"shape must be \[out_features, in_features\], two positive ints, got \(5,\)"),
        (((2, 5, 4), 1), ValueError, "shape must be"),
        (((5, 0), 1), ValueError, "shape must be"),
        (((5, -4), 1), ValueError, "shape must be"),
        (((5, 4.0), 1), ValueError, "shape must be"),
        (((True, 4), 1), ValueError, "shape must be"),
        (((5, 4), 5), ValueError, r"rank must be in 1 \.\. min\(out_features, in_features\) = 4"),
        (((5, 4), 0), ValueError, "rank must be"),
        (((5, 4), 2.0), TypeError, "rank must be an int"),
        (((5, 4), 2, torch.int8), TypeError, "a weight must be float64, float32, bfloat16 or float16, got torch.int8"),
        (((5, 4), 2, torch.float32, "cpu", "svd"), ValueError, "method must be one of auto, lanczos"),
        (((70, 60), 16, torch.float32, "cpu", "lanczos"), ValueError, r"needs .* >= 80 at rank 16, got 60"),
        (((5, 4), 2, torch.float32, "nowhere"), RuntimeError, "nowhere"),
    ],
)
def test_a_plan_for_what_cannot_be_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        svd_plan(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["lanczos", "gram", "full", "lowrank"])
def test_columns_and_norm(method, dtype):
    weight = randn(2, 200, 150, dtype=dtype) * torch.tensor([1.0, 100.0], dtype=dtype)[:, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "lowrank" may miss the tolerance
        found = truncated_svd(weight, 8, method=method)
    assert torch.allclose(found.norm, torch.linalg.matrix_norm(weight.double()), rtol=1e-12, atol=0)
    assert found.norm.dtype == torch.float64 and found.columns.dtype == torch.int64
    assert (found.columns >= found.passes).all() and (found.passes > 0).all()


def test_subspace_iteration_is_judged_like_the_rest():
    """As torch.svd_lowrank it stops after a fixed number of passes; here the result says how far it came."""
    easy, hard = (with_spectrum(300, 200, powers(200, exponent)).float() for exponent in (-2.0, -0.05))
    found = quietly(easy, 8, method="lowrank")
    check(easy, found)
    assert found.method == "lowrank"
    found = quietly(hard, 8, method="lowrank")
    check(hard, found)
    assert not found.converged and found.certificate.max_residual > 1e-3
    assert found.passes == quietly(easy, 8, method="lowrank").passes, "one attempt, no repeat in float64"


MEMORY = """
import ctypes, sys, torch
from osora import svd_plan, truncated_svd

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

torch.set_num_threads(int(sys.argv[1]))
n, rank = 1792, 16
for dtype in (torch.float32, torch.bfloat16):
    weight = torch.randn(n, n).to(dtype)
    for method in ("lanczos", "gram"):
        truncated_svd(weight[:1100, :1100], rank, method=method)  # libraries and threads have what they keep
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        found = truncated_svd(weight, rank, method=method)
        taken = status("VmHWM") - before
        answer = sum(part.nbytes for part in found)
        print(method, dtype, taken, svd_plan((n, n), rank, dtype, method=method).bytes + answer, found.converged.item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs and malloc_trim")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_memory_is_taken_than_planned(threads):
    # The plan counts arrays. What glibc keeps of freed ones is not the plan's: every array gets a mapping of its own
    # here, and goes back when it is freed. 3 MiB are for stacks, MKL's packed panels and the interpreter. A float32
    # copy of the bfloat16 weight would be 12 MiB; the plan of Lanczos (7 to 9) and the allowance leave 6 to 9 for it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits shall take no core from other tests
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for method, dtype, taken, planned, converged in rows:
        assert converged == "True"
        assert int(taken) <= int(planned) + (3 << 20), f"{method} {dtype}: {int(taken) / 2**20:.1f} MiB"
        assert int(taken) > int(planned) / 8, "or nothing was measured"


def test_work_on_a_layer_like_matrix_is_bounded():
    # 576 x 576 with a slow decay at rank 64 takes 44 to 60 passes; twice that means a repeat in float64.
    for seed in range(3):
        found = solve(with_spectrum(576, 576, powers(576, -0.35), seed).to(torch.bfloat16), 64, seed=seed)
        assert found.passes < 90


def test_random_key_is_a_stable_function_of_the_name():
    assert truncated.random_key("") == 0
    assert truncated.random_key("a") == truncated.random_key("a") != truncated.random_key("b")
    assert truncated.random_key("a") == int.from_bytes(bytes.fromhex("ca978112ca1bbdca"), "little", signed=True)
