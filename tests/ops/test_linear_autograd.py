# SPDX-License-Identifier: Apache-2.0
"""osora.ops.linear inside torch: derivatives, what is saved, compile, autocast, checkpointing, and every error."""

import warnings

import pytest
import torch
from composed import from_dynamo
from helpers import TOLERANCE, Linear, expected_linear, linear_case, move_adapter, saved_tensors, tiny_llama, token_ids
from precision import assert_within, every_dtype
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import osora
from osora import ops, reference
from osora.ops import common

TRAINED = ("x", "bias", "s", "o")
GRADIENTS = {"x": "dx", "bias": "dbias", "s": "ds", "o": "do"}


# -- derivatives -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3)], ids=str)
def test_every_gradient(rows, dtype):
    case = linear_case(rows, dtype=dtype).trainable(*TRAINED)
    dy = torch.randn(*rows, 20, dtype=torch.float64).to(dtype)
    ops.linear(*case.arguments).backward(dy)
    wish = expected_linear(case, dy)
    for name, key in GRADIENTS.items():
        gradient = getattr(case, name).grad
        assert gradient.dtype == getattr(case, name).dtype
        assert_within(gradient, wish.value[key], TOLERANCE[dtype] * wish.size[key] + 1e-7)


@pytest.mark.parametrize("name", TRAINED)
def test_one_gradient_alone(name):
    case = linear_case((2, 5), dtype=torch.float64)
    everything, alone = case.trainable(*TRAINED), case.trainable(name)
    dy = torch.randn(2, 5, 20, dtype=torch.float64)
    for each in (everything, alone):
        ops.linear(*each.arguments).backward(dy)
    assert torch.equal(getattr(alone, name).grad, getattr(everything, name).grad)
    assert all(t is None or t.grad is None for t in alone.arguments if t is not getattr(alone, name))


def test_a_sum_gives_an_expanded_gradient():
    case = linear_case((2, 5), dtype=torch.float64).trainable(*TRAINED)
    ops.linear(*case.arguments).sum().backward()
    wish = expected_linear(case, torch.ones(2, 5, 20))
    for name, key in GRADIENTS.items():
        torch.testing.assert_close(getattr(case, name).grad, wish.value[key])


@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_deltas_get_16_bit_gradients(delta):
    case = linear_case((5,))
    case = case.replace(s=case.s.to(delta), o=case.o.to(delta)).trainable("s", "o")
    ops.linear(*case.arguments).sum().backward()
    assert case.s.grad.dtype == case.o.grad.dtype == delta


@pytest.mark.parametrize("rows", [(3,), (), (2, 2)], ids=str)
@pytest.mark.parametrize("function", [ops.linear, lambda *a: torch.ops.osora.linear(*a)[0]], ids=["function", "raw"])
def test_gradcheck(function, rows):
    case = linear_case(rows, 5, 4, 3, torch.float64).trainable(*TRAINED)
    torch.autograd.gradcheck(function, case.arguments)
    branch = case.replace(weight=None, bias=None)
    torch.autograd.gradcheck(function, branch.arguments)


def test_gradcheck_of_fold():
    case = linear_case((1,), 5, 4, 3, torch.float64).trainable("s", "o")
    torch.autograd.gradcheck(ops.fold, (case.U, case.S0, case.s, case.o))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", ["x", "s", "o"])
def test_double_backward_is_refused(name):
    """Not a silent zero: a gradient penalty through it would train something else."""
    case = linear_case((3,), dtype=torch.float64).trainable(name)
    for function in (ops.linear, lambda *a: torch.ops.osora.linear(*a)[0]):
        loss = function(*case.arguments).square().sum()
        (gradient,) = torch.autograd.grad(loss, getattr(case, name), create_graph=True)
        with pytest.raises(RuntimeError, match=r"osora::linear_backward has no derivative .*double backward"):
            gradient.square().sum().backward()
    s = case.s.detach().requires_grad_()
    loss = ops.fold(case.U, case.S0, s, case.o.detach()).square().sum()
    (gradient,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["weight", "U", "V", "S0"])
def test_a_gradient_of_a_frozen_tensor_is_refused(name):
    case = linear_case((3,)).trainable(name, "s")
    with pytest.raises(RuntimeError, match=rf"{name} requires a gradient, but .*{name}\.requires_grad_\(False\)"):
        ops.linear(*case.arguments)
    with pytest.raises(RuntimeError, match=rf"{name} requires a gradient"):
        torch.ops.osora.linear(*case.arguments)
    with torch.no_grad():
        ops.linear(*case.arguments)


# -- memory ----------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("train_x", [True, False])
def test_h_alone_is_saved(train_x, dtype):
    n, r = 15, 6
    case = linear_case((3, 5), r=r, dtype=dtype).trainable("s", "o", *(["x"] if train_x else []))
    with saved_tensors(*(t for t in case.arguments if t is not case.x)) as kept:
        y = ops.linear(*case.arguments)
    assert [tuple(t.shape) for t in kept] == [(n, r)]
    assert sum(t.untyped_storage().nbytes() for t in kept) == n * r * dtype.itemsize
    y.sum().backward()


def test_h_alone_is_saved_under_autocast():
    """Not the weight's 16-bit copy: it is larger than everything the adapter trains."""
    case = linear_case((15,)).trainable("x", "s", "o")
    with torch.autocast("cpu", torch.bfloat16), saved_tensors(*case.arguments) as kept:
        y = ops.linear(*case.arguments)
    y.sum().backward()
    assert sum(t.untyped_storage().nbytes() for t in kept) == 15 * 6 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_saves_n_r_a_layer(dtype):
    """Against the same model with its linears frozen: n·r·itemsize more a layer, and nothing else."""
    ids = token_ids(2, 9)

    def saved(model: torch.nn.Module) -> int:
        with saved_tensors(*model.parameters(), *model.buffers()) as kept:
            model(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits.sum().backward()
        return sum(t.untyped_storage().nbytes() for t in kept)

    model = tiny_llama(dtype=dtype).requires_grad_(False)
    base = saved(model)
    move_adapter(osora.attach(model, osora.OsoraConfig(r=5)))
    assert saved(model) - base == 14 * 18 * 5 * dtype.itemsize


# -- registration ----------------------------------------------------------------------------------------------------


def operator_cases() -> dict[str, tuple]:
    case = linear_case((2, 3), 8, 7, 3).trainable("x", "bias", "s", "o")
    frozen = (case.weight, case.U, case.V, case.S0, case.s.detach(), case.o.detach())
    dy, h = torch.randn(2, 3, 7), torch.randn(6, 3)
    factors = (case.U, case.S0, case.s, case.o)
    return {
        "fold": [factors],
        "fold_backward": [
            (case.U, torch.randn(7, 3), case.S0, case.s.detach(), case.o.detach(), *need)
            for need in [(True, True), (True, False), (False, True)]
        ],
        "linear": [case.arguments, case.replace(weight=None, bias=None).arguments],
        "down": [(case.x.detach(), case.V)],
        "up": [
            (case.x.detach(), h, *rest, case.U, case.S0, case.s.detach(), case.o.detach())
            for rest in [(case.weight, case.bias.detach()), (None, None)]
        ],
        "linear_backward": [(dy, h, *frozen, *need) for need in [(True, True, True), (True, False, False)]],
        "truncated_svd": [
            ([torch.randn(9, 6), torch.randn(9, 6)], 2, 1e-3, 0, [1, 2], method) for method in ("auto", "gram", "full")
        ],
    }


# opcheck of torch 2.14 itself looks at .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["fold", "fold_backward", "linear", "down", "up", "linear_backward", "truncated_svd"])
def test_opcheck(name):
    """Schema, fake kernel, autograd registration, and the trace of AOTAutograd with dynamic shapes."""
    for arguments in operator_cases()[name]:
        torch.library.opcheck(getattr(torch.ops.osora, name).default, arguments)


# -- compile ---------------------------------------------------------------------------------------------------------


# Dynamo and inductor use what torch itself deprecates: an instance of an autograd.Function, torch.jit.script_method.


def compiled_case(n: int) -> Linear:
    return linear_case((n,), 16, 12, 4).trainable("x", "bias", "s", "o")


@from_dynamo
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_dynamic_number_of_rows(compiler):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(compiler)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.nn.functional.silu(ops.linear(x, *rest)) * 2

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    for n in (6, 9, 17):
        case, plain = compiled_case(n), compiled_case(n)
        for a, b in zip(case.arguments, plain.arguments, strict=True):
            b.data = a.data
        torch._dynamo.mark_dynamic(case.x, 0)
        compiled(*case.arguments).sum().backward()
        block(*plain.arguments).sum().backward()
        for name in TRAINED:
            torch.testing.assert_close(getattr(case, name).grad, getattr(plain, name).grad)
    assert frames.frame_count == 1, "compiled once for all n"
    torch._dynamo.reset()


@from_dynamo
def test_compile_a_model():
    torch._dynamo.reset()
    model = move_adapter(osora.attach(tiny_llama(layers=1), osora.OsoraConfig(r=4)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = token_ids()

    def gradients(function: torch.nn.Module) -> list[Tensor]:
        model.zero_grad()
        function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in osora.adapter_parameters(model)]

    for got, wish in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(got, wish)
    torch._dynamo.reset()


# -- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_casts_x_and_never_the_deltas():
    """A change of 1e-4 would be lost in a bfloat16 O = 1 + o; here it arrives to bfloat16's own relative error."""
    case = linear_case((64,), 48, 40, 12, step=0.0, bias=False)
    case = case.replace(o=torch.full((40,), 1e-4)).trainable("x", "s", "o").replace(weight=None)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(*case.arguments)
    assert y.dtype == torch.bfloat16
    wish = expected_linear(case).value["y"]
    assert (y.double() - wish).norm() < 1e-2 * wish.norm()
    y.sum().backward()
    assert case.x.grad.dtype == case.s.grad.dtype == case.o.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "start", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_autocast_takes_any_dtype(start):
    case = linear_case((5,), dtype=start).trainable("x", "bias", "s", "o")
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(*case.arguments)
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert case.x.grad.dtype == case.bias.grad.dtype == start
    wish = expected_linear(case, torch.ones(5, 20))
    for name, key in GRADIENTS.items():
        gradient = getattr(case, name).grad.double()
        assert (gradient - wish.value[key]).norm() < 2e-2 * wish.size[key].norm()


def test_autocast_leaves_float64_and_disabled_regions_alone():
    double, single = linear_case((3,), dtype=torch.float64), linear_case((3,))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(*double.arguments).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert ops.linear(*single.arguments).dtype == torch.float32


def test_autocast_around_forward_and_backward():
    """Some wrap the backward as well. The sums of ds and do must stay float32."""
    case, plain = (linear_case((700,), 16, 12, 4).trainable("x", "s", "o") for _ in range(2))
    for a, b in zip(case.arguments, plain.arguments, strict=True):
        b.data = a.data
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear(*case.arguments).sum().backward()
        y = ops.linear(*plain.arguments)
    y.sum().backward()
    for name in ("x", "s", "o"):
        assert torch.equal(getattr(case, name).grad, getattr(plain, name).grad)


# -- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing(reentrant, autocast):
    gradients = []
    for use in (False, True):
        torch.manual_seed(3)
        case = linear_case((6,), dtype=torch.float32).trainable("x", "s", "o")

        def block(*arguments: Tensor) -> Tensor:
            return ops.linear(*arguments).tanh()

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = checkpoint(block, *case.arguments, use_reentrant=reentrant) if use else block(*case.arguments)
        y.float().square().sum().backward()
        gradients.append([case.x.grad, case.s.grad, case.o.grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # the only name in older versions
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_gradient_checkpointing_of_a_model(reentrant):
    ids, gradients = token_ids(), []
    for use in (False, True):
        torch.manual_seed(3)
        model = move_adapter(osora.attach(tiny_llama(), osora.OsoraConfig(r=4))).train()
        if use:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in osora.adapter_parameters(model)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# -- wrong calls -----------------------------------------------------------------------------------------------------

WRONG = {
    "x": [(torch.randn(3, 23), "x must be in_features = 24"), (torch.tensor(1.0), "x must be in_features")],
    "weight": [(torch.randn(24, 20), r"weight must be .*\[20, 24\]"), (torch.randn(20), "weight must be")],
    "bias": [
        (torch.randn(19), r"bias must be \[out_features\] = \[20\]"),
        (torch.randn(20).half(), "bias must have x's"),
    ],
    "U": [(torch.randn(20), r"U must be \[out_features, rank\]"), (torch.zeros(20, 6).int(), "U must be float64")],
    "V": [(torch.randn(24, 5), r"V must be \[in_features, rank\] with rank 6"), (torch.randn(24), "V must be")],
    "S0": [(torch.randn(5), r"S0 must be \[rank\] = \[6\]"), (torch.randn(6).bfloat16(), "S0 must be Float")],
    "s": [(torch.randn(6, 1), r"s must be \[rank\] = \[6\]"), (torch.randn(6).double(), "s must be Float")],
    "o": [(torch.randn(6), r"o must be \[out_features\] = \[20\]"), (torch.zeros(20).long(), "o must be Float")],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    case = linear_case((3,))
    for value, message in WRONG[name]:
        with pytest.raises(RuntimeError, match=f"osora::linear: .*{message}"):
            ops.linear(*case.replace(**{name: value}).arguments)


@pytest.mark.parametrize("name", WRONG)
def test_two_devices_are_refused(name):
    """A weight that is still on the meta device (offloaded, say) must not give uninitialised numbers."""
    case = linear_case((3,))
    with pytest.raises(RuntimeError, match=r"osora::linear.*one device"):
        ops.linear(*case.replace(**{name: getattr(case, name).to("meta")}).arguments)


def test_the_meta_device():
    """Shapes without numbers, as `accelerate` estimates memory: no autocast exists there."""
    y = ops.linear(*linear_case((2, 3)).map(lambda t: t.to("meta")).arguments)
    assert y.is_meta and y.shape == (2, 3, 20)


@pytest.mark.parametrize("name", ["x", "weight", "V", "U"])
def test_mixed_dtypes_are_refused(name):
    case = linear_case((3,), bias=False)
    with pytest.raises(RuntimeError, match=r"must share one dtype|S0 must be"):
        ops.linear(*case.replace(**{name: getattr(case, name).double()}).arguments)


def test_wrong_backward_arguments_are_named():
    case = linear_case((3,))
    dy, h = torch.randn(3, 20), torch.randn(3, 6)
    rest = (case.weight, case.U, case.V, case.S0, case.s, case.o, True, True, True)
    for a, b, message in [
        (dy[:, :19], h, "dy must be out_features = 20"),
        (dy, h[:2], r"h must be \[n, rank\] = \[3, 6\]"),
        (dy, h[:, :5], r"h must be \[n, rank\] = \[3, 6\]"),
        (dy, h.double(), "h must have dy's dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"osora::linear_backward: .*{message}"):
            torch.ops.osora.linear_backward(a, b, *rest)


def test_a_bias_without_a_weight_is_refused():
    with pytest.raises(RuntimeError, match="a bias needs a weight"):
        ops.linear(*linear_case((3,)).replace(weight=None).arguments)


# -- CUDA tensors, a CPU build ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fold", "fold_backward", "linear", "down", "up", "linear_backward", "truncated_svd"])
def test_every_operator_has_a_cuda_kernel(name):
    """The compiled one, or plain torch where osora was built without CUDA."""
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"osora::{name}", key)


def test_the_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(common, "has_warned", False)
    slow = common.warning_once(reference.linear)
    case = linear_case((3,))
    with pytest.warns(RuntimeWarning, match="built without CUDA"):
        y, h = slow(*case.arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = slow(*case.arguments)
    assert torch.equal(y, again[0]) and torch.equal(h, again[1])
    torch.testing.assert_close(y, ops.linear(*case.arguments))
