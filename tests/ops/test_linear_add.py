# SPDX-License-Identifier: Apache-2.0
"""osora::linear_add_: the branch added to a given y in place: its numbers, layouts, and the rules of autograd."""

import pytest
import torch
from backends import Backend, make_backend
from composed import from_dynamo
from helpers import TOLERANCE, Linear, expected_linear, linear_case, saved_tensors
from precision import accumulate, assert_within, every_dtype, half_of_least
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from osora import ops, reference

ROWS = [(), (1,), (7,), (0,), (2, 3), (3, 0), (2, 2, 1, 3)]
every_rows = pytest.mark.parametrize("rows", ROWS, ids=str)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


def branch_case(rows: tuple[int, ...], *sizes: int, dtype: torch.dtype = torch.float32, **options) -> Linear:
    return linear_case(rows, *sizes, dtype=dtype, bias=False, **options).replace(weight=None)


def after_y(case: Linear) -> tuple[Tensor, ...]:
    return case.x, case.U, case.V, case.S0, case.s, case.o


def check(got: Tensor, y: Tensor, case: Linear) -> None:
    """One rounding of y + branch, and those of h and D: as for a linear layer whose base gives y."""
    branch = expected_linear(case)
    value, size = y.double() + branch.value["y"], y.double().abs() + branch.size["y"]
    assert got.dtype == case.x.dtype
    assert_within(got, value, TOLERANCE[case.x.dtype] * size + 256 * half_of_least(case.x.dtype))


# -- numbers and layouts ---------------------------------------------------------------------------------------------


@every_dtype
@every_rows
def test_it_adds_the_branch(backend, rows, dtype):
    case = branch_case(rows, dtype=dtype)
    y = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    start = y.clone()
    if backend.name == "cuda":  # the fixture moves tensors: what is added to there is a copy
        y = y.cuda()
        torch.ops.osora.linear_add_(y, *(t.cuda() for t in after_y(case)))
        y = y.cpu()
    else:
        h = backend.linear_add_(y, *after_y(case))
        assert torch.equal(h, backend.linear(*case.arguments)[1])
    check(y, start, case)


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """y [4, 6, 20] inside of more memory: the rest of it must stay as it is."""
    full = torch.randn(4, 6, 50, dtype=torch.float64).to(dtype)
    return {
        "contiguous": full[..., :20].contiguous(),
        "columns of a wider row": full[..., 3:23],
        "every other row": torch.randn(4, 12, 20, dtype=torch.float64).to(dtype)[:, ::2],
        "some rows of each batch": torch.randn(4, 9, 20, dtype=torch.float64).to(dtype)[:, 2:8],
        "features apart": full[..., :40:2],
        "batch permuted": torch.randn(6, 4, 20, dtype=torch.float64).to(dtype).transpose(0, 1),
        "column major": torch.randn(20, 24, dtype=torch.float64).to(dtype).t().unflatten(0, (4, 6)),
    }


@every_dtype
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_y_in_any_layout(layout, dtype):
    case, y = branch_case((4, 6), dtype=dtype), layouts(dtype)[layout]
    memory = torch.empty(0, dtype=dtype).set_(y.untyped_storage())  # all of it, as it lies
    start, outside = y.clone(), memory.clone()
    view = torch.empty(0, dtype=dtype).set_(outside.untyped_storage(), y.storage_offset(), y.shape, y.stride())
    assert ops.linear_add_(y, *after_y(case)) is y
    check(y, start, case)
    view.copy_(y)
    assert torch.equal(memory, outside), "wrote beside y"


def test_rows_are_added_to_where_they_lie():
    """No allocation as large as y, also for the columns of a wider buffer: a fused projection's output, say."""
    case = branch_case((300,), 24, 200, 4)
    y = torch.randn(300, 600)[:, 100:300]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.linear_add_(y, *after_y(case))
    assert max(e.self_cpu_memory_usage for e in profile.events()) < y.numel() * 4


@every_dtype
def test_it_agrees_with_linear(dtype):
    """Onto a y of zeros it is the branch of osora::linear, bit for bit."""
    case = branch_case((5, 3), dtype=dtype)
    y = torch.zeros(5, 3, 20, dtype=dtype)
    assert torch.equal(ops.linear_add_(y, *after_y(case)), ops.linear(*case.arguments))


@every_dtype
def test_zero_deltas_change_no_bit(dtype):
    case = branch_case((5,), dtype=dtype, step=0.0)
    y = torch.randn(5, 20).to(dtype)
    start = y.clone()
    assert torch.equal(ops.linear_add_(y, *after_y(case)), start)


# -- autograd --------------------------------------------------------------------------------------------------------


def out_of_place(y: Tensor, *rest: Tensor) -> Tensor:
    """The same, as a function of y: what gradcheck needs, and a y that is no leaf."""
    return ops.linear_add_(y * 1, *rest)


def test_gradcheck():
    for rows in [(3,), (), (2, 2)]:
        case = branch_case(rows, 5, 4, 3, dtype=torch.float64).trainable("x", "s", "o")
        y = torch.randn(*rows, 4, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(out_of_place, (y, *after_y(case)))


@every_dtype
@pytest.mark.parametrize("y_grad", [True, False])
def test_every_gradient(y_grad, dtype):
    case = branch_case((2, 5), dtype=dtype).trainable("x", "s", "o")
    y = torch.randn(2, 5, 20).to(dtype).requires_grad_(y_grad)
    dy = torch.randn(2, 5, 20).to(dtype)
    out_of_place(y, *after_y(case)).backward(dy)
    wish = expected_linear(case, dy)
    for name, key in {"x": "dx", "s": "ds", "o": "do"}.items():
        assert_within(getattr(case, name).grad, wish.value[key], TOLERANCE[dtype] * wish.size[key] + 1e-7)
    assert not y_grad or torch.equal(y.grad, dy)


@pytest.mark.parametrize("name", ["y", "x", "s", "o"])
def test_one_gradient_alone(name):
    case = branch_case((4,), dtype=torch.float64)
    case = case if name == "y" else case.trainable(name)
    y = torch.randn(4, 20, dtype=torch.float64, requires_grad=name == "y")
    result = out_of_place(y, *after_y(case))
    result.sum().backward()
    got = y.grad if name == "y" else getattr(case, name).grad
    wish = {"y": torch.ones_like(y)} | {
        n: expected_linear(case, torch.ones(4, 20)).value[k] for n, k in {"x": "dx", "s": "ds", "o": "do"}.items()
    }
    torch.testing.assert_close(got, wish[name])


def test_h_alone_is_saved():
    case = branch_case((3, 5)).trainable("x", "s", "o")
    y = torch.randn(3, 5, 20)
    with saved_tensors(*(t for t in after_y(case) if t is not case.x)) as kept:
        result = ops.linear_add_(y, *after_y(case))
    assert [tuple(t.shape) for t in kept] == [(15, 6)]
    assert result is y and y.requires_grad and y.grad_fn is not None
    y.sum().backward()


def test_whoever_saved_y_is_told():
    """exp() keeps its result; changed in place, its gradient would be wrong."""
    case = branch_case((3,)).trainable("s")
    y = torch.randn(3, 20, requires_grad=True).exp()
    version = y._version
    ops.linear_add_(y, *after_y(case))
    assert y._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_version_counts_without_gradients_too():
    case, y = branch_case((3,)), torch.randn(3, 20)
    w = torch.randn(3, 20, requires_grad=True)
    product = (y * w).sum()  # keeps y
    with torch.no_grad():
        ops.linear_add_(y, *after_y(case))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    y = torch.randn(3, 20)
    product = (y * w).sum()
    torch.ops.osora.linear_add_(y, *after_y(case))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_leaf_is_refused_before_it_is_written_to():
    case = branch_case((3,)).trainable("s")
    leaf = torch.randn(3, 20, requires_grad=True)
    for y in (leaf, leaf[:], leaf.view(3, 20)):
        start = leaf.detach().clone()
        with pytest.raises(RuntimeError, match="y is a leaf that requires a gradient"):
            ops.linear_add_(y, *after_y(case))
        assert torch.equal(leaf, start)
    with torch.no_grad():
        ops.linear_add_(leaf, *after_y(case))
    assert not torch.equal(leaf, start)


def test_a_view_of_something_larger():
    """Columns of a fused projection: the gradient reaches the rest of it, and the rest keeps its own."""
    case = branch_case((3,), dtype=torch.float64).trainable("x", "s", "o")
    w = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    fused = w * 2
    ops.linear_add_(fused[:, 10:30], *after_y(case))
    dy = torch.randn(3, 50, dtype=torch.float64)
    fused.backward(dy)
    torch.testing.assert_close(w.grad, 2 * dy)
    torch.testing.assert_close(case.s.grad, expected_linear(case, dy[:, 10:30]).value["ds"])


@pytest.mark.parametrize("name", ["U", "V", "S0"])
def test_a_gradient_of_a_frozen_tensor_is_refused(name):
    case, y = branch_case((3,)).trainable(name, "s"), torch.randn(3, 20)
    start = y.clone()
    with pytest.raises(RuntimeError, match=f"osora::linear_add_: {name} requires a gradient"):
        ops.linear_add_(y, *after_y(case))
    assert torch.equal(y, start)


def test_the_raw_operator_refuses_to_lose_a_gradient():
    case, y = branch_case((3,)).trainable("s"), torch.randn(3, 20)
    with pytest.raises(RuntimeError, match=r"call osora\.ops\.linear_add_, which has one"):
        torch.ops.osora.linear_add_(y, *after_y(case))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_double_backward_is_refused():
    case = branch_case((3,), dtype=torch.float64).trainable("s")
    loss = ops.linear_add_(torch.randn(3, 20, dtype=torch.float64), *after_y(case)).square().sum()
    (gradient,) = torch.autograd.grad(loss, case.s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing(reentrant):
    gradients = []
    for use in (False, True):
        torch.manual_seed(3)
        case = branch_case((6,)).trainable("x", "s", "o")
        weight = torch.randn(20, 24)

        def block(x: Tensor, *rest: Tensor, weight: Tensor = weight) -> Tensor:
            return ops.linear_add_(x @ weight.t(), x, *rest).tanh()

        y = checkpoint(block, *after_y(case), use_reentrant=reentrant) if use else block(*after_y(case))
        y.square().sum().backward()
        gradients.append([case.x.grad, case.s.grad, case.o.grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_y_that_overlaps_is_refused():
    case = branch_case((3,), 24, 24, 6)
    buffer = torch.randn(6, 24)
    wrong = {
        "y and x share memory": (case.x, case.x),
        "y and x share": (buffer[1:4], buffer[2:5]),
        "elements of y must not share memory": (torch.randn(24).expand(3, 24), case.x),
        "elements of y must not share": (torch.randn(26).unfold(0, 24, 1), case.x),
    }
    for message, (y, x) in wrong.items():
        start = y.clone()
        with pytest.raises(RuntimeError, match=f"osora::linear_add_: {message}"):
            ops.linear_add_(y, *after_y(case.replace(x=x)))
        assert torch.equal(y, start)
    ops.linear_add_(buffer[:3], *after_y(case.replace(x=buffer[3:])))  # of one storage, but apart
    with pytest.raises(RuntimeError, match="y and o share memory"):
        vector = case.replace(x=case.x[0])
        ops.linear_add_(vector.o, *after_y(vector))


def test_wrong_arguments_are_named():
    case = branch_case((3,))
    for y, message in [
        (torch.randn(3, 19), r"y must be x's shape with out_features at the end, \[3, 20\], got \[3, 19\]"),
        (torch.randn(2, 20), r"\[3, 20\], got \[2, 20\]"),
        (torch.randn(3, 20).bfloat16(), "y must have x's dtype and device"),
    ]:
        with pytest.raises(RuntimeError, match=f"osora::linear_add_: .*{message}"):
            ops.linear_add_(y, *after_y(case))
    with pytest.raises(RuntimeError, match="osora::linear_add_: the last dimension of x"):
        ops.linear_add_(torch.randn(3, 20), *after_y(case.replace(x=torch.randn(3, 23))))


# -- autocast and compile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_y", [torch.bfloat16, torch.float32, torch.float16])
def test_under_autocast_y_decides_the_dtype(of_y):
    case = branch_case((5,)).trainable("x", "s", "o")
    y = torch.randn(5, 20).to(of_y)
    start = y.clone()
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.linear_add_(y, *after_y(case))
    assert result is y and y.dtype == of_y
    wish = expected_linear(case, torch.ones(5, 20))
    # x is rounded to bfloat16 on its way, whatever y is
    allowed = 4 * TOLERANCE[torch.bfloat16] * (wish.size["y"] + start.double().abs())
    assert_within(y, start.double() + wish.value["y"], allowed)
    y.sum().backward()
    for name, key in {"x": "dx", "s": "ds", "o": "do"}.items():
        gradient = getattr(case, name).grad
        assert gradient.dtype == torch.float32
        assert (gradient.double() - wish.value[key]).norm() < 2e-2 * wish.size[key].norm()


@from_dynamo
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_dynamic_number_of_rows(compiler):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(compiler)
    weight = torch.randn(12, 16)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.nn.functional.silu(ops.linear_add_(x @ weight.t(), x, *rest)) * 2

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    for n in (6, 9, 17):
        case = branch_case((n,), 16, 12, 4).trainable("x", "s", "o")
        plain = case.map(lambda t: t.detach().clone()).trainable("x", "s", "o")
        torch._dynamo.mark_dynamic(case.x, 0)
        got, wish = compiled(*after_y(case)), block(*after_y(plain))
        torch.testing.assert_close(got, wish)
        got.sum().backward()
        wish.sum().backward()
        for name in ("x", "s", "o"):
            torch.testing.assert_close(getattr(case, name).grad, getattr(plain, name).grad)
    assert frames.frame_count == 1, "compiled once for all n"
    torch._dynamo.reset()


@from_dynamo
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:`torch.jit.script:FutureWarning")
def test_gradients_by_torch_func():
    """torch.func sees through plain torch alone: the same gradients, of y too, and no tangent lost."""
    case = linear_case((5,), 6, 7, 3, torch.float64, bias=False)
    y, rest = torch.randn(5, 7, dtype=torch.float64), (case.U, case.V, case.S0)

    def ours(y, x, s, o):
        return ops.linear_add_(y * 2, x, *rest, s, o).square().sum()

    def plain(y, x, s, o):
        return (y * 2 + reference.linear(x, None, None, *rest, s, o)[0]).square().sum()

    inputs = (y, case.x, case.s, case.o)
    every = tuple(range(4))
    for got, wish in zip(torch.func.grad(ours, every)(*inputs), torch.func.grad(plain, every)(*inputs), strict=True):
        torch.testing.assert_close(got, wish)
    torch.testing.assert_close(torch.func.jvp(ours, inputs, inputs), torch.func.jvp(plain, inputs, inputs))


def test_compile_writes_to_a_given_y():
    """An argument of the compiled function is changed in place there too."""
    torch._dynamo.reset()
    case = branch_case((5,))
    compiled = torch.compile(ops.linear_add_, backend="aot_eager", fullgraph=True)
    y = torch.randn(5, 20)
    wish = ops.linear_add_(y.clone(), *after_y(case))
    compiled(y, *after_y(case))
    torch.testing.assert_close(y, wish)
    torch._dynamo.reset()


# opcheck of torch 2.14 itself looks at .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    case = branch_case((2, 3), 8, 7, 3)
    torch.library.opcheck(torch.ops.osora.linear_add_.default, (torch.randn(2, 3, 7), *after_y(case)))


def test_16_bit_deltas_and_sums_in_float32():
    """As for osora::linear: s and o may be 16-bit, their gradients then are."""
    case = branch_case((700,), dtype=torch.bfloat16)
    case = case.replace(s=case.s.bfloat16(), o=case.o.bfloat16()).trainable("s", "o")
    y = torch.zeros(700, 20, dtype=torch.bfloat16)
    ops.linear_add_(y, *after_y(case)).sum().backward()
    wish = expected_linear(case, torch.ones(700, 20))
    for name, key in {"s": "ds", "o": "do"}.items():
        assert getattr(case, name).grad.dtype == torch.bfloat16
        allowed = (TOLERANCE[accumulate(torch.bfloat16)] + 2 * TOLERANCE[torch.bfloat16]) * wish.size[key]
        assert_within(getattr(case, name).grad, wish.value[key], allowed)
