# SPDX-License-Identifier: Apache-2.0
"""The stand-ins for cuBLAS, cuSOLVER and the CUDA runtime: they compute what torch does, and refuse what is wrong.

Without them the host code of csrc/cuda would run only on a card; a stand-in that lets a mistake pass tests nothing.
"""

import re
import subprocess

import pytest
import torch
from backends import emulation_folder, unavailable

RIGHT = (
    "gemm",
    "gemm-tf32-rounding",
    "gemm-edges",
    "trsm",
    "potrf",
    "syev",
    "svd",
    "copies",
    "faults",
    "versions-and-attributes",
    "memory-and-tensors",
)
INVALID_BLAS, UNSUPPORTED_BLAS, INVALID_SOLVER, INVALID_RUNTIME, CAPTURE = 7, 15, 3, 1, 900
# Per wrong call: the status it must return, and what the refusal must say.
WRONG = {
    "gemm-short-ld": (INVALID_BLAS, "A has 4 rows and leading dimension 3"),
    "gemm-short-ldc": (INVALID_BLAS, "C has 4 rows and leading dimension 3"),
    "gemm-negative-size": (INVALID_BLAS, "A has a negative size"),
    "gemm-ld-beyond-allocation": (INVALID_BLAS, r"B ends 12 bytes beyond allocation \d+ of 128 bytes"),
    "gemm-stride-beyond-allocation": (INVALID_BLAS, "A ends 4 bytes beyond"),
    "gemm-batch-beyond-allocation": (INVALID_BLAS, "A ends 64 bytes beyond"),
    "gemm-host-pointer": (INVALID_BLAS, "A is not in device memory"),
    "gemm-null-pointer": (INVALID_BLAS, "B is null"),
    "gemm-null-alpha": (INVALID_BLAS, "alpha or beta is null"),
    "gemm-device-beta": (INVALID_BLAS, "alpha or beta is device memory"),
    "gemm-misaligned": (INVALID_BLAS, "A is not aligned to 4 bytes"),
    "gemm-misaligned-bfloat16": (INVALID_BLAS, "A holds 16-bit numbers and is not aligned to 16 bytes"),
    "gemm-mixed-types": (UNSUPPORTED_BLAS, "A bfloat16, B float32, C float32 do not go with compute type 68"),
    "gemm-bfloat16-to-float16": (UNSUPPORTED_BLAS, "C float16 do not go with compute type 68"),
    "gemm-tf32-of-bfloat16": (UNSUPPORTED_BLAS, "A bfloat16, B bfloat16, C float32 do not go with compute type 77"),
    "gemm-float32-in-float64": (UNSUPPORTED_BLAS, "C float32 do not go with compute type 70"),
    "gemm-output-is-input": (INVALID_BLAS, "C overlaps A"),
    "gemm-output-overlaps-itself": (INVALID_BLAS, "C and C, both written to, overlap"),
    "gemm-one-output-for-all": (INVALID_BLAS, "C and C, both written to, overlap"),
    "gemm-use-after-free": (INVALID_BLAS, r"A is in released allocation \d+"),
    "gemm-unknown-handle": (1, "is no live cuBLAS handle"),
    "gemm-stale-stream": (INVALID_BLAS, "the handle's stream is not the current one"),
    "gemm-workspace-lost-with-stream": (INVALID_BLAS, "no workspace was set after the last cublasSetStream"),
    "gemm-workspace-is-operand": (INVALID_BLAS, "the handle's workspace overlaps B"),
    "gemm-workspace-released": (INVALID_BLAS, r"the handle's workspace is in released allocation \d+"),
    "trsm-host-pointers": (INVALID_BLAS, "the array of pointers A is not in device memory"),
    "trsm-pointer-outside": (INVALID_BLAS, "B ends 4 bytes beyond"),
    "trsm-same-output-twice": (INVALID_BLAS, "B and B, both written to, overlap"),
    "trsm-output-is-factor": (INVALID_BLAS, "B overlaps A"),
    "trsm-short-ld": (INVALID_BLAS, "B has 3 rows and leading dimension 2"),
    "potrf-host-info": (INVALID_SOLVER, "info is not in device memory"),
    "potrf-misaligned-pointer": (INVALID_SOLVER, "A is not aligned to 4 bytes"),
    "potrf-short-ld": (INVALID_SOLVER, "A has 3 rows and leading dimension 2"),
    "potrf-uninitialised-pointers": (INVALID_SOLVER, "A is not"),
    "syev-not-asked": (INVALID_SOLVER, "nobody asked for the workspace size"),
    "syev-asked-for-another-size": (INVALID_SOLVER, "nobody asked .* n 3 "),
    "syev-small-workspace": (INVALID_SOLVER, r"the device workspace has \d+ bytes, not \d+"),
    "syev-small-host-workspace": (INVALID_SOLVER, r"the host workspace has \d+ bytes, not \d+"),
    "syev-dear-batch": (INVALID_SOLVER, r"the device workspace has 100 bytes, not 42949\d+"),
    "syev-misaligned-workspace": (INVALID_SOLVER, "the device workspace is not aligned"),
    "syev-not-zeroed": (INVALID_SOLVER, "the device workspace is not all zero"),
    "syev-default-algorithm": (INVALID_SOLVER, "the algorithm is not CUSOLVER_ALG_1"),
    "syev-values-overlap-matrix": (INVALID_SOLVER, "A and W, both written to, overlap"),
    "syev-stale-stream": (INVALID_SOLVER, "the handle's stream is not the current one"),
    "syev-query-int32-overflow": (INVALID_SOLVER, r"n \* lda \* batchSize is more than INT32_MAX"),
    "syev-query-large-batch": (INVALID_SOLVER, "a batch of 65536 is too large"),
    "syev-query-mixed-types": (INVALID_SOLVER, "the types differ: float32 and float64"),
    "syev-query-old-version": (9, "this cuSOLVER has no XsyevBatched"),
    "syev-query-short-ld": (INVALID_SOLVER, "A has 4 rows and leading dimension 3"),
    "syev-query-unknown-params": (INVALID_SOLVER, "are no live cuSOLVER parameters"),
    "destroyed-handle": (1, "is no live cuBLAS handle"),
    "device-pointer-mode": (INVALID_BLAS, "alpha and beta in device memory are not modelled"),
    "gesvd-wide": (INVALID_SOLVER, "Xgesvd needs m >= n, got 4 x 5"),
    "gesvd-short-ldu": (INVALID_SOLVER, "U has 5 rows and leading dimension 4"),
    "gesvdr-too-many": (INVALID_SOLVER, r"k \+ p = 7 is not less than min\(m, n\) = 7"),
    "gesvdr-thin-u": (INVALID_SOLVER, "U ends 192 bytes beyond"),
    "gesvda-wide": (INVALID_SOLVER, "gesvda needs m >= n, got 4 x 5"),
    "gesvda-int32-overflow": (INVALID_SOLVER, r"batchSize \* stride is more than INT32_MAX"),
    "gesvda-rank": (INVALID_SOLVER, "rank is 5, n is 4"),
    "gesvdj-int32-overflow": (INVALID_SOLVER, r"lda \* n is more than INT32_MAX"),
    "gesvdj-lwork-overflow": (INVALID_SOLVER, "the workspace size does not fit into an int"),
    "copy-too-long": (INVALID_RUNTIME, "the source ends 1 bytes beyond"),
    "copy-wrong-kind": (INVALID_RUNTIME, "the target is not in device memory"),
    "copy-wrong-stream": (INVALID_RUNTIME, "the stream is not the current one"),
    "set-device": (101, "there is no device 1"),
    "memset-outside": (INVALID_RUNTIME, "the target is not in device memory"),
    "capture-synchronize": (CAPTURE, "the host waits while a graph is being captured"),
    "capture-pageable-copy": (CAPTURE, "a copy to pageable memory while a graph is being captured"),
    "capture-pinned-allocation": (CAPTURE, "pinned memory was asked for while a graph is being captured"),
    "capture-handle": (INVALID_BLAS, "a handle was made while a graph is being captured"),
    # What a kernel does is noticed later, and by no status.
    "launch-on-another-stream": (0, "the stream is not the current one"),
    "write-past-end": (0, r"allocation \d+ of 10 bytes was written to beyond its end"),
    "write-before-begin": (0, r"allocation \d+ of 10 bytes was written to in front of its begin"),
    "write-after-free": (0, r"allocation \d+ of 10 bytes was written to after its release"),
    "pinned-changed-too-early": (0, "pinned memory was changed before its copy to the device was waited for"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each case, all of them in one run of the program."""
    program = emulation_folder() / "standins_self_test"
    if not program.exists():
        unavailable("NVCC", f"no {program}: build with CUDA and -DOSORA_EMULATION=ON")
    done = subprocess.run([program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_call_gives_the_numbers_of_torch(outcomes, case):
    assert outcomes[case] == "right"


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_refused(outcomes, case):
    status, reason = WRONG[case]
    assert re.fullmatch(rf"{status}: \w+: .*{reason}.*", outcomes[case]), outcomes[case]


def test_every_case_is_expected(outcomes):
    assert sorted(outcomes) == sorted([*RIGHT, *WRONG])


def test_hooks_for_python():
    library = emulation_folder() / "libosora_emulated.so"
    if not library.exists():
        unavailable("EMULATION", f"no {library}: build with -DOSORA_EMULATION=ON")
    torch.ops.load_library(library)
    hooks = torch.ops.osora_standins
    if not hasattr(hooks, "reset"):
        unavailable("NVCC", "the emulator was built without CUDA")
    hooks.reset()
    hooks.inject("cublasGemmEx", 2, status=13)
    assert hooks.faults_left() == 1
    assert hooks.refusals() == []
    assert hooks.counts()["host_waits"] == 0
    hooks.set("cusolver_version", 11602)
    with pytest.raises(RuntimeError, match="no setting nonsense"):
        hooks.set("nonsense", 1)
    hooks.reset()
    assert hooks.faults_left() == 0
