# SPDX-License-Identifier: Apache-2.0
"""osora::linear_effective: one product with W0 + D Vᵀ; its numbers, and that what is kept of it is never old."""

import gc
import weakref

import pytest
import torch
from backends import Backend, make_backend
from composed import from_dynamo
from helpers import TOLERANCE, Linear, expected_linear, linear_case, saved_tensors
from precision import accumulate, assert_within, every_dtype, half_of_least, unit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear as torch_linear
from torch.utils.checkpoint import checkpoint

from osora import ops, reference
from osora.ops import materialised

ROWS = [(), (1,), (7,), (0,), (2, 3), (3, 0), (2, 2, 1, 3)]
GRADIENTS = {"x": "dx", "bias": "dbias", "s": "ds", "o": "do"}


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


def sources(case: Linear) -> tuple[Tensor, ...]:
    return case.weight, case.U, case.V, case.S0, case.s, case.o


def effective(case: Linear, dtype: torch.dtype | None = None) -> Tensor:
    """The W_eff that a call makes: the rows of x are unit vectors."""
    x = torch.eye(case.weight.shape[1], dtype=dtype or case.weight.dtype)
    return materialised.linear_materialised(x, case.weight, None, *sources(case)[1:]).detach().t()


def check_effective(got: Tensor, case: Linear) -> None:
    """float32 sums (their error by the sizes of the terms), rounded once."""
    c = case.double()
    D = c.U * (c.o[:, None] * (c.S0 + c.s) + c.s)
    wish = c.weight + D @ c.V.t()
    size = c.weight.abs() + (c.U.abs() * ((c.o[:, None] * (c.S0 + c.s)).abs() + c.s.abs())) @ c.V.abs().t()
    exact = accumulate(case.weight.dtype)
    once = 0.0 if got.dtype == exact else 1.01 * unit(got.dtype)
    assert_within(got, wish, once * wish.abs() + TOLERANCE[exact] * size + half_of_least(got.dtype))


# -- numbers ---------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_it_is_the_linear_layer(backend, rows, bias, dtype):
    """Beside the roundings of osora::linear there is that of W_eff."""
    case = linear_case(rows, dtype=dtype, bias=bias)
    dy = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    wish = expected_linear(case, dy)
    y, h = backend.linear_effective(*case.arguments, True)
    found = backend.linear_effective_backward(dy, h, *sources(case), True, True, True)
    for name, got in {"y": y, **dict(zip(("dx", "ds", "do"), found, strict=True))}.items():
        assert got.dtype == (accumulate(dtype) if name in ("ds", "do") else dtype)
        allowed = (TOLERANCE[dtype] + unit(dtype)) * wish.size[name] + 256 * half_of_least(dtype)
        assert_within(got, wish.value[name], allowed)


@every_dtype
def test_the_gradients_of_s_and_o_are_those_of_split(dtype):
    """They come from h and dy alone: not a bit differs."""
    case = linear_case((7,), dtype=dtype)
    dy = torch.randn(7, 20).to(dtype)
    _, h = torch.ops.osora.linear(*case.arguments)
    _, ds, do = torch.ops.osora.linear_backward(dy, h, *sources(case), False, True, True)
    _, kept = torch.ops.osora.linear_effective(*case.arguments, True)
    _, ds_too, do_too = torch.ops.osora.linear_effective_backward(dy, kept, *sources(case), False, True, True)
    assert torch.equal(ds, ds_too) and torch.equal(do, do_too) and torch.equal(h, kept)


@every_dtype
@pytest.mark.parametrize("k, d, r", [(1, 1, 1), (24, 20, 6), (300, 33, 17), (5000, 2000, 3)])
def test_the_weight_is_rounded_once(k, d, r, dtype):
    """The last one is summed in two blocks of rows in 16 bits."""
    case = linear_case((1,), k, d, r, dtype, bias=False)
    materialised.refresh(*sources(case))
    (kept,) = materialised.kept_weights(case.weight, case.o)
    check_effective(kept, case)


@every_dtype
def test_zero_deltas_are_the_base_bit_for_bit(dtype):
    """float16 too: the very function of torch on the very weight."""
    case = linear_case((1,), 65, 70, 3, dtype, step=0.0)
    for rows in [(1,), (5,), (64,), (1, 7), ()]:
        x = torch.randn(*rows, 65, dtype=torch.float64).to(dtype)
        y = materialised.linear_materialised(*case.replace(x=x).arguments)
        assert torch.equal(y, torch_linear(x, case.weight, case.bias))


@every_dtype
def test_strided_sources(dtype):
    """Conv1D's transposed weight keeps its layout; a weight inside of a larger one gets a dense W_eff."""
    case = linear_case((3,), dtype=dtype)
    inside = torch.zeros(20, 50, dtype=dtype)
    inside[:, 3:27] = case.weight
    for weight in (case.weight.t().contiguous().t(), inside[:, 3:27]):
        moved = case.replace(weight=weight)
        y = materialised.linear_materialised(*moved.arguments)
        wish = expected_linear(case)
        allowed = (TOLERANCE[dtype] + unit(dtype)) * wish.size["y"] + 256 * half_of_least(dtype)
        assert_within(y, wish.value["y"], allowed)
        (kept,) = materialised.kept_weights(weight, case.o)
        check_effective(kept, moved)
    assert materialised.kept_weights(inside, case.o)[0].is_contiguous()


def test_small_changes_drown_in_bfloat16():
    """Why it is no default: a weight near 1/sqrt(k) has a last digit of 2⁻⁸ of itself, and D Vᵀ is far below it.

    Relative to the adapter's own output, before y is rounded: the share that the rounding of W_eff takes away.
    """
    lost = {}
    for step in (1e-4, 1e-3, 1e-2, 1e-1):
        case = linear_case((64,), 512, 512, 64, torch.bfloat16, bias=False, step=step)
        c = case.double()
        D = c.U * (c.o[:, None] * (c.S0 + c.s) + c.s)
        change = c.x @ (D @ c.V.t()).t()
        kept = effective(case).double()
        lost[step] = float((c.x @ (kept - c.weight).t() - change).norm() / change.norm())
        split = ops.linear(*case.replace(weight=None).arguments).double()
        assert float((split - change).norm() / change.norm()) < 6e-3, "the split plan keeps it"
    assert lost[1e-4] > 0.9 and lost[1e-3] > 0.5, lost
    assert lost[1e-1] < 0.1 < lost[1e-4], lost
    assert lost[1e-4] > lost[1e-3] > lost[1e-2] > lost[1e-1]


def test_float32_holds_small_changes():
    case = linear_case((64,), 512, 512, 64, torch.float32, bias=False, step=1e-4)
    c = case.double()
    D = c.U * (c.o[:, None] * (c.S0 + c.s) + c.s)
    change = c.x @ (D @ c.V.t()).t()
    assert float((c.x @ (effective(case).double() - c.weight).t() - change).norm() / change.norm()) < 1e-2


# -- kept, and never old ---------------------------------------------------------------------------------------------


def products(function, *arguments) -> int:
    """How many weights were made: each takes one product of D and Vᵀ."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments)
    return sum(e.name == "osora::fold" or e.name == "aten::addmm_" for e in profile.events())


def test_it_is_made_once_for_micro_batches_and_both_directions():
    case = linear_case((5,), bias=False).trainable("x", "s", "o")

    def step() -> None:
        for _ in range(3):
            materialised.linear_materialised(*case.arguments).sum().backward()

    assert products(step) == 1
    (kept,) = materialised.kept_weights(case.weight, case.o)
    address = kept.data_ptr()
    assert products(step) == 0
    with torch.no_grad():
        case.o.add_(0.1)
    assert products(step) == 1
    (kept,) = materialised.kept_weights(case.weight, case.o)
    assert kept.data_ptr() == address, "the storage is used again"
    check_effective(kept, case.map(Tensor.detach))


@every_dtype
@pytest.mark.parametrize("name", ["weight", "U", "V", "S0", "s", "o"])
@pytest.mark.parametrize("how", ["in place", "another tensor", "part of it", "through a view", "another storage"])
def test_every_change_of_a_source_is_seen(how, name, dtype):
    case = linear_case((3,), dtype=dtype, bias=False)
    materialised.linear_materialised(*case.arguments)
    source = getattr(case, name)
    if how == "in place":
        source.mul_(1.5)
    elif how == "another tensor":
        case = case.replace(**{name: source * 1.5})
    elif how == "part of it":
        source[-1] = 0.25
    elif how == "through a view":
        source.detach().flatten()[0] = 0.25
    else:
        source.data = source.data * 1.5
    check_effective(effective(case), case)


@pytest.mark.parametrize("name", ["weight", "U", "V", "S0", "s", "o"])
def test_a_new_tensor_at_an_old_address_is_not_the_old_one(name):
    """Allocators give freed memory away at once, and a fresh tensor's version is a fresh tensor's."""
    case = linear_case((3,), bias=False)
    memory = getattr(case, name).clone().numpy()  # which two tensors have one after the other
    for value in (0.5, 1.5):
        memory.fill(value)
        tensor = torch.from_numpy(memory)
        assert tensor._version == 0 and tensor.data_ptr() == memory.ctypes.data
        changed = case.replace(**{name: tensor})
        check_effective(effective(changed), changed)
        del tensor, changed


def test_versions_that_meet_again():
    """Two os in turn, at the same version: what was kept of one is not taken for the other's."""
    case, both = linear_case((3,), bias=False), (torch.randn(20), torch.randn(20))
    for o in both * 2:
        check_effective(effective(case.replace(o=o)), case.replace(o=o))
    assert [len(materialised.kept_weights(case.weight, o)) for o in both] == [1, 1]


def test_optimisers_are_seen():
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        for options in ({}, {"foreach": True}):  # fused ones do not count: test_execution.py
            case = linear_case((5,), bias=False).trainable("s", "o")
            optimizer = kind([case.s, case.o], lr=0.1, **options)
            for _ in range(2):
                optimizer.zero_grad()
                materialised.linear_materialised(*case.arguments).square().sum().backward()
                optimizer.step()
                check_effective(effective(case), case.map(Tensor.detach))


def test_a_write_that_torch_does_not_count_needs_refresh():
    case = linear_case((3,), bias=False)
    before = effective(case)
    (kept,) = materialised.kept_weights(case.weight, case.o)
    case.o.data.fill_(3.0)
    assert torch.equal(effective(case), before), "as torch itself: the version did not move"
    materialised.refresh(*sources(case))
    (again,) = materialised.kept_weights(case.weight, case.o)
    assert again.data_ptr() == kept.data_ptr()
    check_effective(effective(case), case)


def test_it_goes_with_its_weight():
    case = linear_case((3,), bias=False)
    materialised.linear_materialised(*case.arguments)
    (kept,) = materialised.kept_weights(case.weight, case.o)
    gone = weakref.ref(kept.untyped_storage())
    materialised.drop(case.weight, case.o)
    assert materialised.kept_weights(case.weight, case.o) == []
    del kept
    gc.collect()
    assert gone() is None
    # and at the latest when another one is made, once its weight or o is gone
    o = case.o.clone()
    materialised.linear_materialised(*case.replace(o=o).arguments)
    gone = weakref.ref(materialised.kept_weights(case.weight, o)[0].untyped_storage())
    del o
    materialised.linear_materialised(*linear_case((3,), bias=False).arguments)
    gc.collect()
    assert gone() is None


def test_a_dtype_of_x_has_a_weight_of_its_own():
    case = linear_case((3,), bias=False)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        check_effective(effective(case, dtype), case)
    assert [t.dtype for t in materialised.kept_weights(case.weight, case.o)] == dtypes
    case.o.data.fill_(2.0)
    materialised.refresh(*sources(case))
    for kept in materialised.kept_weights(case.weight, case.o):
        check_effective(kept, case)


def test_inference_mode_and_out_of_it():
    case = linear_case((3,), bias=False)
    with torch.inference_mode():
        check_effective(effective(case), case)
        inside = case.replace(o=torch.randn(20))
        for _ in range(2):
            check_effective(effective(inside), inside)
            inside.o.add_(1.0)  # nobody counts this: it is made in each call
    case.o.add_(1.0)
    check_effective(effective(case), case)
    materialised.linear_materialised(*case.trainable("s", "x").arguments).sum().backward()


# -- autograd --------------------------------------------------------------------------------------------------------


def test_gradcheck():
    for rows in [(3,), (), (2, 2)]:
        case = linear_case(rows, 5, 4, 3, torch.float64).trainable(*GRADIENTS)
        for function in (
            materialised.linear_materialised,
            lambda *arguments: torch.ops.osora.linear_effective(*arguments, True)[0],
        ):
            # gradcheck moves its arguments through .data, which nobody counts: hand over tensors of this call

            def fresh(*arguments: Tensor, function=function) -> Tensor:
                *first, s, o = arguments
                return function(*first, s * 1, o * 1)

            torch.autograd.gradcheck(fresh, case.arguments)


@every_dtype
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3)], ids=str)
def test_every_gradient(rows, dtype):
    case = linear_case(rows, dtype=dtype).trainable(*GRADIENTS)
    dy = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    materialised.linear_materialised(*case.arguments).backward(dy)
    wish = expected_linear(case, dy)
    for name, key in GRADIENTS.items():
        gradient = getattr(case, name).grad
        assert gradient.dtype == getattr(case, name).dtype
        assert_within(gradient, wish.value[key], (TOLERANCE[dtype] + unit(dtype)) * wish.size[key] + 1e-7)


@pytest.mark.parametrize("trained", [("x", "s", "o"), ("s", "o"), ("x",)], ids=str)
@every_dtype
def test_h_alone_is_saved(trained, dtype):
    case = linear_case((3, 5), dtype=dtype).trainable(*trained)
    kept_weight = effective(case).untyped_storage()
    with saved_tensors(*(t for t in case.arguments if t is not case.x)) as kept:
        y = materialised.linear_materialised(*case.arguments)
    assert [tuple(t.shape) for t in kept] == ([] if trained == ("x",) else [(15, 6)])
    assert kept_weight.data_ptr() not in [t.untyped_storage().data_ptr() for t in kept]
    y.sum().backward()


def test_nothing_but_y_is_computed_in_inference():
    case = linear_case((5,), bias=False)
    materialised.linear_materialised(*case.arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        materialised.linear_materialised(*case.arguments)
    assert sum(e.name in ("aten::mm", "aten::addmm", "aten::addmm_") for e in profile.events()) == 1


@pytest.mark.parametrize("name", ["s", "o"])
def test_a_change_between_forward_and_backward_is_an_error(name):
    """As under the split plan. Gradients of neither the old nor the new weight would be right for both factors."""
    case = linear_case((5,)).trainable("x", "s", "o")
    y = materialised.linear_materialised(*case.arguments)
    with torch.no_grad():
        getattr(case, name).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_another_adapter_between_forward_and_backward_is_none():
    """One weight, two os that take turns: each backward has its own."""
    case = linear_case((5,), dtype=torch.float64).trainable("x", "s", "o")
    other = case.replace(o=torch.randn(20, dtype=torch.float64))
    dy = torch.randn(5, 20, dtype=torch.float64)
    y = materialised.linear_materialised(*case.arguments)
    materialised.linear_materialised(*other.arguments)
    materialised.drop(case.weight, case.o)  # even where nothing is kept any more
    y.backward(dy)
    torch.testing.assert_close(case.x.grad, expected_linear(case, dy).value["dx"])


@pytest.mark.parametrize("name", ["weight", "U", "V", "S0"])
def test_a_gradient_of_a_frozen_tensor_is_refused(name):
    case = linear_case((3,)).trainable(name, "s")
    with pytest.raises(RuntimeError, match=f"osora::linear_effective: {name} requires a gradient"):
        materialised.linear_materialised(*case.arguments)


def test_need_h_is_not_forgotten():
    case = linear_case((3,)).trainable("s")
    with pytest.raises(RuntimeError, match="need_h must be true"):
        torch.ops.osora.linear_effective(*case.arguments, False)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", ["x", "s", "o"])
def test_double_backward_is_refused(name):
    case = linear_case((3,), dtype=torch.float64).trainable(name)
    loss = materialised.linear_materialised(*case.arguments).square().sum()
    (gradient,) = torch.autograd.grad(loss, getattr(case, name), create_graph=True)
    with pytest.raises(RuntimeError, match=r"osora::linear_effective_backward has no derivative .*double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing(reentrant, autocast):
    gradients = []
    for use in (False, True):
        torch.manual_seed(3)
        case = linear_case((6,)).trainable("x", "s", "o")

        def block(*arguments: Tensor) -> Tensor:
            return materialised.linear_materialised(*arguments).tanh()

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(block, *case.arguments, use_reentrant=reentrant) if use else block(*case.arguments)
        y.float().square().sum().backward()
        gradients.append([case.x.grad, case.s.grad, case.o.grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# -- autocast, compile, registration ---------------------------------------------------------------------------------


def test_autocast_rounds_the_weight_once():
    """From float32 straight to the autocast dtype; s, o and their gradients stay float32, h is 16-bit."""
    case = linear_case((15,)).trainable(*GRADIENTS)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors(*case.arguments) as saved:
        y = materialised.linear_materialised(*case.arguments)
    assert y.dtype == torch.bfloat16 and sum(t.untyped_storage().nbytes() for t in saved) == 15 * 6 * 2
    (kept,) = materialised.kept_weights(case.weight, case.o)
    assert kept.dtype == torch.bfloat16
    check_effective(kept, case.map(Tensor.detach))
    y.sum().backward()
    wish = expected_linear(case, torch.ones(15, 20))
    for name, key in GRADIENTS.items():
        gradient = getattr(case, name).grad
        assert gradient.dtype == torch.float32
        assert (gradient.double() - wish.value[key]).norm() < 2e-2 * wish.size[key].norm()


@from_dynamo
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_sees_every_change(compiler):
    """One graph for all n, and no weight of an earlier step in it."""
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(compiler)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.nn.functional.silu(materialised.linear_materialised(x, *rest)) * 2

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    case = linear_case((1,), 16, 12, 4).trainable(*GRADIENTS)
    for n in (6, 9, 17):
        x = torch.randn(n, 16)
        here, plain = case.replace(x=x.requires_grad_()), case.replace(x=x.detach().requires_grad_())
        plain = plain.map(lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        torch._dynamo.mark_dynamic(here.x, 0)
        got, wish = compiled(*here.arguments), block(*plain.arguments)
        torch.testing.assert_close(got, wish)
        got.sum().backward()
        wish.sum().backward()
        for name in GRADIENTS:
            torch.testing.assert_close(getattr(here, name).grad, getattr(plain, name).grad)
            getattr(here, name).grad = None
        with torch.no_grad():
            case.o.add_(0.5)
            case.s.mul_(1.5)
    assert frames.frame_count == 1, "compiled once for all n and all steps"
    torch._dynamo.reset()


# opcheck of torch 2.14 itself looks at .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    case = linear_case((2, 3), 8, 7, 3)
    for arguments in [
        (*case.trainable(*GRADIENTS).arguments, True),
        (*case.replace(bias=None).arguments, False),
    ]:
        torch.library.opcheck(torch.ops.osora.linear_effective.default, arguments)
    dy, h = torch.randn(2, 3, 7), torch.randn(6, 3)
    for need in [(True, True, True), (True, False, False), (False, True, False)]:
        torch.library.opcheck(torch.ops.osora.linear_effective_backward.default, (dy, h, *sources(case), *need))


@pytest.mark.parametrize("name", ["linear_effective", "linear_effective_backward", "effective_refresh"])
def test_there_is_a_cuda_kernel(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"osora::{name}", key)


def test_the_meta_device():
    case = linear_case((2, 3)).map(lambda t: t.to("meta"))
    assert materialised.linear_materialised(*case.arguments).shape == (2, 3, 20)
    assert materialised.kept_weights(case.weight, case.o) == []


WRONG = {
    "x": [(torch.randn(3, 23), "x must be in_features = 24"), (torch.randn(3, 24).double(), "weight's dtype Float")],
    "weight": [(torch.randn(24, 20), r"weight must be .*\[20, 24\]")],
    "bias": [(torch.randn(19), r"bias must be \[out_features\] = \[20\]"), (torch.randn(20).half(), "bias must have")],
    "V": [(torch.randn(24, 5), r"V must be \[in_features, rank\] with rank 6")],
    "S0": [(torch.randn(6).bfloat16(), "S0 must be Float")],
    "o": [(torch.randn(6), r"o must be \[out_features\] = \[20\]")],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    for value, message in WRONG[name]:
        with pytest.raises(RuntimeError, match=f"osora::linear_effective: .*{message}"):
            materialised.linear_materialised(*linear_case((3,)).replace(**{name: value}).arguments)


def test_the_reference_makes_the_same_weight():
    case = linear_case((3,), dtype=torch.bfloat16)
    check_effective(reference.effective_weight(*sources(case)), case)
