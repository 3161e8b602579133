# SPDX-License-Identifier: Apache-2.0
"""The linear operator for a caller who has h or D already: what is given is used, forward and backward, and checked."""

import itertools

import pytest
import torch
from helpers import linear_case
from precision import every_dtype
from torch import Tensor

from osora import ops, reference

SIZES = [((3, 5), 7, 11, 4), ((1,), 1, 1, 1), ((0,), 5, 7, 3), ((40,), 13, 17, 8), ((), 6, 5, 2)]


def linear_given(*arguments: Tensor | None) -> Tensor:
    *inputs, h, D = arguments
    return torch.ops.osora.linear_trained(*inputs, False, h, D)


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def near(got: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    assert got.shape == true.shape
    assert (got.double() - true).norm() <= 8 * eps * true.norm() + 1e-30


@every_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bare", [False, True], ids=["weight", "branch alone"])
def test_up_takes_d(backend, size, dtype, bare):
    """Another D than the fold's shows that it is that one."""
    leading, k, d, r = size
    case = linear_case(leading, k, d, r, dtype)
    W, bias = (None, None) if bare else (case.weight, case.bias)
    h, D = torch.randn(case.x[..., 0].numel(), r).to(dtype), torch.randn(d, r).to(dtype)
    y = backend.up(case.x, h, W, bias, case.U, case.S0, case.s, case.o, D)
    true = h.double() @ D.double().t()
    if not bare:
        true = true + case.x.double().reshape(-1, k) @ W.double().t() + bias.double()
    near(y, true.reshape(*leading, d), dtype)
    assert y.dtype == dtype


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_linear_backward_takes_d(backend, size, dtype):
    leading, k, d, r = size
    case = linear_case(leading, k, d, r, dtype)
    dy, D = torch.randn(*leading, d).to(dtype), torch.randn(d, r).to(dtype)
    h = torch.randn(dy[..., 0].numel(), r).to(dtype)
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o, True, True, True)
    dx, ds, do = backend.linear_backward(dy, h, *rest, D)
    rows = dy.double().reshape(-1, d)
    true = (rows @ D.double()) @ case.V.double().t() + rows @ case.weight.double()
    near(dx, true.reshape(*leading, k), dtype)
    plain = backend.linear_backward(dy, h, *rest)
    assert torch.equal(ds, plain[1]) and torch.equal(do, plain[2])


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_a_wrong_d_is_refused(wrong):
    case = linear_case((3,), 5, 7, 4, torch.float32)
    D = torch.randn(7, 3) if wrong == "shape" else torch.randn(7, 4).double()
    h, frozen = torch.randn(3, 4), (case.U, case.S0, case.s, case.o)
    for name, call in {
        "up": lambda: torch.ops.osora.up(case.x, h, None, None, *frozen, D),
        "linear_backward": lambda: torch.ops.osora.linear_backward(
            torch.randn(3, 7), h, None, case.U, case.V, case.S0, case.s, case.o, True, True, True, D
        ),
    }.items():
        with pytest.raises(RuntimeError, match=rf"osora::{name}: D must be \[out_features, rank\] as U"):
            call()


@every_dtype
@pytest.mark.parametrize("given", ["h", "D", "both"])
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_right_gives_the_bits_of_linear(dtype, given, trained):
    case = linear_case((3, 13), 17, 29, 8, dtype)
    h = torch.ops.osora.down(case.x, case.V) if given != "D" else None
    D = ops.fold(case.U, case.S0, case.s, case.o) if given != "h" else None
    inputs = [case.x, case.weight, case.bias, case.U, case.V, case.S0, case.s, case.o]
    found = []
    for function in (ops.linear, lambda *a: linear_given(*a, h, D)):
        x, s, o, bias = (t.clone().requires_grad_(trained) for t in (case.x, case.s, case.o, case.bias))
        y = function(x, *inputs[1:2], bias, *inputs[3:6], s, o)
        found.append([y.detach()])
        if trained:
            y.square().sum().backward()
            found[-1] += [t.grad for t in (x, s, o, bias)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_h_may_be_columns_of_a_wider_one():
    case = linear_case((3, 13), 17, 29, 8, torch.float32)
    wide_h = torch.randn(39, 24)
    wide_h[:, 8:16] = torch.ops.osora.down(case.x, case.V)
    s = case.s.clone().requires_grad_()
    y = linear_given(case.x, case.weight, None, case.U, case.V, case.S0, s, case.o, wide_h[:, 8:16], None)
    y.sum().backward()
    true_y, true_h = reference.linear(*wide([case.x, case.weight, None, case.U, case.V, case.S0, case.s, case.o]))
    near(y.detach(), true_y, torch.float32)
    dy = torch.ones(3, 13, 29, dtype=torch.float64)
    frozen = wide([case.weight, case.U, case.V, case.S0, case.s, case.o])
    near(s.grad, reference.linear_backward(dy, true_h, *frozen)[1], torch.float32)


def test_a_given_d_is_kept_and_one_that_changes_is_an_error():
    """It is this D that the backward takes: dx shows it."""
    case = linear_case((40,), 5, 7, 4, torch.float64)
    x, D = case.x.clone().requires_grad_(), torch.randn(7, 4, dtype=torch.float64)
    rest = (case.U, case.V, case.S0, case.s, case.o)
    linear_given(x, case.weight, None, *rest, None, D).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(40, 7, dtype=torch.float64) @ (case.weight + D @ case.V.t()))
    y = linear_given(x, case.weight, None, *rest, None, D)
    D.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_on_what_is_saved_see_no_d():
    """Activation checkpointing counts what is saved, and has no D when it computes a layer again."""
    case = linear_case((40,), 5, 7, 4, torch.float64)
    x, D = case.x.clone().requires_grad_(), torch.randn(7, 4, dtype=torch.float64)
    seen: list[list[Tensor]] = []
    for given in (None, D):
        seen.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen[-1].append(t), t)[1], lambda t: t):
            h = torch.ops.osora.down(case.x, case.V)
            y = linear_given(x, case.weight, None, case.U, case.V, case.S0, case.s, case.o, h, given)
    assert [t.shape for t in seen[0]] == [t.shape for t in seen[1]]
    x.grad = None
    y.sum().backward()  # folds: dx is that of the real D
    true = case.weight + reference.fold(case.U, case.S0, case.s, case.o) @ case.V.t()
    torch.testing.assert_close(x.grad, torch.ones(40, 7, dtype=torch.float64) @ true)


# opcheck of torch 2.14 itself looks at .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("h, D", list(itertools.product([False, True], repeat=2)))
def test_opcheck(h, D):
    case = linear_case((9,), 5, 7, 4, torch.float64)
    given_h = torch.ops.osora.down(case.x, case.V)
    given_D = ops.fold(case.U, case.S0, case.s, case.o) if D else None
    frozen = (case.U, case.S0, case.s, case.o)
    torch.library.opcheck(
        torch.ops.osora.up.default, (case.x, given_h, case.weight, case.bias, *frozen, given_D), raise_exception=True
    )
    torch.library.opcheck(
        torch.ops.osora.linear_backward.default,
        (torch.randn(9, 7).double(), given_h, case.weight, case.U, case.V, *frozen[1:], True, True, True, given_D),
        raise_exception=True,
    )
    x, s, o = (t.detach().requires_grad_() for t in (case.x, case.s, case.o))
    torch.library.opcheck(
        torch.ops.osora.linear_trained.default,
        (x, case.weight, case.bias, case.U, case.V, case.S0, s, o, False, given_h if h else None, given_D),
        raise_exception=True,
    )
