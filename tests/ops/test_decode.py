# SPDX-License-Identifier: Apache-2.0
"""The linear operator for a few rows, as in decoding: which way is taken, and the two kernels (cuda/linear/decode.cu).

The emulator runs the kernels through their glue as `decode`; on a card, and on the CPU for comparison, the same tests
call osora::linear.
"""

from collections.abc import Callable

import pytest
import torch
from backends import Backend, make_backend
from helpers import Linear, linear_case
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least, unit
from torch import Tensor

names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
# [n, k, d, r]: one number, primes, packs in W and not in V and the reverse, long rows, a rank of 1024.
SIZES = [
    (1, 1, 1, 1),
    (1, 64, 40, 16),
    (2, 37, 13, 7),
    (3, 64, 5, 11),
    (5, 33, 10, 24),
    (8, 40, 9, 64),
    (1, 2100, 6, 8),
    (8, 1031, 3, 9),
    (4, 24, 6, 1024),
]


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=["emulated"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


def run(backend: Backend, case: Linear) -> tuple[Tensor, Tensor]:
    """y and h: osora::linear, or the kernels of its way for a few rows alone."""
    function: Callable = backend.decode if backend.name == "emulated" else backend.linear
    return function(*case.arguments)


def random_case(n: int, k: int, d: int, r: int, dtype: torch.dtype, *, bias: bool = True) -> Linear:
    """Any numbers: the kernels do not know of singular vectors, and r may be above k and d."""
    case = linear_case((n,), k, d, 1, dtype, bias=bias)
    exact = accumulate(dtype)
    U, V = ((torch.randn(size, r, dtype=torch.float64) / r**0.5).to(dtype) for size in (d, k))
    return case.replace(U=U, V=V, S0=torch.randn(r, dtype=exact), s=0.1 * torch.randn(r, dtype=exact))


def check(y: Tensor, h: Tensor, case: Linear) -> None:
    """Sums in float32 or better, of roundings that cancel: 32 per unit of the summed sizes. h is rounded once, y once;
    on the CPU the way is another and D and a partial y are rounded too, hence 4 roundings of the dtype."""
    c, dtype = case.double(), case.x.dtype
    sums = 32 * unit(accumulate(dtype))
    narrow = 4 * unit(dtype) if dtype in (torch.bfloat16, torch.float16) else 0.0
    assert h.dtype == y.dtype == dtype
    h_size = c.x.abs() @ c.V.abs()
    assert_within(h, c.x @ c.V, 1.01 * unit(dtype) * (c.x @ c.V).abs() + sums * h_size + half_of_least(dtype))
    D = c.U * (c.o[:, None] * (c.S0 + c.s) + c.s)
    D_size = c.U.abs() * (c.o[:, None].abs() * (c.S0.abs() + c.s.abs()) + c.s.abs())
    wish, size = h.double() @ D.t(), h.double().abs() @ D_size.t()
    if c.weight is not None:
        wish, size = wish + c.x @ c.weight.t(), size + c.x.abs() @ c.weight.abs().t()
    if c.bias is not None:
        wish, size = wish + c.bias, size + c.bias.abs()
    assert_within(y, wish, (sums + narrow) * size + unit(dtype) * wish.abs() + half_of_least(dtype))


def exact_check(y: Tensor, h: Tensor, case: Linear) -> None:
    """The kernels alone: from the rounded h, one rounding of the whole sum."""
    c, dtype = case.double(), case.x.dtype
    D = c.U * (c.o[:, None] * (c.S0 + c.s) + c.s)
    D_size = c.U.abs() * (c.o[:, None].abs() * (c.S0.abs() + c.s.abs()) + c.s.abs())
    wish = c.x @ c.weight.t() + c.bias + h.double() @ D.t()
    size = c.x.abs() @ c.weight.abs().t() + c.bias.abs() + h.double().abs() @ D_size.t()
    sums = 32 * unit(accumulate(dtype))
    assert_within(y, wish, 1.01 * unit(dtype) * wish.abs() + sums * size + half_of_least(dtype))


@every_dtype
@pytest.mark.parametrize("n, k, d, r", SIZES)
def test_it_is_the_linear_operator(backend, n, k, d, r, dtype, poisoned_memory):
    case = random_case(n, k, d, r, dtype)
    y, h = run(backend, case)
    check(y, h, case)
    if backend.name != "cpu":
        exact_check(y, h, case)


@every_dtype
@pytest.mark.parametrize("n", range(1, 9))
def test_every_number_of_rows(backend, n, dtype):
    case = random_case(n, 48, 10, 20, dtype)
    check(*run(backend, case), case)


@every_dtype
def test_without_bias_and_without_weight(backend, dtype):
    case = random_case(3, 40, 10, 8, dtype, bias=False)
    check(*run(backend, case), case)
    branch = case.replace(weight=None)
    check(*run(backend, branch), branch)


@every_dtype
@pytest.mark.parametrize("which", ["x", "weight", "bias", "U", "V", "S0", "s", "o", "all"])
def test_unaligned_pointers(backend, which, dtype):
    """One number behind a 16-byte boundary: right by the general path."""

    def shifted(t: Tensor) -> Tensor:
        view = t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape)
        assert view.copy_(t).data_ptr() % 16 != 0
        return view

    case = random_case(4, 64, 10, 16, dtype)
    chosen = ["x", "weight", "bias", "U", "V", "S0", "s", "o"] if which == "all" else [which]
    moved = case.replace(**{name: shifted(getattr(case, name)) for name in chosen})
    check(*run(backend, moved), case)


@every_dtype
def test_a_row_does_not_see_the_others(kernels, dtype):
    """Neither their numbers nor how many they are: the same sums, cut alike."""
    case = random_case(8, 80, 11, 36, dtype)
    y, h = run(kernels, case)
    for rows in ([0], [5], [1, 2], [3, 7, 0], [4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]):
        part_y, part_h = run(kernels, case.replace(x=case.x[rows]))
        assert torch.equal(part_y, y[rows]) and torch.equal(part_h, h[rows])


@every_dtype
@pytest.mark.parametrize("n", [1, 3, 8])
def test_same_bits_in_every_run(backend, n, dtype, monkeypatch):
    case = random_case(n, 300, 21, 40, dtype)
    runs = []
    for order in ("forward", "reverse", "random:1"):
        monkeypatch.setenv("OSORA_EMULATION_ORDER", order)
        runs.append(run(backend, case))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@every_dtype
def test_zero_deltas_are_the_base(kernels, dtype):
    """The adapter's branch adds exact zeros: y of a layer that never heard of an adapter."""
    case = random_case(5, 72, 10, 16, dtype)
    start = case.replace(s=torch.zeros_like(case.s), o=torch.zeros_like(case.o))
    base = start.replace(U=torch.zeros_like(case.U))
    assert torch.equal(run(kernels, start)[0], run(kernels, base)[0])


# -- several adapters ------------------------------------------------------------------------------------------------


def several(case: Linear, adapters: int) -> tuple[Linear, Tensor, Tensor]:
    exact = accumulate(case.x.dtype)
    many = case.replace(
        s=0.1 * torch.randn(adapters, len(case.s), dtype=exact), o=0.1 * torch.randn(adapters, len(case.o), dtype=exact)
    )
    ranks = torch.randint(0, len(case.s) + 1, (adapters,))
    return many, ranks, torch.randint(-1, adapters, (len(case.x),))


@every_dtype
@pytest.mark.parametrize("n, k, d, r", SIZES)
@pytest.mark.parametrize("with_ranks", [False, True], ids=["one-rank", "ranks"])
def test_each_row_is_its_own_adapter_alone(kernels, n, k, d, r, dtype, with_ranks):
    many, ranks, index = several(random_case(n, k, d, r, dtype), 3)
    if with_ranks:
        for row, rank in zip(many.s, ranks.tolist(), strict=True):
            row[rank:] = float("nan")  # an absent column may hold anything
    y, h = kernels.decode(*many.arguments, ranks if with_ranks else None, index)
    for i, a in enumerate(index.tolist()):
        rank = 0 if a < 0 else int(ranks[a]) if with_ranks else r
        # An adapter of smaller rank is one whose deltas and values end there; the base has none at all.
        present = torch.arange(r) < rank
        alone = many.replace(
            x=many.x[i : i + 1],
            S0=many.S0 * present,
            s=torch.where(present, many.s[a], 0),
            o=many.o[a],
        )
        wish, wish_h = run(kernels, alone)
        assert torch.equal(h[i], wish_h[0]), "h is that of the whole V"
        assert torch.equal(y[i], wish[0])


@every_dtype
@pytest.mark.parametrize("wrong", [3, -2, 2**62, -(2**63)])
def test_an_index_of_no_adapter_gives_nan_and_reads_nothing(kernels, dtype, wrong):
    many, _, index = several(random_case(6, 40, 10, 16, dtype), 3)
    index = torch.tensor([0, wrong, 2, -1, 1, wrong])
    y, h = kernels.decode(*many.arguments, None, index)
    bad = index == wrong
    assert torch.isnan(y[bad]).all() and torch.isfinite(y[~bad]).all() and torch.isfinite(h).all()


# -- the choice ------------------------------------------------------------------------------------------------------


def test_who_decodes(kernels):
    """A card, one to eight rows, frozen tensors that can be streamed as they lie; everything else is split."""
    sizes = {"d": 4096, "k": 4096, "r": 64, "cuda": True, "row_major": True}

    def decodes(n: int, **changes: object) -> bool:
        return bool(kernels.linear_plan(n, *(sizes | changes).values()))

    assert [n for n in range(20) if decodes(n)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert decodes(1, d=1, k=1, r=1) and decodes(8, r=1024)
    assert not decodes(1, cuda=False) and not decodes(1, row_major=False)
    for empty in ("d", "k", "r"):
        assert not decodes(1, **{empty: 0})
