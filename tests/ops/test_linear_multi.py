# SPDX-License-Identifier: Apache-2.0
"""osora::linear_multi: every row is its own adapter's, alone; and what torch asks of an operator."""

from dataclasses import dataclass, replace

import pytest
import torch
from backends import Backend, make_backend
from helpers import TOLERANCE, Linear, expected_linear, linear_case
from precision import DTYPES, accumulate, assert_within, every_dtype, half_of_least, unit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear as torch_linear

from osora import ops, reference

# In 16 bits one rounding more than osora::linear: h, t, T, the base's y and the sum, where that has h, D and the sum
# of both (4 units for these four). In float32 and float64 the sums dominate, and they are as long as there.
MULTI_TOLERANCE = TOLERANCE | {dtype: 6 * unit(dtype) for dtype in (torch.bfloat16, torch.float16)}


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """The emulator has no products: its two steps are tested with the other kernels."""
    return make_backend(request.param)


@dataclass
class Multi:
    """A case whose s and o have a row for each adapter, and whose adapter each row takes."""

    case: Linear
    index: Tensor
    ranks: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return (*self.case.arguments, self.index, self.ranks)

    def replace(self, **changes: Tensor | None) -> "Multi":
        own = {name: changes.pop(name) for name in ("index", "ranks") if name in changes}
        return replace(self, case=self.case.replace(**changes), **own)

    @property
    def row_index(self) -> list[int]:
        leading = self.case.x.shape[:-1]
        index = self.index.reshape(self.index.shape + (1,) * (len(leading) - self.index.dim()))
        return index.expand(leading).flatten().tolist()

    def alone(self, row: int) -> Linear:
        """That row, with its own adapter and no other; a base row has an adapter of zeros."""
        c, a = self.case, self.row_index[row]
        r = 0 if a < 0 else c.S0.numel() if self.ranks is None else int(self.ranks[a])
        s, o = (c.S0.new_zeros(0), c.S0.new_zeros(c.U.shape[0])) if a < 0 else (c.s[a, :r], c.o[a])
        rows = c.x.reshape(len(self.row_index), c.x.shape[-1])
        return c.replace(x=rows[row : row + 1], U=c.U[:, :r], V=c.V[:, :r], S0=c.S0[:r], s=s, o=o)


def multi_case(
    rows: tuple[int, ...],
    adapters: int = 3,
    k: int = 24,
    d: int = 20,
    r: int = 6,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    ranks: bool = False,
    per_sequence: bool = False,
) -> Multi:
    """Adapters that differ by far more than any rounding; rows that take each of them, and the base."""
    case, exact = linear_case(rows, k, d, r, dtype, bias=bias), accumulate(dtype)
    case = case.replace(s=0.3 * torch.randn(adapters, r, dtype=exact), o=0.3 * torch.randn(adapters, d, dtype=exact))
    index = torch.randint(-1, adapters, rows[:1] if per_sequence else rows)
    return Multi(case, index, torch.randint(0, r + 1, (adapters,)) if ranks else None)


def check_multi(got: Tensor, multi: Multi) -> None:
    """Row by row against float64."""
    case, d = multi.case, multi.case.U.shape[0]
    assert got.dtype == case.x.dtype and got.shape == (*case.x.shape[:-1], d) and got.is_contiguous()
    values, sizes = [], []
    for row in range(len(multi.row_index)):
        wish = expected_linear(multi.alone(row))
        values.append(wish.value["y"])
        sizes.append(wish.size["y"])
    value, size = (torch.cat(t) if t else torch.zeros(0, d, dtype=torch.float64) for t in (values, sizes))
    allowed = MULTI_TOLERANCE[got.dtype] * size + 256 * half_of_least(got.dtype)
    assert_within(got.reshape(len(values), d), value, allowed)


def base_of(multi: Multi) -> Tensor:
    c = multi.case
    return torch_linear(c.x, c.weight, c.bias)


# -- against the definition ------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("rows", [(), (1,), (7,), (0,), (2, 3), (3, 0), (2, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ranks", [False, True], ids=["one rank", "ranks"])
def test_any_leading_dimensions(backend, poisoned_memory, rows, bias, ranks, dtype):
    multi = multi_case(rows, dtype=dtype, bias=bias, ranks=ranks)
    check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
@pytest.mark.parametrize("rows", [(5, 3), (2, 3, 2), (0, 3), (3, 0)], ids=str)
def test_one_adapter_a_sequence(backend, rows, dtype):
    multi = multi_case(rows, dtype=dtype, ranks=True, per_sequence=True)
    got = backend.linear_multi(*multi.arguments)
    check_multi(got, multi)
    each = multi.index.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    assert torch.equal(got, backend.linear_multi(*multi.replace(index=each).arguments))


def test_one_adapter_for_everything(backend):
    """An index without dimensions: the shortest of x's leading ones."""
    multi = multi_case((2, 3), dtype=torch.float64).replace(index=torch.tensor(1))
    check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
@pytest.mark.parametrize("k, d, r", [(1, 1, 1), (5, 7, 5), (33, 301, 17), (130, 65, 64)])
@pytest.mark.parametrize("adapters", [1, 2, 64])
def test_any_sizes(backend, poisoned_memory, adapters, k, d, r, dtype):
    for n in (1, 13, 64):
        multi = multi_case((n,), adapters, k, d, r, dtype, ranks=True)
        check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
def test_work_for_many_threads(backend, dtype):
    """More numbers than one thread's share, in shares that begin and end inside a row."""
    multi = multi_case((67,), 5, 8, 1009, 3, dtype, ranks=True)
    check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
@pytest.mark.parametrize("rows", [(5,), (0,), (2, 3)], ids=str)
def test_the_branches_alone(backend, poisoned_memory, rows, dtype):
    multi = multi_case(rows, dtype=dtype, bias=False, ranks=True).replace(weight=None)
    got = backend.linear_multi(*multi.arguments)
    check_multi(got, multi)
    assert (got[multi.index == -1] == 0).all()


@every_dtype
def test_no_features(backend, poisoned_memory, dtype):
    for k, d, r in [(0, 5, 1), (5, 0, 1), (0, 0, 1), (5, 4, 0)]:
        multi = multi_case((3,), 2, max(k, 1), max(d, 1), max(r, 1), dtype)
        c = multi.case
        multi = multi.replace(
            x=c.x[:, :k], weight=c.weight[:d, :k], bias=c.bias[:d], U=c.U[:d, :r], V=c.V[:k, :r], S0=c.S0[:r],
            s=c.s[:, :r], o=c.o[:, :d],
        )  # fmt: skip
        check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
@pytest.mark.parametrize("delta", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_deltas(backend, dtype, delta):
    multi = multi_case((5,), dtype=dtype, ranks=True)
    multi = multi.replace(s=multi.case.s.to(delta), o=multi.case.o.to(delta))
    check_multi(backend.linear_multi(*multi.arguments), multi)


@every_dtype
def test_arguments_in_any_layout(backend, dtype):
    def strided(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], -1)[..., 0]

    multi = multi_case((6,), dtype=dtype, ranks=True)
    check_multi(backend.linear_multi(*(None if t is None else strided(t) for t in multi.arguments)), multi)
    for x in (torch.randn(4, 6, 48)[..., ::2], torch.randn(6, 4, 24).transpose(0, 1), torch.randn(24).expand(4, 6, 24)):
        layout = multi_case((4, 6), dtype=dtype, ranks=True).replace(x=x.to(dtype))
        check_multi(backend.linear_multi(*layout.arguments), layout)
        layout = layout.replace(index=torch.tensor([1, -1, 0])[:, None].expand(3, 2)[:2, :1].expand(2, 6)[:, :6])
        layout = layout.replace(x=layout.case.x[:2])
        check_multi(backend.linear_multi(*layout.arguments), layout)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=["bfloat16", "float16"])
def test_each_step_rounds_once(backend, dtype):
    """U = V = 1 and W0 = 0: the products are exact, and nothing but the two steps rounds."""
    multi, one = multi_case((50,), 3, 40, 40, 40, dtype), torch.eye(40, dtype=dtype)
    multi = multi.replace(U=one, V=one, weight=0 * one, index=torch.randint(3, (50,)))
    c, a = multi.case, multi.index
    scaled = (c.x.float() * (c.S0 + c.s[a])).to(dtype).double()
    changed = (c.x.float() * c.s[a]).to(dtype).double()
    wish = c.bias.double() + c.o[a].double() * scaled + changed
    # half a unit for the one rounding, and what float32 is off by before it: units of 2^-24 of each term
    size = c.bias.double().abs() + (c.o[a].double() * scaled).abs() + changed.abs()
    allowed = unit(dtype) * wish.abs() + 8 * unit(torch.float32) * size + half_of_least(dtype)
    assert_within(backend.linear_multi(*multi.arguments), wish, allowed)


# -- against one adapter alone ---------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("ranks", [False, True], ids=["one rank", "ranks"])
def test_every_row_is_its_own_adapter_s(ranks, dtype):
    """What a user compares: the same row through osora.ops.linear with the tensors of its adapter."""
    multi = multi_case((64,), 64, 40, 30, 8, dtype, ranks=ranks)
    multi = multi.replace(index=torch.randperm(64))
    got = ops.linear_multi(*multi.arguments)
    for row in range(64):
        alone = multi.alone(row)
        # both are off by their own roundings
        allowed = (TOLERANCE[dtype] + MULTI_TOLERANCE[dtype]) * expected_linear(alone).size["y"]
        assert_within(got[row : row + 1], ops.linear(*alone.arguments).double(), allowed + 1e-300)


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("adapters", [0, 3])
def test_rows_of_the_base_have_its_bits(adapters, bias, dtype):
    for rows in [(), (1,), (2,), (64,), (1, 7), (3, 5), (2, 1, 4)]:
        multi = multi_case(rows, 3, 33, 77, 5, dtype, bias=bias)
        multi = multi.replace(s=multi.case.s[:adapters], o=multi.case.o[:adapters])
        if not adapters:
            multi = multi.replace(index=torch.full_like(multi.index, -1))
        base, got = multi.index == -1, ops.linear_multi(*multi.arguments)
        assert torch.equal(got[base], base_of(multi)[base]), rows
        strided = multi.replace(x=multi.case.x[..., None].expand(*rows, 33, 2).transpose(-1, -2)[..., 0, :])
        assert torch.equal(ops.linear_multi(*strided.arguments)[base], base_of(strided)[base]), rows


@every_dtype
def test_a_negative_zero_of_the_base_stays_one(backend, dtype):
    """-0.0 + 0.0 is 0.0: a row without an adapter must not be added to at all."""
    multi = multi_case((3,), dtype=dtype, bias=False).replace(index=torch.tensor([-1, 0, -1]))
    multi = multi.replace(weight=multi.case.weight.abs(), x=-multi.case.x.abs() * 0)
    base, got = base_of(multi), backend.linear_multi(*multi.arguments)
    assert torch.equal(got[[0, 2]].signbit(), base[[0, 2]].signbit())
    y = torch.full((1, 4), -0.0, dtype=dtype)
    kept = reference.multi_combine(y, torch.zeros(2, 4, dtype=dtype), torch.zeros(0, 4), torch.tensor([-1]))
    assert kept.signbit().all()


@every_dtype
def test_adapters_of_zeros_are_the_base(dtype):
    multi = multi_case((9,), dtype=dtype)
    multi = multi.replace(s=multi.case.s * 0, o=multi.case.o * 0)
    assert torch.equal(ops.linear_multi(*multi.arguments), base_of(multi))


def test_what_lies_beyond_a_rank_does_not_exist(backend):
    """Not even as NaN, in s or in the basis."""
    multi = multi_case((40,), 3).replace(ranks=torch.tensor([0, 2, 4]))
    c, s, V = multi.case, multi.case.s.clone(), multi.case.V.clone()
    s[0], s[1, 2:], s[2, 4:], V[:, 4:] = float("nan"), float("inf"), float("nan"), float("nan")
    got = backend.linear_multi(*multi.replace(s=s, V=V).arguments)
    assert torch.equal(got, backend.linear_multi(*multi.replace(V=c.V * (torch.arange(6) < 4)).arguments))
    check_multi(got, multi)


@every_dtype
def test_rows_do_not_see_each_other(backend, dtype):
    """A NaN in one row, or in one adapter, stays there."""
    multi = multi_case((6,), 2, dtype=dtype).replace(index=torch.tensor([0, 1, -1, 0, 1, -1]))
    clean, x, o = backend.linear_multi(*multi.arguments), multi.case.x.clone(), multi.case.o.clone()
    x[3], o[1] = float("nan"), float("nan")
    got = backend.linear_multi(*multi.replace(x=x, o=o).arguments)
    assert got[[1, 3, 4]].isnan().all() and torch.equal(got[[0, 2, 5]], clean[[0, 2, 5]])


@every_dtype
def test_bits_do_not_depend_on_threads(dtype):
    """The two steps of ours: with d beyond what one thread takes, and rows cut in the middle."""
    multi, before = multi_case((67,), 5, 8, 1009, 3, dtype, ranks=True), torch.get_num_threads()
    # whole numbers, save o: every order of the products' sums gives the same, so that only our own steps could differ
    c = multi.case
    multi = multi.replace(x=c.x.round(), weight=(4 * c.weight).round(), bias=c.bias.round(), V=c.V.sign(), U=c.U.sign())
    multi = multi.replace(S0=(4 * c.S0).round(), s=(10 * c.s).round())
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [ops.linear_multi(*multi.arguments) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_row_has_a_matrix_of_its_own():
    """64 adapters: as many products as one has, and nothing larger than T [2n, d] is allocated."""

    def products(multi: Multi) -> list[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ops.linear_multi(*multi.arguments)
        assert max(e.self_cpu_memory_usage for e in profile.events()) <= 2 * 64 * 300 * 4
        return [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm")]

    many = multi_case((64,), 64, 200, 300, 8, ranks=True)
    assert products(many) == products(multi_case((64,), 1, 200, 300, 8, ranks=True)) and len(products(many)) == 3


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"s": torch.zeros(6)}, r"s must be \[adapters, rank\] with rank 6, got shape \[6\]"),
        ({"s": torch.zeros(3, 5)}, r"s must be \[adapters, rank\] with rank 6, got shape \[3, 5\]"),
        ({"o": torch.zeros(2, 20)}, r"o must be \[adapters, out_features\] = \[3, 20\], got shape \[2, 20\]"),
        ({"o": torch.zeros(20)}, r"o must be \[adapters, out_features\] = \[3, 20\]"),
        ({"o": torch.zeros(3, 20, dtype=torch.float64)}, "o must be Float, bfloat16 or float16, got Double"),
        ({"S0": torch.zeros(6, dtype=torch.bfloat16)}, "S0 must be Float for Float factors"),
        ({"x": torch.zeros(2, 3, 23)}, r"osora::linear_multi: the last dimension of x must be in_features = 24"),
        ({"x": torch.zeros(2, 3, 24, dtype=torch.float64)}, "must share one dtype"),
        ({"bias": torch.zeros(19)}, r"bias must be \[out_features\] = \[20\]"),
        ({"weight": None}, "a bias needs a weight"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"index must have x's leading dimensions or the first of them"),
        ({"index": torch.zeros(2, 3, 24, dtype=torch.int64)}, r"index must have x's leading dimensions"),
        ({"index": torch.zeros(2, 3)}, "index must be int64 on cpu, got Float on cpu"),
        ({"index": torch.zeros(2, 3, dtype=torch.int32)}, "index must be int64 on cpu, got Int on cpu"),
        ({"ranks": torch.zeros(2, dtype=torch.int64)}, r"ranks must be \[adapters\] = \[3\], got shape \[2\]"),
        ({"ranks": torch.zeros(3)}, "ranks must be int64 on the CPU or on cpu"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(change, words):
    with pytest.raises(RuntimeError, match=words):
        ops.linear_multi(*multi_case((2, 3)).replace(**change).arguments)


@pytest.mark.parametrize("bad", [3, -2, 2**40, -(2**62)])
def test_an_index_out_of_range(bad):
    multi = multi_case((2, 3))
    multi.index[1, 2] = bad
    with pytest.raises(IndexError, match=rf"index must be in -1 \.\. 2 \(-1 is the base\), got values from .*{bad}"):
        ops.linear_multi(*multi.arguments)
    with pytest.raises(IndexError, match=r"index must be in -1 \.\. -1 "):
        ops.linear_multi(*multi.replace(s=torch.zeros(0, 6), o=torch.zeros(0, 20)).arguments)
    got = reference.linear_multi(*multi.arguments)  # as on a card, where nobody waits to look
    wish = reference.linear_multi(*multi.replace(index=multi.index.clamp(-1, 2)).arguments)
    assert got[1, 2].isnan().all() and torch.equal(got.flatten(0, 1)[:5], wish.flatten(0, 1)[:5])


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_rank_out_of_range(bad):
    with pytest.raises(IndexError, match=r"ranks must be in 0 \.\. 6 .*got values from"):
        ops.linear_multi(*multi_case((2, 3)).replace(ranks=torch.tensor([1, bad, 2])).arguments)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "s", "o"])
@pytest.mark.parametrize("function", [ops.linear_multi, torch.ops.osora.linear_multi], ids=["function", "raw"])
def test_a_gradient_is_refused(function, name):
    multi = multi_case((3,))
    multi = replace(multi, case=multi.case.trainable(name))
    with pytest.raises(RuntimeError, match=r"linear_multi is for inference.*torch\.no_grad\(\)"):
        function(*multi.arguments)
    with torch.no_grad():
        assert not function(*multi.arguments).requires_grad
    with torch.inference_mode():
        check_multi(function(*multi.arguments), multi)


# -- inside torch ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck():
    for multi in (
        multi_case((2, 3)),
        multi_case((2, 3), ranks=True, per_sequence=True),
        multi_case((4,), bias=False, ranks=True).replace(weight=None),
        multi_case((2, 3)).replace(x=torch.randn(3, 2, 24).transpose(0, 1)),
    ):
        torch.library.opcheck(torch.ops.osora.linear_multi.default, multi.arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_dynamic_number_of_rows(compiler):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend(compiler)

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.nn.functional.silu(ops.linear_multi(x, *rest)) * 2

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    for n in (6, 9, 17, 23):
        multi = multi_case((n, 2), ranks=True, per_sequence=True)
        torch.testing.assert_close(compiled(*multi.arguments), block(*multi.arguments))
    assert frames.frame_count <= 2, "one graph, and one for any number of rows"


def test_autocast_casts_what_linear_casts():
    multi = multi_case((5,), ranks=True)
    cast = [None if t is None else t.bfloat16() for t in multi.case.arguments[:5]]
    wish = ops.linear_multi(*cast, *multi.arguments[5:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_multi(*multi.arguments), wish) and wish.dtype == torch.bfloat16
        double = multi_case((5,), dtype=torch.float64)
        assert ops.linear_multi(*double.arguments).dtype == torch.float64


def test_the_meta_device():
    multi = multi_case((2, 3), ranks=True)
    meta = [None if t is None else t.to("meta") for t in multi.arguments]
    assert ops.linear_multi(*meta).shape == (2, 3, 20)
    with pytest.raises(RuntimeError, match="all must be on one device"):
        ops.linear_multi(meta[0], *multi.arguments[1:])
