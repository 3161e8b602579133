# SPDX-License-Identifier: Apache-2.0
"""The public names: documented, typed, few."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
from helpers import run_python

import osora

PACKAGE = Path(osora.reference.__file__).parent
PUBLIC = sorted(set(osora.__all__) - {"__version__"})


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(osora, name)
    text = inspect.getdoc(thing)
    # pybind11 and dataclasses write a signature by themselves; that alone documents nothing
    lines = [line for line in (text or "").splitlines() if not line.startswith(f"{name}(")]
    assert len("".join(lines)) > 20, f"osora.{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty, f"osora.{name} has no return type"
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"osora.{name}: {parameter} has no type"
        options = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for option in (*options, *signature.parameters) if "Args:" in text else ():
            assert f"{option}:" in text, f"osora.{name}: {option} is not described"


def test_what_is_promised_is_there():
    assert PUBLIC == sorted(PUBLIC) and all(hasattr(osora, name) for name in osora.__all__)
    assert {
        "OsoraConfig", "adapter_parameters", "attach", "build_info", "detach", "disabled", "load_adapter", "merge",
        "rank_for_energy", "save_adapter", "spectrum", "summary", "svd_plan", "truncated_svd", "unmerge",
    } <= set(PUBLIC)  # fmt: skip
    assert osora.__version__ == osora.build_info()["version"]


def test_keyword_only_where_a_position_would_be_a_riddle():
    def keywords(function) -> set[str]:
        return {
            n for n, p in inspect.signature(function).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    assert {"tol", "seed", "method", "max_memory"} <= keywords(osora.truncated_svd)
    assert keywords(osora.spectrum) == keywords(osora.truncated_svd)
    assert {"max_memory"} <= keywords(osora.attach) and {"max_memory"} <= keywords(osora.load_adapter)
    assert {"save_basis"} <= keywords(osora.save_adapter) and {"merged"} <= keywords(osora.detach)


def test_the_reference_stands_alone():
    """It is the specification: it needs torch, and nothing that could carry a mistake of ours into it."""
    tree = ast.parse((PACKAGE / "reference.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else str(node.module).split(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_importing_it_loads_no_optional_package_and_leaves_torch_s_random_state():
    """And says nothing: not on stdout, not as a warning."""
    program = """
import sys, warnings
warnings.simplefilter("error")
import torch
before = torch.get_rng_state()
import osora
assert torch.equal(before, torch.get_rng_state())
print([name for name in ("transformers", "peft", "matplotlib", "trl", "accelerate") if name in sys.modules])
"""
    assert run_python(program) == "[]\n"
