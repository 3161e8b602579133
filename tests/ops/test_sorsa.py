# SPDX-License-Identifier: Apache-2.0
"""osora::sorsa_linear: numbers against the paper's layer in float64, and its life inside torch."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from backends import Backend, make_backend
from composed import from_dynamo
from helpers import TOLERANCE, linear_case, saved_tensors
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear as torch_linear
from torch.utils.checkpoint import checkpoint

import osora
from osora import reference
from osora.ops import sorsa

exact_dtypes = pytest.mark.parametrize("dtype", DTYPES[:3], ids=["float64", "float32", "bfloat16"])
ROWS = [(), (1,), (7,), (0,), (2, 3), (3, 0), (2, 2, 1, 3)]
every_rows = pytest.mark.parametrize("rows", ROWS, ids=str)
SIZES = [(1, 1, 1), (5, 7, 5), (7, 5, 5), (33, 300, 17), (130, 65, 64)]  # k, d, r
TRAINED = ("x", "bias", "u", "s", "v")
GRADIENTS = {"x": "dx", "bias": "dbias", "u": "du", "s": "ds", "v": "dv"}


def triplets(U0, S0, V0, u, s, v):
    """U [d, r], S [r], V [k, r] in float32 (float64), differentiable in u, s and v: what a penalty looks at."""
    exact = reference.accumulate_dtype(U0.dtype)
    return U0.to(exact) + u.to(exact), S0 + s.to(exact), V0.to(exact) + v.to(exact)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@dataclass
class Sorsa:
    """The arguments of osora::sorsa_linear, in its order."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    U0: Tensor
    S0: Tensor
    V0: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def map(self, change) -> "Sorsa":
        return Sorsa(*(None if t is None else change(t) for t in self.arguments))

    def trainable(self, *names: str) -> "Sorsa":
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in names})

    def backward_arguments(self, h: Tensor) -> tuple[Tensor | None, ...]:
        return self.x, h, self.weight, self.U0, self.S0, self.V0, self.u, self.s, self.v


def sorsa_case(rows, k=24, d=20, r=6, dtype=torch.float32, *, bias=True, step=0.1) -> Sorsa:
    c = linear_case(rows, k, d, r, dtype, bias=bias)
    exact = accumulate(dtype)
    u, s, v = (step * torch.randn(*shape, dtype=exact) for shape in [(d, r), (r,), (k, r)])
    return Sorsa(c.x, c.weight, c.bias, c.U, c.S0, c.V, u, s, v)


def expected(case: Sorsa, dy: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and sums of the sizes of their terms, by float64 autograd of the formula of the paper."""
    c = case.map(lambda t: t.detach().double())
    leaves = {n: getattr(c, n).requires_grad_() for n in TRAINED if getattr(c, n) is not None}
    W = torch.zeros(len(c.U0), len(c.V0), dtype=torch.float64) if c.weight is None else c.weight
    U, S, V = c.U0 + c.u, c.S0 + c.s, c.V0 + c.v
    y = c.x @ (W + U @ S.diag() @ V.t() - c.U0 @ c.S0.diag() @ c.V0.t()).t() + (0 if c.bias is None else c.bias)
    # what is computed: W, u S, U0 s, and B v, each term by its size
    a = case.map(lambda t: t.detach().double().abs())
    W_size = 0 * W.abs() if a.weight is None else a.weight
    A, B = a.u * (a.S0 + a.s) + a.U0 * a.s, (a.U0 + a.u) * (a.S0 + a.s)
    full = W_size + A @ a.V0.t() + B @ a.v.t()
    value = {"y": y.detach()}
    size = {"y": a.x @ full.t() + (0 if a.bias is None else a.bias)}
    if dy is not None:
        dy = dy.double()
        found = torch.autograd.grad(y, list(leaves.values()), dy)
        value |= {GRADIENTS[n]: g for n, g in zip(leaves, found, strict=True)}
        n = dy.shape[:-1].numel()
        rows, x = dy.abs().reshape(n, len(U)), a.x.reshape(n, len(V))
        P = rows.t() @ (x @ (a.V0 + a.v))
        size |= {
            "dx": dy.abs() @ full,
            "dbias": rows.sum(0),
            "du": P * (a.S0 + a.s),
            "ds": ((a.U0 + a.u) * P).sum(0),
            "dv": x.t() @ (rows @ B),
        }
    return value, size


def check(name: str, got: Tensor, wish: tuple, dtype: torch.dtype, of: torch.dtype | None = None) -> None:
    value, size = wish
    assert got.dtype == (of or (accumulate(dtype) if name in ("du", "ds", "dv") else dtype)), name
    try:
        # V0 and v, or A and B, are products of their own: their roundings add up, at most twice those of one
        assert_within(got, value[name], 2 * TOLERANCE[dtype] * size[name] + 256 * half_of_least(dtype))
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def check_case(backend: Backend, case: Sorsa, dy: Tensor | None = None) -> None:
    dtype = case.x.dtype
    if dy is None:
        dy = torch.randn(*case.x.shape[:-1], len(case.U0), dtype=torch.float64).to(dtype)
    wish = expected(case, dy)
    y, h = backend.sorsa_linear(*case.arguments)
    assert h.shape == (dy.shape[:-1].numel(), len(case.S0))
    check("y", y, wish, dtype)
    found = backend.sorsa_linear_backward(dy, *case.backward_arguments(h), True, True, True, True)
    for name, got in zip(("dx", "du", "ds", "dv"), found, strict=True):
        check(name, got, wish, dtype)


# -- numbers ---------------------------------------------------------------------------------------------------------


@every_dtype
@every_rows
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_leading_dimensions(backend, rows, bias, dtype):
    check_case(backend, sorsa_case(rows, dtype=dtype, bias=bias))


@every_dtype
@pytest.mark.parametrize("k, d, r", SIZES)
def test_any_sizes(backend, k, d, r, dtype):
    check_case(backend, sorsa_case((11,), k, d, r, dtype))


@every_dtype
def test_more_rows_than_one_block(backend, dtype):
    check_case(backend, sorsa_case((3, 400), 8, 9, 4, dtype))


@every_dtype
@every_rows
def test_the_branch_alone(backend, rows, dtype):
    check_case(backend, replace(sorsa_case(rows, dtype=dtype, bias=False), weight=None))


@every_dtype
def test_no_features(backend, dtype):
    for k, d in [(0, 5), (5, 0), (0, 0)]:
        c = sorsa_case((3,), max(k, 1), max(d, 1), 1, dtype)
        c = replace(c, x=c.x[:, :k], weight=c.weight[:d, :k], bias=c.bias[:d])
        check_case(backend, replace(c, U0=c.U0[:d], V0=c.V0[:k], u=c.u[:d], v=c.v[:k]))


@every_dtype
def test_any_layout(backend, dtype):
    case = sorsa_case((4, 6), dtype=dtype)

    def strided(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]

    dy = torch.randn(4, 6, 40, dtype=torch.float64).to(dtype)[..., ::2]
    check_case(backend, case.map(strided), dy)
    check_case(backend, replace(case, x=case.x[0, 0].expand(5, 3, 24)), dy[0, 0].expand(5, 3, 20))


@every_dtype
@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_deltas(backend, dtype, delta):
    case = sorsa_case((5,), dtype=dtype)
    check_case(backend, replace(case, u=case.u.to(delta), s=case.s.to(delta), v=case.v.to(delta)))


@every_dtype
def test_only_the_gradients_asked_for(backend, dtype):
    case = sorsa_case((2, 5), dtype=dtype)
    dy = torch.randn(2, 5, 20, dtype=torch.float64).to(dtype)
    _, h = backend.sorsa_linear(*case.arguments)
    rest = case.backward_arguments(h)
    everything = backend.sorsa_linear_backward(dy, *rest, True, True, True, True)
    for i in range(16):
        need = [bool(i >> bit & 1) for bit in range(4)]
        x, h_kept = rest[0] if need[3] else None, h if need[1] or need[2] else None
        found = backend.sorsa_linear_backward(dy, x, h_kept, *rest[2:], *need)
        for asked, got, wish in zip(need, found, everything, strict=True):
            assert torch.equal(got, wish) if asked else got.shape == (0,)


@exact_dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("k, d, r", [(1, 1, 1), (24, 20, 6), (33, 77, 5), (576, 192, 64)])
def test_zero_deltas_are_the_base_bit_for_bit(k, d, r, bias, dtype):
    """Whatever was rounded in U0 and V0: nothing large is subtracted."""
    case = sorsa_case((1,), k, d, r, dtype, bias=bias, step=0.0)
    for rows in [(1,), (5,), (64,), (1, 7), (2, 1, 4), ()]:
        x = torch.randn(*rows, k, dtype=torch.float64).to(dtype)
        y = sorsa.sorsa_linear(*replace(case, x=x).arguments)
        assert torch.equal(y, torch_linear(x, case.weight, case.bias)), rows


@pytest.mark.parametrize("step", [1e-4, 1e-3, 1e-2])
def test_small_steps_survive_in_bfloat16(backend, step):
    """A difference of two products in bfloat16 would be its rounding alone at 1e-4; so would a bfloat16 U = U0 + u."""
    case = replace(sorsa_case((64,), 96, 80, 24, torch.bfloat16, bias=False, step=step), weight=None)
    wish = expected(case)[0]["y"]

    def error(c: Sorsa) -> float:
        return float((backend.sorsa_linear(*c.arguments)[0].double() - wish).norm() / wish.norm())

    # roundings of A, B, v, h and y, each at most 2⁻⁹ and on average half of it; the deltas' own on top
    assert error(case) < 6e-3
    assert error(replace(case, u=case.u.bfloat16(), s=case.s.bfloat16(), v=case.v.bfloat16())) < 8e-3
    U, S, V = (t.bfloat16() for t in triplets(*case.arguments[3:]))
    naive = ((case.x @ V) * S.bfloat16()) @ U.t() - ((case.x @ case.V0) * case.S0.bfloat16()) @ case.U0.t()
    assert float((naive.double() - wish).norm() / wish.norm()) > 4 * error(case), "else the delta form brings nothing"


def test_ds_agrees_with_du(backend):
    """<S, dS> = <U, dU>, and = <V, dV>: (c U, S / c) is the same function, and so is (c V, S / c)."""
    case = sorsa_case((9,), dtype=torch.float64)
    _, h = backend.sorsa_linear(*case.arguments)
    dy = torch.randn(9, 20, dtype=torch.float64)
    _, du, ds, dv = backend.sorsa_linear_backward(dy, *case.backward_arguments(h), True, True, True, True)
    U, S, V = triplets(*case.arguments[3:])
    torch.testing.assert_close(S * ds, (U * du).sum(0))
    torch.testing.assert_close(S * ds, (V * dv).sum(0))


# -- autograd --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3)], ids=str)
def test_every_gradient(rows, dtype):
    case = sorsa_case(rows, dtype=dtype).trainable(*TRAINED)
    dy = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    sorsa.sorsa_linear(*case.arguments).backward(dy)
    wish = expected(case, dy)
    for name, key in GRADIENTS.items():
        check(key, getattr(case, name).grad, wish, dtype, getattr(case, name).dtype)


@pytest.mark.parametrize("rows", [(3,), (), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "function", [sorsa.sorsa_linear, lambda *a: torch.ops.osora.sorsa_linear(*a)[0]], ids=["function", "raw"]
)
def test_gradcheck(function, rows):
    case = sorsa_case(rows, 5, 4, 3, torch.float64).trainable(*TRAINED)
    torch.autograd.gradcheck(function, case.arguments)
    branch = replace(case, weight=None, bias=None)
    torch.autograd.gradcheck(function, branch.arguments)


@pytest.mark.parametrize("name", TRAINED)
def test_one_gradient_alone(name):
    case = sorsa_case((2, 5), dtype=torch.float64)
    everything, alone = case.trainable(*TRAINED), case.trainable(name)
    dy = torch.randn(2, 5, 20, dtype=torch.float64)
    for each in (everything, alone):
        sorsa.sorsa_linear(*each.arguments).backward(dy)
    assert torch.equal(getattr(alone, name).grad, getattr(everything, name).grad)


@pytest.mark.parametrize("function", [sorsa.sorsa_linear, lambda *a: torch.ops.osora.sorsa_linear(*a)[0]])
@pytest.mark.parametrize(
    "trained, wish",
    [
        (("u", "s", "v"), ["h", "x"]),
        (("u", "s"), ["h"]),
        (("s",), ["h"]),
        (("v",), ["x"]),
        (("x",), []),
        (("x", "u", "s", "v"), ["h", "x"]),
    ],
    ids=str,
)
def test_what_is_saved(function, trained, wish):
    """h [n, r] for u and s, x [n, k] for v, and the parameters."""
    case = sorsa_case((3, 5), dtype=torch.bfloat16).trainable(*trained)
    with saved_tensors(*(t for t in case.arguments if t is not case.x)) as kept:
        y = function(*case.arguments)
    shapes = {"h": (15, 6), "x": (3, 5, 24)}
    assert sorted(tuple(t.shape) for t in kept) == sorted(shapes[name] for name in wish)
    assert all(t.untyped_storage().nbytes() == t.numel() * 2 for t in kept), "no view of something larger"
    y.sum().backward()


def test_no_dense_product_is_made():
    """Forward and backward allocate nothing of the weight's size."""
    case = sorsa_case((5,), 300, 200, 4).trainable(*TRAINED)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sorsa.sorsa_linear(*case.arguments).sum().backward()
    assert max(e.self_cpu_memory_usage for e in profile.events()) < 300 * 200 * 4


@pytest.mark.parametrize("name", ["weight", "U0", "S0", "V0"])
def test_a_gradient_of_a_frozen_tensor_is_refused(name):
    case = sorsa_case((3,)).trainable(name, "s")
    for function in (sorsa.sorsa_linear, torch.ops.osora.sorsa_linear):
        with pytest.raises(RuntimeError, match=rf"{name} requires a gradient, but .*{name}\.requires_grad_\(False\)"):
            function(*case.arguments)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", ["x", "u", "s", "v"])
def test_double_backward_is_refused(name):
    case = sorsa_case((3,), dtype=torch.float64).trainable(name)
    for function in (sorsa.sorsa_linear, lambda *a: torch.ops.osora.sorsa_linear(*a)[0]):
        loss = function(*case.arguments).square().sum()
        (gradient,) = torch.autograd.grad(loss, getattr(case, name), create_graph=True)
        with pytest.raises(RuntimeError, match=r"osora::sorsa_linear_backward has no derivative .*double backward"):
            gradient.square().sum().backward()


def test_an_orthonormality_penalty_reaches_the_deltas():
    case = sorsa_case((3,)).trainable("u", "s", "v")
    U, S, V = triplets(*case.arguments[3:])
    assert U.shape == (20, 6) and S.shape == (6,) and V.shape == (24, 6) and U.dtype == torch.float32
    ((U.t() @ U - torch.eye(6)).square().sum() + (V.t() @ V - torch.eye(6)).square().sum()).backward()
    U = (case.U0 + case.u).detach()
    torch.testing.assert_close(case.u.grad, 4 * U @ (U.t() @ U - torch.eye(6)))
    assert case.s.grad is None and case.v.grad is not None


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing(reentrant):
    gradients = []
    for use in (False, True):
        torch.manual_seed(3)
        case = sorsa_case((6,)).trainable("x", "u", "s", "v")

        def block(*arguments: Tensor) -> Tensor:
            return sorsa.sorsa_linear(*arguments).tanh()

        y = checkpoint(block, *case.arguments, use_reentrant=reentrant) if use else block(*case.arguments)
        y.square().sum().backward()
        gradients.append([getattr(case, n).grad for n in ("x", "u", "s", "v")])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# -- autocast, compile, registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(start):
    case = sorsa_case((5,), dtype=start).trainable(*TRAINED)
    with torch.autocast("cpu", torch.bfloat16):
        y = sorsa.sorsa_linear(*case.arguments)
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    value, size = expected(case, torch.ones(5, 20))
    for name, key in GRADIENTS.items():
        gradient = getattr(case, name).grad
        assert gradient.dtype == getattr(case, name).dtype
        assert (gradient.double() - value[key]).norm() < 2e-2 * size[key].norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert sorsa.sorsa_linear(*sorsa_case((3,), dtype=torch.float64).arguments).dtype == torch.float64


def test_autocast_keeps_small_deltas():
    """u, s and v of 1e-4 arrive to bfloat16's own relative error."""
    case = replace(sorsa_case((64,), 48, 40, 12, bias=False, step=1e-4), weight=None)
    with torch.autocast("cpu", torch.bfloat16):
        y = sorsa.sorsa_linear(*case.arguments)
    wish = expected(case)[0]["y"]
    assert (y.double() - wish).norm() < 1e-2 * wish.norm()


@from_dynamo
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_dynamic_number_of_rows(compiler):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(compiler)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.nn.functional.silu(sorsa.sorsa_linear(x, *rest)) * 2

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    for n in (6, 9, 17):
        case = sorsa_case((n,), 16, 12, 4).trainable(*TRAINED)
        plain = case.map(lambda t: t.detach().clone()).trainable(*TRAINED)
        torch._dynamo.mark_dynamic(case.x, 0)
        compiled(*case.arguments).sum().backward()
        block(*plain.arguments).sum().backward()
        for name in TRAINED:
            torch.testing.assert_close(getattr(case, name).grad, getattr(plain, name).grad)
    assert frames.frame_count == 1, "compiled once for all n"
    torch._dynamo.reset()


# opcheck of torch 2.14 itself looks at .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    case = sorsa_case((2, 3), 8, 7, 3)
    trained = case.trainable(*TRAINED)
    branch = replace(trained, weight=None, bias=None)
    only_s = case.trainable("s")
    for each in (trained, branch, only_s):
        torch.library.opcheck(torch.ops.osora.sorsa_linear.default, each.arguments)
    h, dy = torch.randn(6, 3), torch.randn(2, 3, 7)
    for need in [(True, True, True, True), (True, False, False, False), (False, False, True, False)]:
        arguments = case.backward_arguments(h)
        torch.library.opcheck(torch.ops.osora.sorsa_linear_backward.default, (dy, *arguments, *need))


@pytest.mark.parametrize("name", ["sorsa_linear", "sorsa_linear_backward", "linear_add_"])
def test_there_is_a_cuda_kernel(name):
    """The compiled one, or plain torch where osora was built without CUDA."""
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"osora::{name}", key)


def test_the_meta_device():
    y = sorsa.sorsa_linear(*sorsa_case((2, 3)).map(lambda t: t.to("meta")).arguments)
    assert y.is_meta and y.shape == (2, 3, 20)
    with pytest.raises(RuntimeError, match="one device"):
        case = sorsa_case((3,))
        sorsa.sorsa_linear(*replace(case, V0=case.V0.to("meta")).arguments)


WRONG = {
    "x": (torch.randn(3, 23), "x must be in_features = 24"),
    "weight": (torch.randn(24, 20), r"weight must be .*\[20, 24\]"),
    "bias": (torch.randn(19), r"bias must be \[out_features\] = \[20\]"),
    "U0": (torch.randn(20), r"U0 must be \[out_features, rank\]"),
    "V0": (torch.randn(24, 5), r"V0 must be \[in_features, rank\] with rank 6"),
    "S0": (torch.randn(6).bfloat16(), "S0 must be Float"),
    "u": (torch.randn(20, 5), r"u must be \[20, 6\]"),
    "s": (torch.randn(6).double(), "s must be Float"),
    "v": (torch.randn(20, 6), r"v must be \[24, 6\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    value, message = WRONG[name]
    with pytest.raises(RuntimeError, match=f"osora::sorsa_linear: .*{message}"):
        sorsa.sorsa_linear(*replace(sorsa_case((3,)), **{name: value}).arguments)


def test_wrong_backward_arguments_are_named():
    case = sorsa_case((3,))
    dy, h = torch.randn(3, 20), torch.randn(3, 6)
    x, _, *rest = case.backward_arguments(h)
    for arguments, message in [
        ((dy[:, :19], x, h), "dy must be out_features = 20"),
        ((dy, x, h[:2]), r"h must be \[n, rank\] = \[3, 6\]"),
        ((dy, x[:2], h), r"x must be dy's shape with in_features at the end, \[3, 24\]"),
        ((dy, None, h), "x is needed for the gradient of v"),
        ((dy, x, None), "h is needed for the gradients of u and s"),
        ((dy, x.double(), h), "x and h must have dy's dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"osora::sorsa_linear_backward: .*{message}"):
            torch.ops.osora.sorsa_linear_backward(*arguments, *rest, *[True] * 4)


def test_osora_brings_it_along():
    assert osora.ops.sorsa is sorsa
