# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks write, looked at."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from root import ROOT

for package in ("peft", "rich", "transformers"):
    pytest.importorskip(package)

BENCH = ROOT / "bench"


def quick(output, *more):
    return ["--quick", "--threads", "1", "--output", str(output), *more]


def only_result(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


def assert_complete(result, name):
    assert result["benchmark"] == name and result["settings"]["quick"] is True
    assert result["machine"]["gpu"] is None and result["machine"]["threads"] == 1 and result["machine"]["cpu"]
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["osora"]["version"]
    assert set(result["load_average"]) == {"before", "after"}
    assert str(Path.home()) not in json.dumps(result) and str(BENCH.parent) not in json.dumps(result)


def spoil_sigma(item):
    return dataclasses.replace(item, S=item.S * (1 + 3e-5))


def spoil_vectors(item):
    return dataclasses.replace(item, U=item.U + 1e-3)


def spoil_residuals(item):
    return dataclasses.replace(item, residuals=item.residuals + 1e-4)


def spoil_converged(item):  # a large error that is reported, but as converged
    V = item.V.roll(1, 0)
    return dataclasses.replace(item, V=V, residuals=torch.full_like(item.residuals, 0.5), converged=True)


def spoil_with_nan(item):
    return dataclasses.replace(item, U=item.U * float("nan"))
