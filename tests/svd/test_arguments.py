# SPDX-License-Identifier: Apache-2.0
"""What the truncated SVD refuses, by name and with the cure."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from matrices import (
    randn,
    same,
)
from torch.utils._python_dispatch import TorchDispatchMode

from osora.svd.arguments import SVD_METHODS
from osora.svd.plan import svd_plan
from osora.svd.truncated import decompose, truncated_svd


def spoiled(value):
    weight = torch.ones(5, 4)
    weight[3, 2] = value
    return weight


BAD_WEIGHTS = {
    "nan": (spoiled(math.nan), ValueError, "NaN or infinite"),
    "inf": (spoiled(math.inf), ValueError, "NaN or infinite"),
    "minus inf": (spoiled(-math.inf), ValueError, "NaN or infinite"),
    "half inf": (spoiled(math.inf).half(), ValueError, "NaN or infinite"),
    "nan in a batch": (torch.stack([torch.ones(5, 4), spoiled(math.nan)]), ValueError, "NaN or infinite"),
    "integer": (torch.ones(5, 4, dtype=torch.int64), TypeError, "int64"),
    "int8": (torch.ones(5, 4, dtype=torch.int8), TypeError, "int8"),
    "bool": (torch.ones(5, 4, dtype=torch.bool), TypeError, "bool"),
    "complex": (torch.ones(5, 4, dtype=torch.complex64), TypeError, "complex64"),
    "float8": (torch.ones(5, 4).to(torch.float8_e4m3fn), TypeError, "float8"),
    "1-D": (torch.ones(5), ValueError, r"\(5,\)"),
    "0-D": (torch.tensor(1.0), ValueError, r"\(\)"),
    "no rows": (torch.ones(0, 4), ValueError, "empty"),
    "no columns": (torch.ones(5, 0), ValueError, "empty"),
    "no columns in a batch of none": (torch.ones(0, 5, 0), ValueError, "empty"),
    "meta": (torch.ones(5, 4, device="meta"), ValueError, "meta"),
    "meta 1-D": (torch.ones(5, device="meta"), ValueError, "meta"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_bad_weight_is_refused_by_name(case):
    weight, error, words = BAD_WEIGHTS[case]
    with pytest.raises(error, match=words) as caught:
        truncated_svd(weight, 1, name="model.layers.3.up_proj")
    assert "model.layers.3.up_proj" in str(caught.value)
    with pytest.raises(error, match=rf"^weight .*{words}"):
        truncated_svd(weight, 1)


@pytest.mark.parametrize("rank, error", [(0, ValueError), (-1, ValueError), (5, ValueError), (True, TypeError),
                                         (2.0, TypeError), ("2", TypeError), (None, TypeError)])  # fmt: skip
def test_a_bad_rank_is_refused(rank, error):
    with pytest.raises(error, match="rank must be"):
        truncated_svd(torch.ones(5, 4), rank)
    with pytest.raises(error, match="rank must be"):
        truncated_svd(torch.ones(0, 5, 4), rank)


@pytest.mark.parametrize("tol", [0, 0.0, -1e-3, math.nan, math.inf, "1e-3", None])
def test_a_bad_tolerance_is_refused(tol):
    with pytest.raises(ValueError, match="tol must be a positive number"):
        truncated_svd(torch.ones(5, 4), 2, tol=tol)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises((ValueError, TypeError), match="seed must be"):
        truncated_svd(torch.ones(5, 4), 2, seed=seed)


def test_a_bad_method_is_refused_with_the_choices():
    choices = "auto, lanczos, gram, full, lowrank, gesvd, gesvdj, gesvdp, gesvda, gesvdr"
    assert choices.split(", ") == list(SVD_METHODS)
    for wrong in ("svd", "Lanczos", "", None):
        with pytest.raises(ValueError, match=f"method must be one of {choices}, got {wrong!r}"):
            truncated_svd(torch.ones(5, 4), 2, method=wrong)
    with pytest.raises(ValueError, match=r'method "lanczos" needs .* >= 80 at rank 16, got 60'):
        truncated_svd(torch.ones(70, 60), 16, method="lanczos")


@pytest.mark.parametrize("driver", ["gesvd", "gesvdj", "gesvdp", "gesvda", "gesvdr"])
def test_a_driver_of_cusolver_needs_a_cuda_tensor(driver):
    words = f'method "{driver}" is a driver of cuSOLVER and needs a CUDA tensor .* "full" is LAPACK\'s gesdd'
    with pytest.raises(ValueError, match=words):
        truncated_svd(torch.ones(5, 4), 2, method=driver)
    with pytest.raises(ValueError, match=words):
        svd_plan((5, 4), 2, method=driver)
    assert svd_plan((5, 4), 2, device="cuda", method=driver).method == driver


@pytest.mark.parametrize(
    "wrong, error",
    [(0, ValueError), (-5, ValueError), (2**63, ValueError), (True, TypeError), (1e6, TypeError), ("1", TypeError)],
)
def test_a_bad_max_memory_is_refused(wrong, error):
    for call in (lambda **options: decompose([], 2, names=[], **options), lambda **options: truncated_svd(
        torch.ones(5, 4), 2, **options
    )):  # fmt: skip
        with pytest.raises(error, match=r"max_memory must be .*, got"):
            call(max_memory=wrong)


@pytest.mark.parametrize("method", ["lanczos", "gram", "full", "lowrank"])
def test_max_memory_is_what_one_matrix_takes(method, threads):
    """As many matrices at once as fit; one must. What is computed does not depend on it."""
    threads(2)
    batch = randn(4, 120, 100, dtype=torch.float32)
    size = svd_plan((120, 100), 4, method=method).bytes
    options = dict(method=method, tol=0.5, unconverged="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        free = truncated_svd(batch, 4, **options)
        for limit in (size, 2 * size, 2**62):
            assert same(free, truncated_svd(batch, 4, max_memory=limit, **options))
    words = rf'a matrix \[120, 100\] takes {size} bytes by method "{method}", and max_memory is {size - 1}'
    with pytest.raises(ValueError, match=words):
        truncated_svd(batch, 4, max_memory=size - 1, **options)


class Recorder(TorchDispatchMode):
    """Names of the operators that Python code calls."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_good_weights_are_read_by_the_operator_alone():
    """A look for NaN in Python is one more pass over every weight of a model."""
    weight = randn(3, 40, 30, dtype=torch.bfloat16)
    with Recorder() as seen:
        truncated_svd(weight, 4)
    seen.names -= {"osora::truncated_svd", "osora_rounding::truncated_svd", *(f"aten::{name}" for name in (
        "alias", "detach", "view", "unbind", "select", "stack", "cat", "_to_copy", "lift_fresh", "empty", "reshape",
        "_unsafe_view", "unsqueeze", "expand", "clone", "le",
    ))}  # fmt: skip
    assert not seen.names


def test_an_error_about_anything_else_is_passed_on(monkeypatch):
    """NaN is not blamed for what the operator refuses for another reason."""
    with pytest.raises(ValueError, match=r"needs .* >= 80") as caught:
        truncated_svd(spoiled(math.nan).repeat(14, 15), 16, method="lanczos", name="layer")
    assert "NaN" not in str(caught.value)


def test_labels_are_for_messages_and_names_for_the_stream():
    weight = randn(200, 160, dtype=torch.float32)
    plain, labelled = (decompose([weight], 8, names=["a"], labels=labels)[0] for labels in (None, ["a.weight"]))
    assert torch.equal(plain.U, labelled.U) and labelled.name == "a"
    with pytest.raises(ValueError, match=r"^b\.weight has NaN or infinite entries: check the checkpoint"):
        decompose([torch.ones(5, 4), spoiled(math.inf)], 2, names=["a", "b"], labels=["a.weight", "b.weight"])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        decompose([weight], 8, names=["a"], labels=[])


def test_decompose_wants_matrices_of_one_shape():
    ones = torch.ones(5, 4)
    with pytest.raises(ValueError, match="share one shape"):
        decompose([ones, torch.ones(4, 5)], 2, names=["a", "b"])
    with pytest.raises(ValueError, match="third must be a matrix"):
        decompose([ones, ones, torch.ones(1, 5, 4)], 2, names=["a", "b", "third"])
    with pytest.raises(ValueError, match="b has NaN"):
        decompose([ones, spoiled(math.nan)], 2, names=["a", "b"])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        decompose([ones], 2, names=[])
    assert decompose([], 2, names=[]) == []


def test_the_operator_refuses_what_the_wrapper_would():
    op = torch.ops.osora.truncated_svd
    ones = torch.ones(5, 4)
    for arguments, words in [
        (([ones], 2, 1e-3, 0, [], "auto"), "one key per weight"),
        (([ones], 2, -1.0, 0, [0], "auto"), "tol must be positive"),
        (([ones], 2, math.nan, 0, [0], "auto"), "tol must be positive"),
        (([ones], 0, 1e-3, 0, [0], "auto"), "rank must be in 1"),
        (([ones], 5, 1e-3, 0, [0], "auto"), "rank must be in 1"),
        (([ones.to(torch.int32)], 2, 1e-3, 0, [0], "auto"), "float64, float32"),
        (([ones, ones.double()], 2, 1e-3, 0, [0, 0], "auto"), "must all be"),
        (([spoiled(math.nan)], 2, 1e-3, 0, [0], "auto"), "NaN or infinite"),
        (([ones], 2, 1e-3, 0, [0], "svd"), "method must be"),
    ]:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
            op(*arguments)


STARVED = """
import resource, torch
from osora.svd.truncated import truncated_svd
torch.set_num_threads(3)
weight = torch.randn(4, 300, 300)
truncated_svd(weight[:1, :40, :40], 4)
torch.ones(1 << 22).isfinite().all()  # libgomp, which aborts if it cannot have its threads, takes them here
pages = int(open("/proc/self/statm").read().split()[0])
for megabytes in (2, 6, 10, 80):  # no thread starts, some start, all start and one of them runs out
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        truncated_svd(weight, 300, method="full")
        print("served")
    except (RuntimeError, MemoryError):
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("alive", bool(truncated_svd(weight, 8).converged.all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_an_error_in_a_worker_thread_reaches_the_caller():
    # Starved of address space, threads fail to start or to allocate; the process must live to say so.
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "alive True" in done.stdout and "refused" in done.stdout
