# SPDX-License-Identifier: Apache-2.0
"""The build's decisions (CUDA or not, which cards, which torch) and what the built extension says of itself."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from root import ROOT

import osora
from osora import _load

sys.path.insert(0, str(ROOT / "build_backend"))

import cuda_choice
import osora_backend
from cuda_choice import BuildError, architectures, choose

MINOR = ".".join(torch.__version__.split(".")[:2])


# ---- with CUDA or without ----------------------------------------------------------------------------------------


def toolkit(root: Path, version: str | None) -> Path:
    """A folder whose bin/nvcc answers --version as nvcc does; None: one that fails."""
    (root / "bin").mkdir(parents=True)
    answer = f"echo 'Cuda compilation tools, release {version}, V{version}.88'" if version else "exit 1"
    (root / "bin/nvcc").write_text(f"#!/bin/sh\n{answer}\n")
    (root / "bin/nvcc").chmod(0o755)
    return root


@pytest.fixture(autouse=True)
def no_default_toolkit(monkeypatch):
    """The fixed folder /usr/local/cuda may or may not exist where the tests run."""
    real = cuda_choice.nvcc_candidates

    def asked(environ, nvidia):
        return [found for found in real(environ, nvidia) if found[0] != "from the default toolkit folder"]

    monkeypatch.setattr(cuda_choice, "nvcc_candidates", asked)


def decide(tmp_path: Path, torch_cuda: str | None = "13.0", **environ: str):
    return choose("2.14.1", torch_cuda, tmp_path / "site/nvidia", {"PATH": "", **environ})


def test_cuda_needs_a_cuda_torch(tmp_path):
    root = toolkit(tmp_path / "cuda", "13.0")
    choice = decide(tmp_path, None, CUDA_HOME=str(root))
    assert choice.nvcc is None and choice.reason == "torch 2.14.1 is a CPU build"


def test_cuda_needs_an_nvcc(tmp_path):
    choice = decide(tmp_path)
    assert choice.nvcc is None and choice.reason == "torch 2.14.1 is for CUDA 13.0, found no nvcc"


@pytest.mark.parametrize("version", ["13.0", "13.2"])
def test_the_major_version_decides(tmp_path, version):
    root = toolkit(tmp_path / "cuda", version)
    choice = decide(tmp_path, CUDA_HOME=str(root))
    assert choice.nvcc == str(root / "bin/nvcc")
    assert choice.reason == f"torch 2.14.1 is for CUDA 13.0, nvcc {version} from CUDA_HOME"


def test_another_major_version_is_passed_over(tmp_path):
    old, new = toolkit(tmp_path / "old", "12.8"), toolkit(tmp_path / "new", "13.0")
    assert decide(tmp_path, CUDA_HOME=str(old)).reason.endswith("found only nvcc 12.8 from CUDA_HOME")
    assert decide(tmp_path, CUDA_HOME=str(old), PATH=str(new / "bin")).nvcc == str(new / "bin/nvcc")


def test_a_broken_nvcc_is_passed_over(tmp_path):
    broken = toolkit(tmp_path / "broken", None)
    assert "nvcc of unknown version on PATH" in decide(tmp_path, PATH=str(broken / "bin")).reason


def test_order_of_places(tmp_path):
    names = ("cudacxx", "home", "path", "search", "site/nvidia/cu13")
    roots = {name: toolkit(tmp_path / name, "13.0") for name in names}
    environ = {
        "CUDACXX": str(roots["cudacxx"] / "bin/nvcc"),
        "CUDA_HOME": str(roots["home"]),
        "CUDA_PATH": str(roots["path"]),
        "PATH": str(roots["search"] / "bin"),
    }
    for variable, name in zip([*environ, None], roots, strict=True):
        assert decide(tmp_path, **environ).nvcc == str(roots[name] / "bin/nvcc")
        if variable:
            environ[variable] = ""


def test_osora_cuda_overrides(tmp_path):
    root = str(toolkit(tmp_path / "cuda", "13.0"))
    assert decide(tmp_path, CUDA_HOME=root, OSORA_CUDA="0") == cuda_choice.Choice(None, "OSORA_CUDA=0")
    assert decide(tmp_path, CUDA_HOME=root, OSORA_CUDA="1").reason.startswith("OSORA_CUDA=1, torch 2.14.1")


@pytest.mark.parametrize(
    "torch_cuda, environ, message",
    [
        ("13.0", {"OSORA_CUDA": "1"}, "OSORA_CUDA=1, but .* found no nvcc: install nvcc 13.x"),
        (None, {"OSORA_CUDA": "1"}, "OSORA_CUDA=1, but torch 2.14.1 is a CPU build: install a CUDA build of torch"),
        ("13.0", {"OSORA_CUDA": "yes"}, "OSORA_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_impossible_wishes_are_errors(tmp_path, torch_cuda, environ, message):
    with pytest.raises(BuildError, match=message):
        decide(tmp_path, torch_cuda, **environ)


# ---- for which cards ---------------------------------------------------------------------------------------------

FLAGS = "sm_75 sm_80 sm_90 sm_100 sm_120 compute_120"


@pytest.mark.parametrize("wish", ["8.0;9.0+PTX", "8.0 9.0+PTX", " 8.0, 9.0+PTX "])
def test_arch_list_formats(wish):
    assert architectures([(7, 5)], FLAGS, {"TORCH_CUDA_ARCH_LIST": wish}) == "8.0;9.0+PTX"


def test_arch_default_is_the_cards_that_are_there():
    assert architectures([(9, 0), (8, 0), (9, 0)], FLAGS, {}) == "8.0;9.0"


def test_arch_default_without_a_card_is_torchs_list():
    assert architectures([], FLAGS, {}) == "7.5;8.0;9.0;10.0;12.0+PTX"


@pytest.mark.parametrize("wish", ["Hopper", "90", "sm_90", "9.0+ptx"])
def test_unknown_arch_is_an_error(wish):
    with pytest.raises(BuildError, match=re.escape(f"must look like '8.0;9.0+PTX', got {wish!r}")):
        architectures([], FLAGS, {"TORCH_CUDA_ARCH_LIST": wish})


# ---- which torch -------------------------------------------------------------------------------------------------


def test_the_backend_finds_the_installed_torch(monkeypatch):
    site = str(Path(torch.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != site])  # as pip's isolation does
    monkeypatch.setattr(osora_backend.importlib.util, "find_spec", lambda name: None)
    assert osora_backend._torch_requirement() == []
    assert sys.path[-1] == site


def test_the_backend_asks_for_a_torch_where_there_is_none(monkeypatch):
    monkeypatch.setattr(osora_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(osora_backend, "_site_folders", lambda: [])
    monkeypatch.delenv("OSORA_BUILD_TORCH", raising=False)
    assert osora_backend._torch_requirement() == ["torch" + osora_backend.TORCH_RANGE]
    monkeypatch.setenv("OSORA_BUILD_TORCH", "torch==2.13.0")
    assert osora_backend._torch_requirement() == ["torch==2.13.0"]


def test_the_installed_package_requires_its_torch():
    required = importlib.metadata.requires("osora")
    assert [line for line in required if line.startswith("torch")] == [f"torch=={MINOR}.*"]


def test_another_torch_is_refused_in_one_sentence():
    _load.check_torch("2.14.0+cpu", "2.14.1+cu130")
    with pytest.raises(ImportError, match=r"compiled for torch 2\.13, but torch 2\.14\.1 is installed: .*pip install"):
        _load.check_torch("2.13.0", "2.14.1")


def import_copy(tmp_path: Path, change) -> str:
    """The last line that `import osora` prints after `change` was made to a copy of the package."""
    copy = tmp_path / "osora"
    shutil.copytree(Path(osora.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    change(copy)
    command = [sys.executable, "-c", "import osora"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ)
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_import_with_another_torch(tmp_path):
    def change(copy: Path) -> None:
        (copy / "_compiled_for.py").write_text('TORCH = "2.10.0"\n')
        next(copy.glob("_C.*")).write_bytes(b"not to be opened")

    last = import_copy(tmp_path, change)
    assert last.startswith(f"ImportError: osora was compiled for torch 2.10, but torch {torch.__version__} is")


def test_import_without_the_compiled_part(tmp_path):
    last = import_copy(tmp_path, lambda copy: (copy / "_compiled_for.py").unlink())
    assert last == "ImportError: osora's compiled part is missing: run `pip install .` in its source tree"


# ---- what was built ----------------------------------------------------------------------------------------------


def test_build_info():
    info = osora.build_info()
    assert info["version"] == importlib.metadata.version("osora")
    assert info["torch"] == torch.__version__
    assert info["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert info["compiler"] and info["commit"] and info["reason"]
    if info["cuda"]:
        assert info["cuda_version"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", arch) for arch in info["archs"]) and info["archs"]
        for library in ("cublas", "cusolver"):
            assert info[library].split(".")[0] == info[f"{library}_loaded"].split(".")[0]
    else:
        assert info["archs"] == []
        keys = ("cuda_version", "cublas", "cublas_loaded", "cusolver", "cusolver_loaded")
        assert {info[key] for key in keys} == {None}


def test_one_thread_pool_with_torch():
    """OpenMP is compiled in, not linked: torch's runtime, the only one loaded, serves both."""
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib(gomp|omp|iomp5)[-.\w]*\.so", line)}
    extension = subprocess.run(
        ["readelf", "-d", osora._load.extension.__file__], capture_output=True, text=True, check=True
    )
    assert "gomp" not in extension.stdout
    assert any(Path(torch.__file__).parent in Path(path).parents for path in runtimes) or not runtimes


MAKE_SDIST = """
import sys
sys.path.insert(0, "build_backend")
import osora_backend
osora_backend.build_sdist(sys.argv[1])
"""


def test_source_distribution(tmp_path):
    """It accepts every torch of the range, and carries all that a build reads."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=ignored)
    command = [sys.executable, "-c", MAKE_SDIST, str(tmp_path)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("osora-*.tar.gz"))) as archive:
        names = archive.getnames()
        top = names[0]
        metadata = archive.extractfile(f"{top}/PKG-INFO").read().decode()
    folders = ("csrc", "cmake", "build_backend")
    wanted = {path.relative_to(tree) for folder in folders for path in (tree / folder).rglob("*")}
    assert not {f"{top}/{path}" for path in wanted} - set(names)
    assert f"{top}/CMakeLists.txt" in names and f"{top}/python/osora/_load.py" in names
    required = re.search(r"^Requires-Dist: torch(.*)$", metadata, flags=re.MULTILINE)[1]
    assert sorted(required.split(",")) == sorted(osora_backend.TORCH_RANGE.split(","))


# ---- written in two places ---------------------------------------------------------------------------------------


def test_makefile_and_pyproject_agree():
    makefile, pyproject = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", pyproject, flags=re.MULTILINE)[1]
    tools = re.search(r"^BUILD_TOOLS := (.*)", makefile, flags=re.MULTILINE)[1]
    assert re.findall(r"'([^']+)'", tools) == re.findall(r'"([^"]+)"', requires)
    assert f"\nTORCH ?= torch{osora_backend.TORCH_RANGE}\n" in makefile


def test_pre_commit_and_pyproject_agree():
    pins = re.findall(r"\[((?:ruff|clang-format)==[\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pins) == 3
    for pin in pins:
        assert f'"{pin}"' in (ROOT / "pyproject.toml").read_text()
