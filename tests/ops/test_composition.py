# SPDX-License-Identifier: Apache-2.0
"""osora's operators and layers within torch's other machinery: torch.func, autocast, checkpointing, graphs."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from backends import unavailable
from composed import adapted, dense, from_dynamo, fused, gradients, halves, loss
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition, nop
from helpers import expected_linear, linear_case, tiny_gpt2, tiny_llama, token_ids
from layer_makers import make_layer, moved
from precision import every_dtype
from root import ROOT
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import osora
from osora import ops
from osora.layers import OsoraLinear

# -- torch.func --------------------------------------------------------------------------------------------------------


# torch's own formulas for forward mode come through torch.jit.script, which torch deprecates
forward_warns = pytest.mark.filterwarnings(  # torch 2.13 says the first, 2.14 the second
    "ignore:`torch.jit.script:DeprecationWarning", "ignore:`torch.jit.script:FutureWarning"
)

TRANSFORMS = {
    "grad": lambda f, x: grad(loss(f), (0, 1, 2))(*x),
    "vjp": lambda f, x: vjp(f, *x)[1](torch.ones(3, 7, dtype=torch.float64)),
    "jvp": lambda f, x: jvp(f, x, tuple(torch.ones_like(t) for t in x))[1],
    "jacrev": lambda f, x: jacrev(f, (0, 1, 2))(*x),
    "jacfwd": lambda f, x: jacfwd(f, (0, 1, 2))(*x),
    "hessian": lambda f, x: hessian(loss(f), (0, 1, 2))(*x),
    "grad of grad": lambda f, x: grad(lambda s: grad(loss(f), 1)(x[0], s, x[2]).square().sum())(x[1]),
    "vmap": lambda f, x: vmap(f, (0, None, None))(
        x[0].expand(4, 3, 5).clone() * torch.arange(4.0)[:, None, None], *x[1:]
    ),
    "one gradient a sample": lambda f, x: vmap(grad(loss(f), (1, 2)), (0, None, None))(*x),
    "many adapters": lambda f, x: vmap(f, (None, 0, 0))(x[0], x[1].expand(6, 4) * 2, x[2].expand(6, 7) * 3),
}


def leaves(value: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@forward_warns
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name):
    case = linear_case((3,), 5, 7, 4, torch.float64)
    point = (case.x, case.s, case.o)
    got, wish = (leaves(TRANSFORMS[name](make(case), point)) for make in (fused, dense))
    assert len(got) == len(wish) > 0
    for a, b in zip(got, wish, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


@forward_warns
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_transforms_of_fold(name):
    case = linear_case((3,), 5, 7, 4, torch.float64)

    def fold(x: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return x @ case.V @ ops.fold(case.U, case.S0, s, o).t()

    def plain(x: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return dense(case)(x, s, o) - dense(case)(x, 0 * s, 0 * o)

    point = (case.x, case.s, case.o)
    for a, b in zip(leaves(TRANSFORMS[name](fold, point)), leaves(TRANSFORMS[name](plain, point)), strict=True):
        torch.testing.assert_close(a, b)


@forward_warns
@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode(trained):
    """Not a tangent lost without a word, whether anything requires a gradient or not."""
    case = linear_case((3,), 5, 7, 4, torch.float64)
    s, tangent = case.s.requires_grad_(trained), torch.randn_like(case.x)
    with forward_ad.dual_level():
        y = fused(case)(forward_ad.make_dual(case.x, tangent), s, case.o)
        got = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got.detach(), dense(case)(tangent, case.s, case.o).detach() - case.bias)


def test_functional_call_of_a_layer():
    layer, x = moved(make_layer()), torch.randn(3, 12)
    deltas = {"o": layer.o.detach(), "s": layer.s.detach()}
    got = grad(lambda deltas: functional_call(layer, deltas, (x,)).square().sum())(deltas)
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, {"o": layer.o.grad, "s": layer.s.grad})


@halves
def test_transforms_in_16_bits(half):
    """P passes through 16 bits there: one more rounding than the operator has."""
    case = linear_case((9,), 16, 12, 4, half)
    got = grad(lambda s: fused(case)(case.x, s, case.o).float().sum())(case.s)
    wish = expected_linear(case, torch.ones(9, 12))
    assert got.dtype == torch.float32
    # h, D, P and their products are rounded once each
    assert ((got - wish.value["ds"]).abs() <= 8 * torch.finfo(half).eps * wish.size["ds"]).all()


# -- autocast ----------------------------------------------------------------------------------------------------------


@halves
def test_autocast_casts_x_and_never_the_deltas(half):
    """A change of 1e-4 would be lost in a 16-bit O = 1 + o; here it arrives."""
    case = linear_case((64,), 48, 40, 12, step=0.0, bias=False).replace(weight=None)
    case = case.replace(o=torch.full((40,), 1e-4)).trainable("x", "s", "o")
    with torch.autocast("cpu", half):
        y = ops.linear(*case.arguments)
    assert y.dtype == half
    wish = expected_linear(case).value["y"]
    assert (
        y.double() - wish
    ).norm() < 1e-2 * wish.norm()  # h, D and y rounded to 16 bits; float16 nears its subnormals
    y.float().sum().backward()
    assert case.x.grad.dtype == case.s.grad.dtype == case.o.grad.dtype == torch.float32


@halves
def test_a_model_trains_under_autocast(half):
    """Gradients in float32, within 16-bit rounding of those without autocast."""
    model, ids, found = adapted(), token_ids(), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", half, enabled=enabled):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model)]))
        assert all(parameter.grad.dtype == torch.float32 for parameter in osora.adapter_parameters(model))
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()  # two layers of activations, each rounded


@halves
def test_wide_factors_of_16_bit_parameters(half):
    """FSDP2 casts parameters and leaves buffers alone: U and V arrive in float32, are cast, and kept as they are."""
    wide = linear_case((9,), 16, 12, 4)
    x, weight, bias = (t.to(half) for t in (wide.x, wide.weight, wide.bias))
    mixed = wide.replace(x=x, weight=weight, bias=bias).trainable("x", "s", "o")
    narrow = mixed.replace(U=wide.U.to(half), V=wide.V.to(half)).trainable("x", "s", "o")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.linear(*mixed.arguments)
    addresses = {t.data_ptr() for t in mixed.arguments if t is not None}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in addresses] == [(9, 4)], "h alone"
    assert torch.equal(y, ops.linear(*narrow.arguments))
    y.float().sum().backward()
    ops.linear(*narrow.arguments).float().sum().backward()
    assert all(torch.equal(getattr(mixed, n).grad, getattr(narrow, n).grad) for n in ("x", "s", "o"))
    with torch.no_grad():
        assert torch.equal(ops.linear(*mixed.arguments), y)
        for wrong in (mixed.replace(weight=wide.weight), mixed.replace(U=narrow.U), wide.replace(x=x)):
            with pytest.raises(RuntimeError, match="must share one dtype"):
                ops.linear(*wrong.arguments)


# -- selective activation checkpointing --------------------------------------------------------------------------------


def keep(kept: list[str], *names: str) -> Callable:
    """Contexts for `checkpoint` that keep what operators of these names give, and note which they were asked about."""

    def policy(context: object, operator: object, *arguments: object, **named: object) -> CheckpointPolicy:
        kept.append(str(operator))
        return CheckpointPolicy.MUST_SAVE if str(operator) in names else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def times_run(profile: torch.profiler.profile) -> Counter:
    """How often osora's kernels ran: calls that a policy answered from what it kept reach no product of ATen."""
    calls = [event for event in profile.events() if event.name.startswith("osora::")]
    return Counter(call.name for call in calls if any(child.name.startswith("aten::") for child in call.cpu_children))


@every_dtype
@pytest.mark.parametrize("names", [(), ("osora.down.default",), ("osora.down.default", "osora.up.default")], ids=len)
def test_h_can_be_kept_without_y(names, dtype):
    asked: list[str] = []
    plain = linear_case((2, 6), dtype=dtype).trainable("x", "s", "o")
    case = plain.trainable("x", "s", "o")

    def block(*arguments: Tensor) -> Tensor:
        return ops.linear(*arguments).tanh()

    block(*plain.arguments).float().square().sum().backward()
    with torch.profiler.profile() as profile:
        y = checkpoint(block, *case.arguments, use_reentrant=False, context_fn=keep(asked, *names))
        y.float().square().sum().backward()
    runs = times_run(profile)
    assert asked[:2] == ["osora.down.default", "osora.up.default"]
    assert runs["osora::down"] == (1 if "osora.down.default" in names else 2)
    assert runs["osora::up"] == (1 if "osora.up.default" in names else 2)
    assert runs["osora::linear"] == 0 and runs["osora::linear_backward"] == 1
    for name in ("x", "s", "o"):
        assert torch.equal(getattr(case, name).grad, getattr(plain, name).grad)


@from_dynamo
@pytest.mark.parametrize("name", ["osora.down.default", "none"])
def test_h_can_be_kept_in_compiled_code(name):
    """Seen in the compiled backward: y is computed again, h only where the policy does not keep it."""
    backward: list[str] = []
    plain = linear_case((6,)).trainable("x", "s", "o")
    case = plain.trainable("x", "s", "o")

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        backward.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def block(*arguments: Tensor) -> Tensor:
        return ops.linear(*arguments).tanh().square()

    def kept(*arguments: Tensor) -> Tensor:
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=keep([], name))

    backend = aot_autograd(fw_compiler=nop, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    torch.compile(kept, backend=backend, fullgraph=True)(*case.arguments).sum().backward()
    block(*plain.arguments).sum().backward()
    assert "osora.up.default" in backward and "osora.linear_backward.default" in backward
    assert ("osora.down.default" in backward) == (name == "none")
    for trained in ("x", "s", "o"):
        torch.testing.assert_close(getattr(case, trained).grad, getattr(plain, trained).grad)


@every_dtype
@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3), "strided"], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_halves_are_the_whole(backend, rows, bias, dtype):
    case = linear_case((2, 3) if rows == "strided" else rows, dtype=dtype, bias=bias)
    if rows == "strided":
        case = case.replace(x=case.x.transpose(0, 1))
    x, weight, bias_, U, V, S0, s, o = case.arguments
    for w, b in ((weight, bias_), (None, None)):
        y, h = backend.linear(x, w, b, U, V, S0, s, o)
        assert torch.equal(backend.down(x, V), h)
        assert torch.equal(backend.up(x, h, w, b, U, S0, s, o), y)


def test_wrong_halves_are_refused():
    case, h = linear_case((3,)), torch.randn(3, 6)
    down, up = torch.ops.osora.down, torch.ops.osora.up
    for x, V, message in [
        (case.x[:, 1:], case.V, "in_features = 24"),
        (case.x.double(), case.V, "must have V's dtype"),
        (case.x, case.V[0], r"V must be \[in_features, rank\]"),
        (case.x.int(), case.V.int(), "V must be float64"),
    ]:
        with pytest.raises(RuntimeError, match=f"osora::down: .*{message}"):
            down(x, V)
    rest = (case.U, case.S0, case.s, case.o)
    for x, h_, weight, bias, message in [
        (case.x, h[:2], case.weight, case.bias, r"h must be \[n, rank\] = \[3, 6\]"),
        (case.x, h[:, :5], case.weight, case.bias, r"h must be \[n, rank\] = \[3, 6\]"),
        (case.x, h, case.weight.t(), case.bias, r"weight must be .* = \[20, 24\]"),
        (case.x, h, case.weight, case.bias[1:], r"bias must be .* = \[20\]"),
        (case.x, h, None, case.bias, "needs a weight"),
        (case.x, h.double(), case.weight, case.bias, "must share one dtype"),
        (case.x.double(), h, None, None, "must share one dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"osora::up: .*{message}"):
            up(x, h_, weight, bias, *rest)
    for call in (
        lambda: down(case.x.requires_grad_(), case.V),
        lambda: up(case.x, h.requires_grad_(), None, None, *rest),
    ):
        with pytest.raises(RuntimeError, match=r"no derivatives of their own: call osora\.ops\.linear"):
            call().sum().backward()


# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_accumulate(make):
    """Bit for bit the sum of the micro-batches' own; and that of the whole batch, but for the order of sums."""
    model, ids = adapted(make), token_ids(4)

    def backward(rows: Tensor, share: float) -> None:
        (share * model(input_ids=rows, labels=rows, use_cache=False).loss).backward()

    alone = []
    for rows in ids.split(2):
        model.zero_grad()
        backward(rows, 0.5)
        alone.append(gradients(model))
    model.zero_grad()
    for rows in ids.split(2):
        backward(rows, 0.5)
    together = gradients(model)
    for total, *parts in zip(together, *alone, strict=True):
        assert torch.equal(total, parts[0] + parts[1])
    model.zero_grad()
    backward(ids, 1.0)
    torch.testing.assert_close(together, gradients(model), rtol=1e-4, atol=1e-5)


# -- files -------------------------------------------------------------------------------------------------------------


def test_torch_save_of_a_layer_and_of_a_model(tmp_path):
    layer, x = moved(make_layer(dropout=0.1)).eval(), torch.randn(3, 12)
    torch.save(layer, tmp_path / "layer.pt")
    other = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert isinstance(other, OsoraLinear) and torch.equal(other(x), layer(x)) and other.dropout == 0.1
    model, ids = adapted(), token_ids()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again(input_ids=ids, labels=ids).loss.backward()
    assert len(gradients(again)) == 28
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = osora.attach(tiny_llama(), osora.OsoraConfig(r=4))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(ids).logits, model(ids).logits)


# -- CUDA graphs -------------------------------------------------------------------------------------------------------

CSRC = ROOT / "csrc"
READS = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::allclose",
}


@every_dtype
def test_nothing_is_read_back_on_the_way(dtype):
    """A number read on the host would wait for the device, and cannot be captured. Seen in the calls of ATen."""
    case = linear_case((2, 5), dtype=dtype).trainable("x", "bias", "s", "o")
    with torch.profiler.profile() as profile:
        ops.linear(*case.arguments).sum().backward()
        with torch.no_grad():
            ops.linear(*case.arguments)
            ops.fold(case.U, case.S0, case.s, case.o)
    called = {event.name for event in profile.events()}
    assert {"osora::linear", "osora::linear_backward", "osora::fold"} <= called
    assert not called & READS


def test_the_linear_path_neither_waits_nor_allocates_by_itself():
    """Of all sources but the SVD's: memory comes from torch, nothing waits for the stream, no other stream is used."""
    calls = "Malloc|Free|HostAlloc|DeviceSynchronize|StreamSynchronize|EventSynchronize|StreamCreate"
    wrong = rf"cuda({calls})\w*\s*\(|\.item\b"
    seen = set()
    for room in ("common", "fold", "linear"):
        for path in CSRC.glob(f"*/{room}/*"):
            source = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
            source = re.sub(r"void check_range_on_cpu.*?\n}", "", source, flags=re.DOTALL)  # returns on others
            found = re.search(wrong, source)
            assert not found, f"{path.relative_to(CSRC)}: {found and found.group()}"
            seen.add(str(path.relative_to(CSRC)))
    assert {"cuda/fold/fold.cu", "torch/linear/linear.cpp", "cuda/common/launch.h"} <= seen


def test_capture_and_replay():
    """On a card: forward and backward in a CUDA graph, replayed on other numbers, give the bits of eager."""
    if not torch.cuda.is_available():
        unavailable("CUDA", "no CUDA card")
    case = linear_case((64,), 48, 40, 12).map(lambda t: t.cuda()).trainable("x", "s", "o")
    names = ("x", "s", "o")

    def step() -> Tensor:
        y = ops.linear(*case.arguments)
        y.square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for a warm-up on a stream of its own
        for _ in range(3):
            step()
            for name in names:
                getattr(case, name).grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        for name in names:
            getattr(case, name).normal_(std=0.1)
            getattr(case, name).grad.zero_()
    graph.replay()
    replayed = [y.clone(), *(getattr(case, name).grad.clone() for name in names)]
    for name in names:
        getattr(case, name).grad = None
    assert torch.equal(replayed[0], step())
    assert all(torch.equal(a, getattr(case, name).grad) for a, name in zip(replayed[1:], names, strict=True))
