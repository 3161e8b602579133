# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a CPU, under sanitizers: clean as they are, and each planted bug is caught.

The programs come from the project's build (OSORA_EMULATION_DIR or OSORA_BUILD_DIR); without one they are built here,
which needs cmake and a C++ compiler but no torch.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from backends import emulation_folder, unavailable
from root import ROOT

ORDERS = ("forward", "reverse", "random:1")
# Every order for the plain program, whose numbers would show one that counts. What a sanitizer looks for does not hang
# on it, and to look takes long: one order each, not the forward one, in which it looks at the planted bugs.
RUNS = [*(("plain", order) for order in ORDERS), ("ucontext", "forward"), ("asan", "reverse"), ("tsan", "random:1")]
UNDEFINED = object()  # this build may do anything with that bug: crash, go on, or trip over a consequence
WRONG_NUMBERS, REFUSED = 3, 4  # exit codes of planted_bugs.cpp

# Per bug, what each program makes of it in the forward schedule: a report, an exit code, or (not listed) nothing.
# Where the plain program is not listed, only the sanitizer knows.
EVERYWHERE = ("plain", "asan", "tsan")
BUGS: dict[str, dict[str, object]] = {
    "no-bug": {},
    "read-past-end": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "shared-overrun": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "misaligned-pack": {"asan": "runtime error: .*misaligned address", "plain": UNDEFINED, "tsan": UNDEFINED},
    "blocks-race": {"tsan": "ThreadSanitizer: data race"},
    "missing-syncwarp": {"tsan": "ThreadSanitizer: data race"},
    "barrier-for-some": dict.fromkeys(EVERYWHERE, r"cuda emulation: deadlock(.|\n)*waits at \S*planted_bugs.cpp:\d+"),
    "two-barriers": dict.fromkeys(EVERYWHERE, "cuda emulation: divergent __syncthreads"),
    "barrier-after-exit": dict.fromkeys(EVERYWHERE, r"cuda emulation: (.|\n)*32 of 64 threads have exited"),
    "mask-names-absent-lanes": dict.fromkeys(EVERYWHERE, r"cuda emulation: deadlock(.|\n)*for mask ffffffff"),
    "source-outside-mask": dict.fromkeys(EVERYWHERE, "cuda emulation: a shuffle reads from a lane outside its mask"),
    "own-lane-not-in-mask": dict.fromkeys(EVERYWHERE, "cuda emulation: a lane is not in the mask it named"),
    "masks-differ": dict.fromkeys(EVERYWHERE, "cuda emulation: lanes of one warp operation named different masks"),
    "uninitialised-shared": dict.fromkeys(EVERYWHERE, WRONG_NUMBERS),  # the poison is NaN
    "too-much-shared": dict.fromkeys(EVERYWHERE, REFUSED),
    # The real code without one barrier. reduce.cuh, 0: before the sums of the warps are read; 1: before the next
    # reduction writes over them. fold.cu, 2: before the column sums of a tile are read; 3: before the next tile writes
    # over them; 4: before the last sums of the second kernel. decode.cu, 5 and 6: before those of the warps are read.
    "drop-barrier-0": {"tsan": "ThreadSanitizer: data race", "plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS},
    "drop-barrier-1": {"tsan": "ThreadSanitizer: data race"},
    "drop-barrier-2": {"tsan": "ThreadSanitizer: data race", "plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS},
    "drop-barrier-3": {"tsan": "ThreadSanitizer: data race"},
    "drop-barrier-4": {"tsan": "ThreadSanitizer: data race", "plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS},
    "drop-barrier-5": {"tsan": "ThreadSanitizer: data race", "plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS},
    "drop-barrier-6": {"tsan": "ThreadSanitizer: data race", "plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS},
    # svd_orthogonal.cu, 0: before the products of a tile are summed; 1: before the next tile writes over them;
    # 2: before lengths are used; 3: before a pivot is written over; 4: before its column is used; 5: before the next
    # pivot is read; 6: before the sums over the strips are used; 7: before the scaled Gram matrix is factored; 8 and 9:
    # as 0 and 1, of a projection. svd_ritz.cu, 10: before the tails are compared.
} | {
    f"drop-barrier-svd-{number}": {"tsan": "ThreadSanitizer: data race"}
    | ({} if number in (7, 9) else {"plain": WRONG_NUMBERS, "asan": WRONG_NUMBERS})
    for number in range(11)
}


def built_here(folder: Path) -> Path:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            unavailable("EMULATION", f"no emulator was built, and there is no {tool} to build it")
    for command in (
        ["cmake", "-S", ROOT / "tests/emulation", "-B", folder, "-DOSORA_WERROR=ON"],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = emulation_folder()
    if (folder / "planted_bugs_tsan").exists():
        return folder
    if os.environ.get("OSORA_EMULATION_DIR") or os.environ.get("OSORA_BUILD_DIR"):
        unavailable("EMULATION", f"{folder} holds no emulator: build with -DOSORA_EMULATION=ON")
    return built_here(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="module")
def fixed_addresses() -> list[str]:
    """gcc 12's TSan gives up on some of the addresses that Linux deals out at random."""
    prefix = ["setarch", "--addr-no-randomize"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return prefix
    return []


@pytest.fixture
def run(programs, fixed_addresses):
    def run_program(name: str, *arguments: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
        prefix = fixed_addresses if name.endswith("tsan") else []
        environment = {"PATH": os.environ["PATH"], "OSORA_EMULATION_ORDER": order, "TSAN_OPTIONS": "halt_on_error=1"}
        command = [*prefix, str(programs / name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    return run_program


@pytest.fixture(scope="module", params=["emulation", "emulation_decode", "emulation_multi", "emulation_svd"])
def driver(request: pytest.FixtureRequest, programs) -> tuple[str, str]:
    """The programs for fold*.cu, decode.cu, multi.cu, svd_*.cu, and what the plain one prints."""
    plain = subprocess.run([programs / f"{request.param}_plain"], capture_output=True, text=True)
    return request.param, plain.stdout


@pytest.mark.parametrize("kind, order", RUNS)
def test_kernels_are_clean_and_give_the_same_bits(run, driver, kind, order):
    """Against float64, in exact-size arrays, no report; and the bits of the forward run of the plain program."""
    name, plain_output = driver
    if kind == "ucontext" and name != "emulation":
        pytest.skip("one program is enough for the other switch of fibers")
    done = run(f"{name}_{kind}", order=order)
    assert done.returncode == 0 and done.stderr == "", done.stdout[-2000:] + done.stderr[-4000:]
    assert " 0 failures" in done.stdout or done.stdout.splitlines()[-2] == "0 failures"
    assert done.stdout == plain_output


@pytest.mark.parametrize("program", EVERYWHERE)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_by_what_is_for_it(run, bug, program):
    expected = BUGS[bug].get(program, 0)
    done = run(f"planted_bugs_{program}", bug)
    if expected is UNDEFINED:
        return
    if isinstance(expected, int):
        assert done.returncode == expected, done.stderr[-4000:]
        return
    assert done.returncode not in (0, WRONG_NUMBERS, REFUSED), f"{program} let {bug} pass"
    assert re.search(str(expected), done.stderr), done.stderr[-4000:]


def test_another_schedule_shows_what_one_hides(run):
    assert run("planted_bugs_plain", "missing-syncwarp", order="forward").returncode == 0
    for order in ("reverse", "random:1"):
        assert run("planted_bugs_plain", "missing-syncwarp", order=order).returncode == WRONG_NUMBERS


def test_every_planted_bug_is_expected(run):
    """And every barrier of the kernels has its turn at being left out."""
    listed = run("planted_bugs_plain", "--list").stdout.split()
    assert sorted(listed) == sorted(BUGS)
    sources = [path for path in (ROOT / "csrc/cuda").rglob("*") if path.suffix in (".cu", ".cuh")]
    code = "".join(re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")) for path in sources)
    assert code.count("__syncthreads()") == sum(name.startswith("drop-barrier") for name in listed)


def test_an_unknown_order_is_refused(run):
    done = run("planted_bugs_plain", "no-bug", order="sideways")
    assert done.returncode == REFUSED
    assert "OSORA_EMULATION_ORDER must be forward, reverse or random:SEED, got sideways" in done.stderr
