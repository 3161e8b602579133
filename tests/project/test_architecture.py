# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: who may import or include whom, and what every file starts with."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from root import ROOT

PACKAGE = ROOT / "python/osora"
CSRC = ROOT / "csrc"

# -- Python ----------------------------------------------------------------------------------------------------------

# From the ground to the roof: a module imports from its own room, or from one on a floor above it in this list.
# CONTRIBUTING.md has a line about each. "" is osora itself.
FLOORS = [
    {"config", "reference", "_load", "_compiled_for", "_C"},
    {"ops"},
    {"svd"},
    {"layers"},
    {"model"},
    {"files"},
    {"initialisation"},
    {"analysis", "peft", "trainer"},
    {""},
    {"finetuning"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOF = {"finetuning", "cli", "__main__"}  # what may say `import osora`

OPTIONAL = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "sklearn",
    "tomli",
}
OPTIONAL |= {"transformers", "trl", "typer", "yaml"}
WITH_PACKAGES = {"peft", "trainer", "finetuning", "cli"}
MAY_NEED = {
    "peft": OPTIONAL,
    "trainer": OPTIONAL,
    "finetuning": OPTIONAL,
    "cli": OPTIONAL,
    "analysis.changes": {"transformers"},  # for a TrainerCallback, when one is asked for
    "analysis.plots": {"matplotlib"},
    "layers.quantised": {"bitsandbytes"},
    "files.card": {"huggingface_hub"},
    "initialisation.tree": {"transformers"},  # which makes the model of a config.json, and names its tensors
    "files.renamed": {"transformers"},  # whose names of a checkpoint's tensors nobody else knows
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").replace("__init__", ""): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_compiled_for.py"
}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py" and name}
OUTSIDE = sorted(path for folder in ("bench", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[0]


def for_types_only(tree: ast.AST) -> set[ast.AST]:
    """What stands below `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found |= {each for statement in node.body for each in ast.walk(statement)}
    return found


@cache
def imports(path: Path, types: bool = True, within: bool = True) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, inside functions too; the name is "" for `import module`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = set() if types else for_types_only(tree)
    if not within:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        left_out |= {each for function in functions for each in ast.walk(function)}
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}: a relative import hides which room it is from"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def own_imports(path: Path, types: bool = True) -> set[str]:
    """The modules of osora that a file imports, "" for osora itself; a package's name is its `__init__`."""
    found = set()
    for module, name in imports(path, types):
        if module != "osora" and not module.startswith("osora."):
            continue
        inside = module.removeprefix("osora").removeprefix(".")
        longer = f"{inside}.{name}".removeprefix(".")
        known = longer in MODULES or longer in FLOOR  # `from osora import reference`, `from osora import _C`
        found.add(longer if name and known else inside)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    """Rule 1."""
    assert room(module) in FLOOR, f"{module} has no place in FLOORS: say where it stands"
    for other in own_imports(MODULES[module]):
        if room(other) != room(module):
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other or 'osora'}, a floor above it"


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that are left when those without arrows to others, or from others, are taken away again and again."""
    graph = {node: others & graph.keys() - {node} for node, others in graph.items()}
    while True:
        pointed = {other for others in graph.values() for other in others}
        left = {
            node: others & graph.keys() for node, others in graph.items() if others & graph.keys() and node in pointed
        }
        if left == graph:
            return set(graph)
        graph = left


def test_no_modules_import_each_other():
    """Rule 2, of osora and of its packages; imports for annotations do not count."""
    found = circles({module: own_imports(path, types=False) for module, path in MODULES.items()})
    assert not found, f"these import each other: {sorted(found)}"


@pytest.mark.parametrize("folder", ["bench", "examples", "tests"])
def test_no_scripts_import_each_other(folder):
    """Rule 2, where modules find each other by their place on sys.path."""
    files = {path.stem: path for path in OUTSIDE if path.is_relative_to(ROOT / folder)}
    found = circles({name: {module for module, _ in imports(path, types=False)} for name, path in files.items()})
    assert not found, f"these import each other: {sorted(found)}"


@pytest.mark.parametrize("module", MODULES)
def test_osora_itself_is_imported_by_the_roof_alone(module):
    """Rule 3; `import osora.config` binds osora too."""
    if room(module) not in ROOF:
        plain = [name for name, what in imports(MODULES[module]) if not what and name.split(".")[0] == "osora"]
        assert "" not in own_imports(MODULES[module]) and not plain, f"{module} imports osora: name what it wants of it"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_have_their_places(module):
    """Rule 4."""
    allowed = MAY_NEED.get(room(module), set()) | MAY_NEED.get(module, set())
    found = {name.split(".")[0] for name, _ in imports(MODULES[module])} & OPTIONAL - allowed
    assert not found, f"{module} imports {found}"
    if room(module) not in WITH_PACKAGES:  # `import osora` comes here, and loads none of them
        found = {name.split(".")[0] for name, _ in imports(MODULES[module], within=False)} & OPTIONAL
        assert not found, f"{module} imports {found} outside of functions"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> set[str]:
    """Names with an underscore that a file takes from a module of osora: imported, as attributes, or in strings.

    A string may be that of `monkeypatch.setattr(module, "_name", ...)`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken, bound = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "osora":
            inside = str(node.module).removeprefix("osora").removeprefix(".")
            for alias in node.names:
                module = f"{inside}.{alias.name}".removeprefix(".")
                if module in MODULES:
                    bound[alias.asname or alias.name] = module
                elif is_private(alias.name):
                    taken.add(f"{inside}.{alias.name}".removeprefix("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, name in re.findall(r"\bosora\.([a-z_.]+)\.(_[a-z]\w*)", node.value):
                taken |= {f"{module}.{name}"} if module in MODULES else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            where = ast.unparse(node.value)
            module = bound.get(where, where.removeprefix("osora."))
            if (where in bound or where.startswith("osora.")) and module in MODULES:
                taken.add(f"{module}.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "setattr",
            "getattr",
            "delattr",
        ):
            where, *names = [ast.unparse(argument) for argument in node.args[:2]]
            module = bound.get(where, where.removeprefix("osora."))
            if module in MODULES and any(is_private(name.strip("'")) for name in names):
                taken |= {f"{module}.{name}" for name in names}
    return taken


@pytest.mark.parametrize("path", [*MODULES.values(), *OUTSIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_in_their_rooms(path):
    """Rule 5."""
    own = room(".".join(path.relative_to(PACKAGE).parts)) if path.is_relative_to(PACKAGE) else None
    found = {name for name in private_names(path) if room(name) != own}
    assert not found, f"{path.relative_to(ROOT)} takes {found}"


def test_modules_and_public_functions_do_not_share_a_name():
    """Rule 5: `osora.merge` is one thing."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    public = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not public & (MODULES.keys() - {"ops"})


@pytest.mark.parametrize("package", sorted(PACKAGES - {"cli"}))
def test_a_package_says_only_what_is_in_it(package):
    """Rule 5: its `__init__` defines nothing. osora.cli has the entry point; osora.peft also registers its methods."""
    body = ast.parse(MODULES[package].read_text(encoding="utf-8")).body
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    assert not defined, f"{package}/__init__.py defines {[node.name for node in defined]}"


def test_the_map_has_every_room():
    """CONTRIBUTING.md opens with a line for each, in this order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| in `python/osora` |") : text.index("| in `csrc` |")]
    rows = re.findall(r"^\| `([a-z]+)(?:\.py|/)` \|", table, flags=re.MULTILINE)
    rooms = [name for rooms in FLOORS for name in sorted(rooms) if name and not name.startswith("_")]
    assert sorted(rows) == sorted(rooms)
    assert [FLOOR[name] for name in rows] == sorted(FLOOR[name] for name in rows)
    for line in table.splitlines():
        if found := re.match(r"\| `([a-z]+)/` \| (.*)", line):
            inside = {name.split(".")[1] for name in MODULES if name.startswith(f"{found[1]}.")}
            named = set(re.findall(r"`([a-z_]+)`", found[2]))
            assert inside <= named, f"the map does not name {sorted(inside - named)} of {found[1]}"


def test_tests_lie_in_the_rooms_of_what_they_test():
    """`training` are trainers of others, `project` the project itself."""
    rooms = {name for rooms in FLOORS for name in rooms} | {"training", "project"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.parent.parent == ROOT / "tests" and path.parent.name in rooms, path.relative_to(ROOT)


LONG = {"reference.py"}  # the specification, in one piece


def test_no_file_is_long():
    for path in [*MODULES.values(), *sources(*NATIVE), *ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400 or path.name in LONG, f"{path.relative_to(ROOT)} has {lines} lines"
    for path in ROOT.glob("tests/**/*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines: split it by idea"


# -- C++ -------------------------------------------------------------------------------------------------------------


def sources(*patterns: str, under: Path = CSRC) -> list[Path]:
    return sorted(path for pattern in patterns for path in under.rglob(pattern))


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def is_torch(header: str) -> bool:
    ours = (CSRC / header).is_file()
    return header.startswith(("ATen/", "c10/", "torch/", "caffe2/")) and not ours


def is_cuda(header: str) -> bool:
    return header.startswith(("cuda", "cublas", "cusolver", "cub/", "thrust/", "cooperative_groups", "library_types"))


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
        at_the_top = name in ("module.cpp", "torch/schema.cpp")
        assert at_the_top or (tree in TREES and room in rooms), f"{name} stands in none of {list(TREES)}, {list(rooms)}"


def test_trees_and_rooms_see_what_they_may():
    for path in sources(*NATIVE):
        name = str(path.relative_to(CSRC))
        if name == "module.cpp":
            continue
        tree, room = place(name)
        for header in our_headers(path):
            other_tree, other_room = place(header)
            assert other_tree in TREES[tree] | {tree}, f"{name} includes {header}"
            assert not other_room or other_room in ROOMS.get(room, set()) | {room}, f"{name} includes {header}"


def test_headers_of_ours_are_named_by_their_whole_path():
    for path in sources(*NATIVE):
        quoted = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        strange = set(quoted) - set(our_headers(path)) - {"build_config.h"}
        assert not strange, f"{path.relative_to(ROOT)} includes {strange}"


def test_headers_do_not_include_each_other():
    headers = {str(path.relative_to(CSRC)): path for path in sources("*.h", "*.cuh")}
    found = circles({name: set(our_headers(path)) for name, path in headers.items()})
    assert not found, f"these include each other: {sorted(found)}"


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
    texts = {str(path.relative_to(CSRC)): without_comments(path.read_text(encoding="utf-8")) for path in sources("*.*")}
    assert {name: text.count("<<<") for name, text in texts.items() if "<<<" in text} == {"cuda/common/launch.h": 1}


def test_one_switch_over_dtypes():
    texts = {str(path.relative_to(CSRC)): path.read_text(encoding="utf-8") for path in sources(*NATIVE)}
    assert {name for name, text in texts.items() if "AT_DISPATCH" in text} == {"torch/common/numbers.h"}


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


# -- errors ----------------------------------------------------------------------------------------------------------

# What an assert may be for: to tell the type checker what the lines before it have made sure of.
SURE = {
    ("files.load", "found is not None"),  # a layer without a basis has been decomposed, or read
    ("files.merge", "len(new) == stored.end - stored.begin"),  # same shape, and the dtype that was read
    ("layers.quantised", "isinstance(weight, Tensor)"),  # of a bitsandbytes layer, by its class
    ("layers.adapted", "self.adapter is not None"),  # it has a materialised weight
    ("ops.ablations", "g is not None"),
    ("ops.sorsa", "inputs[0] is not None"),  # x, which the schema asks for
    ("peft.layer", "self.batch is not None"),  # asked by the caller
    ("peft.loading", "description is not None"),  # asked by the callers
}


def test_no_assert_speaks_to_users():
    found = {
        (module, ast.unparse(node.test))
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    }
    assert found == SURE, "an error that a user can meet is raised, with words"
