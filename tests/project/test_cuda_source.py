# SPDX-License-Identifier: Apache-2.0
"""Every .cu compiles without a warning for every generation of cards, and to the machine code that was meant.

Needs nvcc, not a card. OSORA_REQUIRE_NVCC=1 makes a missing nvcc a failure. The objects are those of the project's
build where it was just so strict and is up to date; else they are compiled here, which takes minutes.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from backends import emulation_folder, unavailable
from root import ROOT

sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_choice import nvcc_candidates

SITE = Path(torch.__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
CARDS = ("80", "90", "100", "120")
# 256 threads of 64 registers: four blocks, half of the threads an SM can hold, are resident. What a memory-bound
# kernel needs to keep the memory busy.
MAX_REGISTERS = 64
# Eight rows of x (the third template argument): 16 sums and two packs of W a thread. Three blocks of them are resident,
# which keep as many packs in flight as four that spill would.
# Strips of rows: up to 16 sums of float64 numbers a thread, three blocks.
MORE_REGISTERS = {r"decode_expand_kernelILi\dELi\dELi8E": 80, "strips_kernel": 80}


class Kernel(NamedTuple):
    name: str  # mangled
    card: str
    registers: int
    stack: int  # what spills lies there
    local: int


class Compiled(NamedTuple):
    source: str
    object: Path
    kernels: list[Kernel]


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = next((path for _, path in nvcc_candidates(os.environ, SITE / "nvidia")), None)
    if found is None:
        unavailable("NVCC", "no nvcc on PATH, in CUDA_HOME or from pip")
    return str(found)


def kernels_of(path: Path) -> list[Kernel]:
    """What the object says of each kernel and card."""
    found, card = [], ""
    for line in looked_into(path, "-res-usage").splitlines():
        if header := re.fullmatch(r"arch = sm_(\d+)", line):
            card = header[1]
        elif header := re.fullmatch(r" Function (\w+):", line):
            name = header[1]
        elif used := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.append(Kernel(name, card, *map(int, used.groups())))
    return found


def object_of_the_build(source: Path) -> Path | None:
    """The project's own, if it was compiled for the same cards, with warnings as errors, and after the last change."""
    build = emulation_folder().parents[1]
    cache, made = build / "CMakeCache.txt", build / f"CMakeFiles/_C.dir/{source.relative_to(ROOT)}.o"
    if not (cache.exists() and made.exists()):
        return None
    settings = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(encoding="utf-8"), flags=re.MULTILINE))
    cards = [arch.removesuffix("+PTX").replace(".", "") for arch in settings.get("OSORA_CUDA_ARCHS", "").split(";")]
    strict = settings.get("OSORA_WERROR") == "ON" and settings.get("CMAKE_BUILD_TYPE") == "Release"
    read = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    new = made.stat().st_mtime >= max(path.stat().st_mtime for path in read)
    return made if strict and new and cards == list(CARDS) else None


def test_an_object_of_another_build_does_not_count(tmp_path, monkeypatch):
    source, made = SOURCES[0], tmp_path / f"CMakeFiles/_C.dir/{SOURCES[0].relative_to(ROOT)}.o"
    monkeypatch.setenv("OSORA_EMULATION_DIR", str(tmp_path / "tests/emulation"))
    right = "OSORA_CUDA_ARCHS:STRING=8.0;9.0;10.0;12.0+PTX\nOSORA_WERROR:BOOL=ON\nCMAKE_BUILD_TYPE:STRING=Release\n"
    assert object_of_the_build(source) is None
    made.parent.mkdir(parents=True)
    made.touch()
    for old, new in (("", ""), ("WERROR:BOOL=ON", "WERROR:BOOL=OFF"), (";10.0", ""), ("=Release", "=Debug")):
        (tmp_path / "CMakeCache.txt").write_text(right.replace(old, new))
        assert object_of_the_build(source) == (None if old else made)
    (tmp_path / "CMakeCache.txt").write_text(right)
    os.utime(made, (0, source.stat().st_mtime - 1))
    assert object_of_the_build(source) is None


def compile_here(source: Path, nvcc: str, target: Path) -> Path:
    command = [nvcc, "-std=c++20", "-O3", "-I", str(ROOT / "csrc"), "-c", str(source), "-o", str(target)]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    for card in CARDS:
        command += ["-gencode", f"arch=compute_{card},code=sm_{card}"]
    for headers in sorted((SITE / "nvidia").glob("cu[0-9]*/include")):  # pip's layout
        command += ["-isystem", str(headers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.name)
def compiled(request: pytest.FixtureRequest, nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    made = object_of_the_build(request.param)
    if made is None:
        target = tmp_path_factory.mktemp("cuda") / f"{request.param.name}.o"
        made = compile_here(request.param, nvcc, target)
    return Compiled(request.param.stem, made, kernels_of(made))


def test_every_kernel_is_compiled_for_every_card(compiled):
    cards = {name: {k.card for k in compiled.kernels if k.name == name} for name in {k.name for k in compiled.kernels}}
    assert cards, "no kernel in the object"
    assert all(found == set(CARDS) for found in cards.values()), cards


def test_nothing_spills(compiled):
    bad = [kernel for kernel in compiled.kernels if kernel.stack or kernel.local]
    assert not bad


def test_registers_leave_room_for_four_blocks(compiled):
    def limit(kernel: Kernel) -> int:
        return next((more for name, more in MORE_REGISTERS.items() if re.search(name, kernel.name)), MAX_REGISTERS)

    bad = [kernel for kernel in compiled.kernels if kernel.registers > limit(kernel)]
    assert not bad


def disassembler() -> str:
    """cuobjdump of a toolkit, of pip's nvidia-cuda-cuobjdump, or of the copy inside triton."""
    folders = [*sorted((SITE / "nvidia").glob("cu[0-9]*/bin")), SITE / "triton/backends/nvidia/bin"]
    search = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", *map(str, folders)])
    found = shutil.which("cuobjdump", path=search)
    if found is None:
        pytest.skip("no cuobjdump to look into the machine code with")
    return found


def looked_into(path: Path, *options: str) -> str:
    tool = disassembler()
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    done = subprocess.run([tool, *options, str(path)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        pytest.skip(f"{tool} cannot read this: {(done.stderr or done.stdout)[-300:]}")
    return done.stdout


@functools.cache
def instructions(path: Path, card: str) -> dict[str, Counter[str]]:
    """How often each instruction stands in each kernel."""
    kernels: dict[str, Counter[str]] = {}
    for line in looked_into(path, "-sass", "-arch", f"sm_{card}").splitlines():
        if header := re.search(r"Function : (\w+)", line):
            kernels[header[1]] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            kernels[next(reversed(kernels))][found[1]] += 1
    return kernels


def count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.match(pattern, name))


@pytest.mark.parametrize("card", CARDS)
def test_local_memory_is_not_used_and_there_are_no_atomics(compiled, card):
    for name, found in instructions(compiled.object, card).items():
        assert count(found, r"LDL|STL") == 0, name
        assert count(found, r"ATOM|RED\b") == 0, name


# Per file, how many kernels have a fast path: fold and fold_backward, or scale and combine, for four types each.
# Mangled template arguments: Li8E is 8 numbers per lane (16-bit types), Li4E float32, Li2E float64.
FAST = {"fold": 8, "multi": 8}


@pytest.mark.parametrize("card", CARDS)
def test_the_fast_path_moves_16_bytes_at_once(compiled, card):
    if compiled.source not in FAST:
        pytest.skip("no such path")
    fast = {name: found for name, found in instructions(compiled.object, card).items() if re.search("ILi[248]E", name)}
    assert len(fast) == FAST[compiled.source]
    for name, found in fast.items():
        assert count(found, r"LDG\.E\.128") > 0, name
        if "fold_backward" not in name:
            assert count(found, r"STG\.E\.128") > 0 and count(found, r"STG") == count(found, r"STG\.E\.128"), name


@pytest.mark.parametrize("card", CARDS)
def test_decoding_reads_its_matrices_16_bytes_at_once(compiled, card):
    """V in the first kernel; in the second each row of W and of x that a thread works on, by one load."""
    if compiled.source != "decode":
        pytest.skip("not decoding")
    found = instructions(compiled.object, card)
    fast = {name: kernel for name, kernel in found.items() if re.search("kernelILi[248]E", name)}
    assert len(fast) == 20 and len(found) == 40, "four types, two and three numbers of rows"
    for name, kernel in fast.items():
        wanted = 1
        if rows := re.search(r"expand_kernelILi\dELi(\d)ELi(\d)E", name):
            wanted = int(rows[1]) + int(rows[2])
        assert count(kernel, r"LDG\.E\.128") >= wanted, name


@pytest.mark.parametrize("card", CARDS)
def test_the_fold_of_many_layers_moves_16_bytes_where_it_can(compiled, card):
    """Both paths are in one kernel: a layer's alignment is known at run time."""
    if compiled.source != "fold_many":
        pytest.skip("not that fold")
    found = instructions(compiled.object, card)
    assert len(found) == 4, "four types"
    for name, kernel in found.items():
        assert count(kernel, r"LDG\.E\.128") > 0 and count(kernel, r"STG\.E\.128") > 0, name
