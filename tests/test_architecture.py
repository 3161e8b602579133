# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: who may import or include whom, and what every file starts with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/osora"
CSRC = ROOT / "csrc"

# A module imports from its own line or from lines above it, never from below. `reference` stands on nothing.
LAYERS = [
    {"reference", "_compiled_for"},
    {"_C", "files"},
    {"_load"},
    {"ops"},
    {"ops_ablations", "ops_sorsa", "ops_effective"},
    {"factors", "spectrum", "config", "fingerprint", "adapter_file", "formulas", "rows", "materialised"}
    | {"quantised", "bases"},
    {"adapted", "layers", "card", "evidence", "saved", "targets", "regularizer", "stream", "schedule"},
    {"adapters", "checkpoint", "distributed", "estimate", "execution", "merge", "patch", "summary", "training"},
    {"base_folder", "counts", "export", "merge_saved", "resume", "sharing", "verify", "weights"},
    {"__main__", "analysis", "cli", "finetuning", "peft", "plots", "trainer"},
]
LEAVES = LAYERS[-1]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
TORCH_HEADERS = {"torch/all.h", "torch/extension.h", "torch/library.h", "torch/torch.h"}
OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "transformers", "trl"}
AT_HOME = {"quantised": {"bitsandbytes"}}  # inside functions, for layers that are bitsandbytes' own
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "_compiled_for"))

PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def sources(*patterns: str, under: Path = CSRC) -> list[Path]:
    return sorted(path for pattern in patterns for path in under.rglob(pattern))


def imports(module: str) -> set[str]:
    """Full names of everything a module imports, inside functions too; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "osora" if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    known = set(MODULES) | PACKAGES | {"_C", "_compiled_for"}
    return {name.split(".")[1] for name in imports(module) if name.startswith("osora.")} & known


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def is_torch(header: str) -> bool:
    return header.startswith(("ATen/", "c10/", "torch/csrc/", "caffe2/")) or header in TORCH_HEADERS


def is_cuda(header: str) -> bool:
    return header.startswith(("cuda", "cublas", "cusolver", "cub/", "thrust/", "cooperative_groups", "library_types"))


@pytest.mark.parametrize("module", MODULES)
def test_python_imports_go_one_way(module):
    assert module in LEVEL, f"{module}.py has no place in LAYERS: say where it stands"
    for other in own_imports(module):
        assert LEVEL.get(other, 0) <= LEVEL[module], f"{module} imports {other}, which stands above it"


def test_python_imports_have_no_cycle():
    graph = {module: own_imports(module) - {module} for module in MODULES}
    while free := {module for module in graph if not graph[module] & graph.keys()}:
        for module in free:
            del graph[module]
    assert not graph, f"these import each other: {graph}"


def test_nothing_imports_a_leaf():
    for module in MODULES:
        if module not in LEAVES:
            assert not own_imports(module) & LEAVES, f"{module} imports a leaf"


@pytest.mark.parametrize("module", [module for module in MODULES if module not in LEAVES])
def test_optional_packages_are_imported_in_leaves_alone(module):
    found = {name.split(".")[0] for name in imports(module)} & OPTIONAL - AT_HOME.get(module, set())
    assert not found, f"{module} imports {found}; only {sorted(LEAVES)} may"


# What a tree of csrc may include of the others, and a room of csrc/torch and csrc/cuda of the other rooms in both.
TREES = {"core": set(), "cpu": {"core"}, "cuda": {"core"}, "torch": {"core", "cpu", "cuda"}}
ROOMS = {"common": set(), "fold": {"common"}, "linear": {"common", "fold"}, "svd": {"common"}}
NATIVE = ("*.h", "*.cpp", "*.cu", "*.cuh")


def place(name: str) -> tuple[str, str]:
    """Tree and room of a path below csrc, empty where it stands in none."""
    tree, room, *_ = (*Path(name).parent.parts, "", "")
    return tree, room


def our_headers(path: Path) -> list[str]:
    """What a file includes of csrc, by the path below it."""
    return [header for header in includes(path) if (CSRC / header).is_file()]


def test_every_source_has_a_room():
    for path in sources(*NATIVE):
        name = str(path.relative_to(CSRC))
        tree, room = place(name)
        rooms = ROOMS if tree in ("cuda", "torch") else {""}
        assert room in rooms or name == "torch/schema.cpp", f"{name} stands in none of {list(rooms)}"


def test_trees_and_rooms_see_what_they_may():
    for path in sources(*NATIVE):
        name = str(path.relative_to(CSRC))
        if name == "module.cpp":
            continue
        tree, room = place(name)
        for header in our_headers(path):
            other_tree, other_room = place(header)
            assert other_tree in TREES[tree] | {tree}, f"{name} includes {header}"
            assert not other_room or other_room in ROOMS[room] | {room}, f"{name} includes {header}"


def test_headers_of_ours_are_named_by_their_whole_path():
    for path in sources(*NATIVE):
        quoted = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        strange = set(quoted) - set(our_headers(path)) - {"build_config.h"}
        assert not strange, f"{path.relative_to(ROOT)} includes {strange}"


def test_headers_have_no_cycle():
    headers = {str(path.relative_to(CSRC)): path for path in sources("*.h", "*.cuh")}
    graph = {name: set(our_headers(path)) for name, path in headers.items()}
    while free := {name for name in graph if not graph[name] & graph.keys()}:
        for name in free:
            del graph[name]
    assert not graph, f"these include each other: {graph}"


def test_torch_headers_are_in_one_folder():
    for path in sources("*"):
        if path.is_file() and not path.is_relative_to(CSRC / "torch"):
            found = [header for header in includes(path) if is_torch(header)]
            assert not found, f"{path.relative_to(ROOT)} includes {found}"


def test_the_slow_torch_headers_are_not_used():
    many = {"dense_aten.cpp"}  # uses some forty operators: one header that names them all is quicker
    for path in sources("*.h", "*.cpp", "*.cu"):
        slow = {"torch/extension.h", "torch/torch.h", "torch/all.h"} | (set() if path.name in many else {"ATen/ATen.h"})
        found = slow & set(includes(path))
        assert not found, f"{path.relative_to(ROOT)} includes {found}: take the operators' own headers"


@pytest.mark.parametrize("folder", ["core", "cpu"])
def test_plain_folders_include_no_cuda(folder):
    for path in sources("*", under=CSRC / folder):
        found = [header for header in includes(path) if is_cuda(header)]
        assert not found, f"{path.relative_to(ROOT)} includes {found}"


def test_one_kernel_launch():
    launches = {path.name: without_comments(path.read_text(encoding="utf-8")).count("<<<") for path in sources("*.*")}
    assert {name: count for name, count in launches.items() if count} == {"launch.h": 1}


def test_one_switch_over_dtypes():
    found = {path.name for path in sources(*NATIVE) if "AT_DISPATCH" in path.read_text(encoding="utf-8")}
    assert found == {"numbers.h"}


def test_no_long_source():
    for path in sources(*NATIVE):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: it is about more than one idea"


def test_no_atomics():
    for path in sources("*.cu", "*.cuh", "*.h", under=CSRC / "cuda"):
        assert not re.search(r"\batomic[A-Z]\w+\(", without_comments(path.read_text(encoding="utf-8"))), path.name


def test_every_operator_is_defined_in_the_schema():
    for path in sources("*.cpp", "*.h"):
        if path.name not in ("schema.cpp", "module.cpp"):
            assert "m.def(" not in path.read_text(encoding="utf-8"), f"{path.name} defines an operator"


def test_every_source_is_in_cmake():
    listed = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for path in sources("*.cpp", "*.cu"):
        assert str(path.relative_to(ROOT)) in listed, f"{path.relative_to(ROOT)} is compiled by nobody"
    assert "GLOB" not in listed


FOLDERS = ("bench", "build_backend", "cmake", "csrc", "examples", "python", "tests", ".ci")
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".in", ".sh"}
NAMED = ["CMakeLists.txt", "Makefile", "pyproject.toml", "setup.py", ".pre-commit-config.yaml", ".ci/run"]


def licensed_files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("CMakeLists.txt")]
    return [ROOT / name for name in NAMED] + [path for path in found if path.name != "_compiled_for.py"]


def test_every_file_starts_with_its_licence():
    for path in licensed_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        first = lines[1] if lines[0].startswith("#!") else lines[0]
        assert re.fullmatch(r"(//|#) SPDX-License-Identifier: Apache-2\.0", first), path.relative_to(ROOT)


def test_no_big_files():
    for path in licensed_files():
        assert path.stat().st_size < 1_000_000, path.relative_to(ROOT)
