# SPDX-License-Identifier: Apache-2.0
"""osora::linear and osora::linear_backward: their numbers, by every backend, against the paper's layer in float64."""

import pytest
import torch
from backends import Backend, make_backend
from helpers import TOLERANCE, Expected, Linear, expected_linear, linear_case
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from osora import ops

exact_dtypes = pytest.mark.parametrize("dtype", DTYPES[:3], ids=["float64", "float32", "bfloat16"])
ROWS = [(), (1,), (7,), (0,), (2, 3), (3, 0), (2, 1, 3), (2, 2, 1, 3)]
every_rows = pytest.mark.parametrize("rows", ROWS, ids=str)
# k, d, r: one number, the rank full on either side, more than one block of rows in the CPU reduction of ds
SIZES = [(1, 1, 1), (5, 7, 5), (7, 5, 5), (24, 20, 6), (33, 300, 17), (130, 65, 64)]
SUMS = ("ds", "do")


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """The emulator has the fold alone: the products are cuBLAS's."""
    return make_backend(request.param)


def check(name: str, got: Tensor, wish: Expected, dtype: torch.dtype) -> None:
    value, size = wish.value[name], wish.size[name]
    assert got.dtype == (accumulate(dtype) if name in SUMS else dtype), name
    try:
        # a rounding near zero, a few hundred times at the most
        assert_within(got, value, TOLERANCE[dtype] * size + 256 * half_of_least(dtype))
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def forward_and_backward(backend: Backend, case: Linear, dy: Tensor) -> dict[str, Tensor]:
    y, h = backend.linear(*case.arguments)
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o)
    dx, ds, do = backend.linear_backward(dy, h, *rest, True, True, True)
    return {"y": y, "dx": dx, "ds": ds, "do": do}


def check_case(backend: Backend, case: Linear, dy: Tensor | None = None) -> None:
    dy = torch.randn(*case.x.shape[:-1], len(case.o), dtype=torch.float64).to(case.x.dtype) if dy is None else dy
    wish = expected_linear(case, dy)
    for name, got in forward_and_backward(backend, case, dy).items():
        check(name, got, wish, case.x.dtype)


# -- against the definition ------------------------------------------------------------------------------------------


@every_dtype
@every_rows
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_leading_dimensions(backend, rows, bias, dtype):
    check_case(backend, linear_case(rows, dtype=dtype, bias=bias))


@every_dtype
@pytest.mark.parametrize("k, d, r", SIZES)
def test_any_sizes(backend, k, d, r, dtype):
    check_case(backend, linear_case((11,), k, d, r, dtype))


@every_dtype
def test_more_rows_than_one_block(backend, dtype):
    """The 16-bit sum over rows is taken 512 rows at a time."""
    check_case(backend, linear_case((3, 400), 8, 9, 4, dtype))


@every_dtype
@every_rows
def test_the_branch_alone(backend, rows, dtype):
    """Without a weight: x V Dᵀ, for quantised bases and for dropout."""
    check_case(backend, linear_case(rows, dtype=dtype, bias=False).replace(weight=None))


@every_dtype
def test_no_features(backend, dtype):
    for k, d in [(0, 5), (5, 0), (0, 0)]:
        case = linear_case((3,), max(k, 1), max(d, 1), 1, dtype)
        case = case.replace(x=case.x[:, :k], weight=case.weight[:d, :k], bias=case.bias[:d], o=case.o[:d])
        check_case(backend, case.replace(U=case.U[:d], V=case.V[:k]))


@every_dtype
@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_deltas(backend, dtype, delta):
    case = linear_case((5,), dtype=dtype)
    check_case(backend, case.replace(s=case.s.to(delta), o=case.o.to(delta)))


# -- layouts ---------------------------------------------------------------------------------------------------------


def strided_rows(dtype: torch.dtype, c: int) -> dict[str, Tensor]:
    """[..., c] in every layout that people's code produces, and some that it should not."""
    t = torch.randn(4, 6, 2 * c, dtype=torch.float64).to(dtype)
    return {
        "every other": t[..., ::2],
        "left half": t[..., :c],
        "transposed batch": t[..., :c].transpose(0, 1),
        "column major": torch.randn(c, 24, dtype=torch.float64).to(dtype).t(),
        "columns innermost": torch.randn(4, c, 6, dtype=torch.float64).to(dtype).transpose(1, 2),
        "expanded rows": t[0, 0, :c].expand(5, 3, c),
        "one number": t[0, 0, 0].expand(5, 3, c),
        "windows": torch.randn(c + 7, dtype=torch.float64).to(dtype).unfold(0, c, 1),
        "one row of many": t[:, :1, :c],
    }


@every_dtype
@pytest.mark.parametrize("layout", strided_rows(torch.float32, 2).keys())
def test_x_and_dy_in_any_layout(backend, layout, dtype):
    x = strided_rows(dtype, 24)[layout]
    check_case(backend, linear_case((1,), dtype=dtype).replace(x=x), strided_rows(dtype, 20)[layout])


@every_dtype
def test_frozen_tensors_in_any_layout(backend, dtype):
    case = linear_case((2, 3), dtype=dtype)

    def strided(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0]

    check_case(backend, case.map(lambda t: t if t is case.x else strided(t)))


def test_a_transposed_weight_is_not_copied():
    """GPT-2 stores [in, out]; its transpose goes to GEMM as it is. A copy would show as an allocation of its size."""
    k, d = 200, 300
    case = linear_case((5,), k, d, 4)
    stored = case.weight.t().contiguous()

    def measure(function, *arguments):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = function(*arguments)
        return max(e.self_cpu_memory_usage for e in profile.events()), result

    biggest, (_, h) = measure(torch.ops.osora.linear, *case.replace(weight=stored.t()).arguments)
    assert biggest < k * d * 4
    rest = (stored.t(), case.U, case.V, case.S0, case.s, case.o, True, True, True)
    biggest, _ = measure(torch.ops.osora.linear_backward, torch.randn(5, d), h, *rest)
    assert biggest < k * d * 4


# -- what is asked for -----------------------------------------------------------------------------------------------


@every_dtype
def test_only_the_gradients_asked_for(backend, dtype):
    case = linear_case((2, 5), dtype=dtype)
    dy = torch.randn(2, 5, 20, dtype=torch.float64).to(dtype)
    _, h = backend.linear(*case.arguments)
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o)
    everything = backend.linear_backward(dy, h, *rest, True, True, True)
    for need in [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]:
        for asked, got, wish in zip(need, backend.linear_backward(dy, h, *rest, *need), everything, strict=True):
            assert torch.equal(got, wish) if asked else got.shape == (0,)


def test_no_kernel_runs_for_what_nobody_asked():
    """A layer with a trained s alone: no dx product; frozen: no backward at all."""
    case = linear_case((5,), dtype=torch.float64, bias=False).trainable("s")  # float32's dyᵀ h is a loop of ours
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.linear(*case.arguments).sum().backward()
    products = [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
    assert len(products) == 4, f"x V, h Dᵀ, += x W0ᵀ; dyᵀ h: {products}"
    assert not ops.linear(*linear_case((5,)).arguments).requires_grad


# -- the start is the base model -------------------------------------------------------------------------------------


@exact_dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("k, d, r", [(1, 1, 1), (24, 20, 6), (64, 48, 16), (33, 77, 5), (576, 192, 64), (192, 576, 7)])
def test_zero_deltas_are_the_base_bit_for_bit(k, d, r, bias, dtype):
    """Whatever the number of rows, also 1, where a base without adapter may take a matrix-vector product."""
    case = linear_case((1,), k, d, r, dtype, bias=bias, step=0.0)
    for rows in [(1,), (2,), (5,), (64,), (1, 1), (1, 7), (3, 5), (2, 1, 4)]:
        x = torch.randn(*rows, k, dtype=torch.float64).to(dtype)
        y = ops.linear(*case.replace(x=x).arguments)
        assert torch.equal(y, torch_linear(x, case.weight, case.bias)), rows


@exact_dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", strided_rows(torch.float32, 2).keys())
def test_zero_deltas_are_the_base_in_any_layout(layout, bias, dtype):
    """torch multiplies a strided batch matrix by matrix, and adds a bias after rounding the product."""
    case = linear_case((1,), dtype=dtype, bias=bias, step=0.0)
    x = strided_rows(dtype, 24)[layout]
    assert torch.equal(ops.linear(*case.replace(x=x).arguments), torch_linear(x, case.weight, case.bias))


@exact_dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_zero_deltas_are_the_base_of_a_vector(bias, dtype):
    case = linear_case((), 65, 70, 3, dtype, bias=bias, step=0.0)
    assert torch.equal(ops.linear(*case.arguments), torch_linear(case.x, case.weight, case.bias))


@every_dtype
def test_zero_deltas_leave_the_base_gradient(dtype):
    """dx of the first step is that of the frozen base, to one rounding; ds and do are not zero."""
    case = linear_case((6,), dtype=dtype, step=0.0).trainable("x", "s", "o")
    dy = torch.randn(6, 20).to(dtype)
    ops.linear(*case.arguments).backward(dy)
    dy, weight = dy.double(), case.weight.double()
    assert_within(case.x.grad, dy @ weight, TOLERANCE[dtype] * (dy.abs() @ weight.abs()))
    assert (case.s.grad != 0).all() and (case.o.grad != 0).all()


# -- what the method promises ----------------------------------------------------------------------------------------


@every_dtype
def test_gradient_identity(backend, dtype):
    """<O, dO> = <S, dS>: scaling every output by a is scaling every singular value by a."""
    case = linear_case((9,), 40, 50, 16, dtype)
    dy = torch.randn(9, 50).to(dtype)
    got = forward_and_backward(backend, case, dy)
    scale, S = 1 + case.o.double(), case.S0.double() + case.s.double()
    size = expected_linear(case, dy).size["do"] @ scale.abs()
    # both sums start from one P, summed in float32: nothing of the 16-bit roundings remains
    assert abs(scale @ got["do"].double() - S @ got["ds"].double()) <= TOLERANCE[accumulate(dtype)] * size


def test_rank_of_the_update_is_at_most_r(backend):
    case = linear_case((1,), 40, 30, 7, torch.float64, bias=False)
    update = backend.linear(*case.replace(x=torch.eye(40, dtype=torch.float64), weight=None).arguments)[0]
    assert torch.linalg.matrix_rank(update) == 7


@every_dtype
def test_joint_signs_do_not_matter(backend, dtype):
    """(u_j, v_j) and (-u_j, -v_j) are one triplet: not a bit changes."""
    case = linear_case((4, 5), dtype=dtype)
    sign = torch.tensor([1, -1, -1, 1, -1, 1]).to(dtype)
    flipped = case.replace(U=case.U * sign, V=case.V * sign)
    dy = torch.randn(4, 5, 20).to(dtype)
    first, second = forward_and_backward(backend, case, dy), forward_and_backward(backend, flipped, dy)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_bias_is_not_scaled(backend):
    case = linear_case((1,), dtype=torch.float64).replace(x=torch.zeros(1, 24, dtype=torch.float64))
    assert torch.equal(backend.linear(*case.arguments)[0][0], case.bias)


@every_dtype
def test_rows_do_not_see_each_other(backend, dtype):
    """A NaN in one row stays there, in y and in dx."""
    case = linear_case((6,), dtype=dtype)
    bad = case.x.clone()
    bad[2] = float("nan")
    dy = torch.randn(6, 20).to(dtype)
    y, dx = (forward_and_backward(backend, case.replace(x=bad), dy)[name] for name in ("y", "dx"))
    assert y[2].isnan().all() and not dx.isnan().any()
    wish = expected_linear(case)
    wish.value["y"], wish.size["y"] = wish.value["y"][[0, 1, 3, 4, 5]], wish.size["y"][[0, 1, 3, 4, 5]]
    check("y", y[[0, 1, 3, 4, 5]], wish, dtype)
