# SPDX-License-Identifier: Apache-2.0
"""The fold D = U (o (S0 + s) + s) and its gradient, by every backend, against the paper's formula in float64."""

from typing import NamedTuple

import pytest
import torch
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least, unit
from torch import Tensor

# [d, r]: one number, primes, whole 16-byte packs and not, several blocks of rows, several tiles of columns.
SIZES = [(1, 1), (7, 5), (64, 8), (65, 64), (257, 7), (300, 16), (101, 100), (131, 257), (33, 1024), (3, 2056)]
names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
every_size = pytest.mark.parametrize("d, r", SIZES)


class Case(NamedTuple):
    U: Tensor
    P: Tensor
    S0: Tensor
    s: Tensor
    o: Tensor

    @property
    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.U, self.S0, self.s, self.o


def make_case(d: int, r: int, dtype: torch.dtype, step: float = 1e-2) -> Case:
    exact = accumulate(dtype)
    U = torch.randn(d, r, dtype=torch.float64).to(dtype)
    S0 = 3 / (1 + torch.arange(r, dtype=exact))
    s, o = step * torch.randn(r, dtype=exact), step * torch.randn(d, dtype=exact)
    return Case(U, torch.randn(d, r, dtype=exact), S0, s, o)


def doubled(case: Case) -> Case:
    return Case(*(t.double() for t in case))


def check_fold(D: Tensor, case: Case) -> None:
    """One rounding to U's dtype, after three in the accumulation dtype (S0 + s, the fused w, u w)."""
    U, _, S0, s, o = doubled(case)
    wish = U * (o[:, None] * (S0 + s) + s)
    inner = U.abs() * ((o[:, None] * (S0 + s)).abs() + s.abs())
    dtype = case.U.dtype
    assert D.dtype == dtype
    assert_within(D, wish, 1.01 * unit(dtype) * wish.abs() + 4 * unit(accumulate(dtype)) * inner + half_of_least(dtype))


def check_gradients(ds: Tensor, d_o: Tensor, case: Case) -> None:
    """A rounding per addition. They cancel like a random walk: 32 of them per unit of the summed sizes is generous."""
    U, P, S0, s, o = doubled(case)
    terms_s, terms_o = (1 + o[:, None]) * U * P, U * (S0 + s) * P
    allowed = 32 * unit(accumulate(case.U.dtype))
    assert ds.dtype == d_o.dtype == accumulate(case.U.dtype)
    assert_within(ds, terms_s.sum(0), allowed * terms_s.abs().sum(0))
    assert_within(d_o, terms_o.sum(1), allowed * terms_o.abs().sum(1))


@every_dtype
@every_size
def test_fold_equals_its_definition(backend, d, r, dtype):
    case = make_case(d, r, dtype)
    check_fold(backend.fold(*case.forward), case)


@every_dtype
@every_size
def test_gradients_equal_their_definition(backend, d, r, dtype):
    case = make_case(d, r, dtype)
    check_gradients(*backend.fold_backward(*case), case)


def test_it_is_the_formula_of_the_paper(backend):
    """D = U ⊙ (O Sᵀ − 1 S0ᵀ) with O = 1 + o, S = S0 + s; the gradients are autograd's of just that."""
    U, P, S0, s, o = make_case(40, 24, torch.float64)
    scales, values = (1 + o).requires_grad_(), (S0 + s).requires_grad_()
    D = U * (scales[:, None] * values - S0)
    d_scales, d_values = torch.autograd.grad((D * P).sum(), (scales, values))
    ds, d_o = backend.fold_backward(U, P, S0, s, o)
    torch.testing.assert_close(backend.fold(U, S0, s, o), D.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(ds, d_values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(d_o, d_scales, rtol=1e-12, atol=1e-13)


@every_dtype
def test_no_rows_and_no_columns(backend, dtype, poisoned_memory):
    for d, r in [(0, 5), (5, 0), (0, 0)]:
        case = make_case(d, r, dtype)
        assert backend.fold(*case.forward).shape == (d, r)
        ds, d_o = backend.fold_backward(*case)
        assert torch.equal(ds, torch.zeros_like(case.s)), "an empty sum is zero"
        assert torch.equal(d_o, torch.zeros_like(case.o)), "an empty sum is zero"


@every_dtype
@pytest.mark.parametrize("d, r", [(65, 64), (131, 257)])
def test_every_number_is_written(backend, d, r, dtype, poisoned_memory):
    case = make_case(d, r, dtype)
    check_fold(backend.fold(*case.forward), case)
    check_gradients(*backend.fold_backward(*case), case)


@every_dtype
@pytest.mark.parametrize("which", ["U", "P", "S0", "s", "o", "all"])
def test_unaligned_pointers(backend, which, dtype):
    """One number behind a 16-byte boundary: the fast path must not be taken, or not for that array."""
    case = make_case(66, 64, dtype)

    def shifted(t: Tensor) -> Tensor:
        storage = t.new_full((t.numel() + 1,), float("nan"))
        view = storage[1:].view(t.shape)
        assert view.copy_(t).data_ptr() % 16 != 0
        return view

    moved = Case(**{name: shifted(t) if which in (name, "all") else t for name, t in case._asdict().items()})
    check_fold(backend.fold(*moved.forward), case)
    check_gradients(*backend.fold_backward(*moved), case)


def test_strided_inputs(backend):
    case = make_case(20, 16, torch.float32)
    strided = Case(*(torch.stack([t, t], -1)[..., 0] if t.dim() == 1 else t.t().contiguous().t() for t in case))
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(backend.fold(*strided.forward), backend.fold(*case.forward))
    check_gradients(*backend.fold_backward(*strided), case)


@every_dtype
def test_only_the_gradients_asked_for(backend, dtype):
    case = make_case(70, 24, dtype)
    both = backend.fold_backward(*case)
    only_s, no_o = backend.fold_backward(*case, True, False)
    no_s, only_o = backend.fold_backward(*case, False, True)
    none = backend.fold_backward(*case, False, False)
    assert torch.equal(only_s, both[0]) and torch.equal(only_o, both[1])
    assert [tuple(t.shape) for t in (no_o, no_s, *none)] == [(0,)] * 4


@every_dtype
def test_zero_deltas_are_exactly_nothing(backend, dtype):
    """With o = s = 0 the adapted layer is the base layer, bit for bit."""
    case = make_case(33, 40, dtype, step=0.0)
    assert (backend.fold(*case.forward) == 0).all()


@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-2])
def test_small_steps_survive_in_bfloat16(backend, step):
    """The reason for the delta form: what is small stays exact to U's own rounding (2⁻⁸ at most, 1.7e-3 on average).

    O and S themselves in bfloat16 would lose a step of 1e-4 entirely.
    """
    case = make_case(256, 64, torch.bfloat16, step)
    rounded = case._replace(s=case.s.bfloat16(), o=case.o.bfloat16())
    U, _, S0, s, o = doubled(case)
    wish = U * (o[:, None] * (S0 + s) + s)

    def error(D: Tensor) -> float:
        return float((D.double() - wish).norm() / wish.norm())

    assert error(backend.fold(*case.forward)) < 2e-3
    assert error(backend.fold(*rounded.forward)) < 3e-3  # and the deltas' own rounding


@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_dtype
def test_16_bit_deltas(backend, dtype, delta):
    """FSDP and model.to(bfloat16) make them so. They are widened, and nothing else changes."""
    case = make_case(50, 32, dtype)
    narrow = case._replace(s=case.s.to(delta), o=case.o.to(delta))
    wide = narrow._replace(s=narrow.s.to(case.s.dtype), o=narrow.o.to(case.o.dtype))
    assert torch.equal(backend.fold(*narrow.forward), backend.fold(*wide.forward))
    for a, b in zip(backend.fold_backward(*narrow), backend.fold_backward(*wide), strict=True):
        assert a.dtype == accumulate(dtype) and torch.equal(a, b)


@every_dtype
@pytest.mark.parametrize("d, r", [(65, 64), (131, 257)])
def test_gradient_identity(backend, d, r, dtype):
    """<1 + o, do> = <S0 + s, ds>: both are Σ (1 + o_i) U_ij P_ij (S0 + s)_j."""
    case = make_case(d, r, dtype)
    U, P, S0, s, o = doubled(case)
    ds, d_o = (t.double() for t in backend.fold_backward(*case))
    size = ((1 + o[:, None]) * U * P * (S0 + s)).abs().sum()
    assert abs((1 + o) @ d_o - (S0 + s) @ ds) <= 32 * unit(accumulate(dtype)) * size


@every_dtype
def test_rows_do_not_see_each_other(backend, dtype):
    """A row's D and do are the same bits whatever rows come with it."""
    case = make_case(150, 72, dtype)
    part = Case(case.U[:77], case.P[:77], case.S0, case.s, case.o[:77])
    assert torch.equal(backend.fold(*part.forward), backend.fold(*case.forward)[:77])
    if backend.name in ("cpu", "emulated", "cuda"):  # torch.sum's order depends on the shape
        assert torch.equal(backend.fold_backward(*part)[1], backend.fold_backward(*case)[1][:77])


@every_dtype
@pytest.mark.parametrize("d, r", [(300, 64), (131, 257)])
def test_same_bits_in_every_run(backend, d, r, dtype, monkeypatch):
    """No result depends on scheduling: the emulator runs blocks and threads in three orders."""
    case = make_case(d, r, dtype)
    runs = []
    for order in ("forward", "reverse", "random:1"):
        monkeypatch.setenv("OSORA_EMULATION_ORDER", order)
        runs.append((backend.fold(*case.forward), *backend.fold_backward(*case)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_half_precision_overflow_and_nan_pass_through(backend):
    """Infinity and NaN in U or P reach their own row and column and no other."""
    case = make_case(70, 64, torch.float16)
    case.U[3, 5] = float("inf")
    case.U[66, 9] = 60000
    case.s[9] = 4.0  # 60000 * 4 is beyond float16
    case.P[7, 11] = float("nan")
    D = backend.fold(*case.forward)
    assert torch.isinf(D[3, 5]) and torch.isinf(D[66, 9]) and (~torch.isfinite(D)).sum() == 2
    ds, d_o = backend.fold_backward(*case)
    assert (~torch.isfinite(ds)).nonzero().flatten().tolist() == [5, 11]
    assert (~torch.isfinite(d_o)).nonzero().flatten().tolist() == [3, 7]


def test_a_wrong_call_says_what_is_wrong(backend):
    if backend.name == "reference":
        pytest.skip("the reference trusts its caller")
    U, P, S0, s, o = make_case(6, 4, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"osora::fold: S0 must be \[rank\] = \[4\], got shape \[3\]"):
        backend.fold(U, S0[:3], s, o)
    with pytest.raises(RuntimeError, match=r"osora::fold: S0 must be Float for BFloat16 factors.*got BFloat16"):
        backend.fold(U, S0.bfloat16(), s, o)
    with pytest.raises(RuntimeError, match=r"osora::fold_backward: P must have U's shape \[6, 4\], got \[6, 3\]"):
        backend.fold_backward(U, P[:, :3], S0, s, o)
