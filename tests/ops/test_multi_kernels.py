# SPDX-License-Identifier: Apache-2.0
"""The kernels of many adapters in one batch (cuda/linear/multi.cu), through their glue, against float64 row by row.

On a card they run inside osora::linear_multi alone, whose tests are elsewhere; here the emulator runs them.
"""

from typing import NamedTuple

import pytest
import torch
from backends import Backend, make_backend
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least, unit
from torch import Tensor

names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
# [n, columns, adapters]: one number, primes, whole packs and not, several blocks, several tiles of columns.
every_size = pytest.mark.parametrize(
    "n, columns, adapters", [(1, 1, 1), (7, 5, 3), (64, 8, 64), (65, 64, 2), (13, 257, 3), (9, 1000, 4), (3, 2056, 2)]
)


@pytest.fixture(params=["emulated"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


class Case(NamedTuple):
    h: Tensor
    S0: Tensor
    s: Tensor
    ranks: Tensor | None
    index: Tensor


def make_case(n: int, r: int, adapters: int, dtype: torch.dtype, *, ranks: bool = True) -> Case:
    exact = accumulate(dtype)
    s = 0.1 * torch.randn(adapters, r, dtype=exact)
    limits = torch.randint(0, r + 1, (adapters,)) if ranks else None
    if limits is not None:
        for row, limit in zip(s, limits.tolist(), strict=True):
            row[limit:] = float("nan")  # an absent column may hold anything
    index = torch.randint(-1, adapters, (n,))
    return Case(torch.randn(n, r, dtype=torch.float64).to(dtype), torch.randn(r, dtype=exact), s, limits, index)


def check_scale(t: Tensor, case: Case) -> None:
    """One rounding to h's dtype, after two in the accumulation dtype (S0 + s and the product)."""
    h, S0, s, ranks, index = case
    (n, r), dtype = h.shape, h.dtype
    assert t.shape == (2 * n, r) and t.dtype == dtype
    for i, a in enumerate(index.tolist()):
        rank = 0 if a < 0 else r if ranks is None else int(ranks[a])
        x, start, shift = h[i, :rank].double(), S0[:rank].double(), s[a, :rank].double()
        size = x.abs() * (start.abs() + shift.abs())
        for row, wish in ((t[i], x * (start + shift)), (t[n + i], x * shift)):
            allowed = 1.01 * unit(dtype) * wish.abs() + 2 * unit(accumulate(dtype)) * size + half_of_least(dtype)
            assert_within(row[:rank], wish, allowed)
            assert (row[rank:] == 0).all(), "what an adapter does not have adds nothing"


@every_dtype
@every_size
@pytest.mark.parametrize("ranks", [False, True], ids=["one-rank", "ranks"])
def test_scale_equals_its_definition(backend, n, columns, adapters, dtype, ranks, poisoned_memory):
    case = make_case(n, columns, adapters, dtype, ranks=ranks)
    check_scale(backend.multi_scale(*case), case)


@every_dtype
@every_size
def test_combine_equals_its_definition(backend, n, columns, adapters, dtype):
    """One rounding to y's dtype, after two in the accumulation dtype (a fused product and a sum)."""
    exact = accumulate(dtype)
    y, t = (torch.randn(rows, columns, dtype=torch.float64).to(dtype) for rows in (n, 2 * n))
    o, index = torch.randn(adapters, columns, dtype=exact), torch.randint(-1, adapters, (n,))
    before = y.clone()
    backend.multi_combine(y, t, o, index)
    base = index < 0
    assert torch.equal(y[base], before[base])
    terms = before.double(), o[index].double() * t[:n].double(), t[n:].double()
    wish, size = sum(terms), sum(term.abs() for term in terms)
    allowed = 1.01 * unit(dtype) * wish.abs() + 2 * unit(exact) * size + half_of_least(dtype)
    assert_within(y[~base], wish[~base], allowed[~base])


@every_dtype
@pytest.mark.parametrize("which", ["matrices", "vectors", "all"])
def test_unaligned_pointers(backend, which, dtype):
    """One number behind a 16-byte boundary: the same bits, by the general path."""

    def shifted(t: Tensor) -> Tensor:
        storage = t.new_full((t.numel() + 1,), float("nan"))
        view = storage[1:].view(t.shape)
        assert view.copy_(t).data_ptr() % 16 != 0
        return view

    matrix = shifted if which != "vectors" else Tensor.clone
    vector = shifted if which != "matrices" else Tensor.clone
    case = make_case(17, 64, 3, dtype)
    t = backend.multi_scale(*case)
    moved = case._replace(h=matrix(case.h), S0=vector(case.S0), s=vector(case.s))
    assert torch.equal(backend.multi_scale(*moved), t)

    y, o = torch.randn(17, 64).to(dtype), torch.randn(3, 64, dtype=accumulate(dtype))
    results = []
    for first, second in ((y.clone(), o), (matrix(y), vector(o))):
        backend.multi_combine(first, t, second, case.index)
        results.append(first)
    assert torch.equal(*results)


@every_dtype
@pytest.mark.parametrize("wrong", [3, -2, 2**62, -(2**63)])
def test_an_index_of_no_adapter_gives_nan_and_reads_nothing(backend, dtype, wrong):
    """The last guard of the kernel: the operator's check is not run while a CUDA graph is captured, say."""
    case = make_case(6, 24, 3, dtype, ranks=False)
    case.index[:] = torch.tensor([0, wrong, 2, -1, 1, wrong])
    bad = case.index == wrong
    t = backend.multi_scale(*case)
    assert torch.isnan(t[bad.repeat(2)]).all()
    good = case._replace(h=case.h[~bad], index=case.index[~bad])
    assert torch.equal(t[~bad.repeat(2)], backend.multi_scale(*good))

    y, o = torch.randn(6, 24).to(dtype), torch.randn(3, 24, dtype=accumulate(dtype))
    before, products = y.clone(), torch.randn(12, 24).to(dtype)
    backend.multi_combine(y, products, o, case.index)
    assert torch.isnan(y[bad]).all() and torch.isfinite(y[~bad]).all()
    assert torch.equal(y[3], before[3])


@every_dtype
def test_same_bits_in_every_run(backend, dtype, monkeypatch):
    """And a row's bits do not depend on the rows around it."""
    case = make_case(70, 72, 5, dtype)
    o, y = torch.randn(5, 72, dtype=accumulate(dtype)), torch.randn(70, 72).to(dtype)
    runs = []
    for order in ("forward", "reverse", "random:1"):
        monkeypatch.setenv("OSORA_EMULATION_ORDER", order)
        t, sum_ = backend.multi_scale(*case), y.clone()
        backend.multi_combine(sum_, t, o, case.index)
        runs.append((t, sum_))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    part = case._replace(h=case.h[40:47], index=case.index[40:47])
    assert torch.equal(backend.multi_scale(*part), torch.cat([runs[0][0][40:47], runs[0][0][110:117]]))


@every_dtype
def test_no_rows_and_no_columns(backend, dtype):
    for n, r in [(0, 5), (5, 0), (0, 0)]:
        case = make_case(n, r, 2, dtype)
        assert backend.multi_scale(*case).shape == (2 * n, r)
        y, t = torch.empty(n, r, dtype=dtype), torch.empty(2 * n, r, dtype=dtype)
        backend.multi_combine(y, t, torch.empty(2, r, dtype=accumulate(dtype)), case.index)
