# SPDX-License-Identifier: Apache-2.0
"""The fold of many layers at once: fold() of each, bit for bit, by every backend."""

import pytest
import torch
from backends import Backend
from precision import DTYPES, accumulate
from torch import Tensor

from osora import ops

names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=names)
# [d, r] of layers side by side: packs and not, one number, nothing, several tiles of columns, several blocks of rows.
SIZES = [(64, 8), (1, 1), (0, 8), (300, 16), (7, 5), (5, 0), (33, 1024), (131, 257), (257, 64), (2, 3000)]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def make_layers(sizes: list[tuple[int, int]], dtype: torch.dtype) -> Lists:
    exact = accumulate(dtype)
    return (
        [torch.randn(d, r, dtype=torch.float64).to(dtype) for d, r in sizes],
        [torch.randn(r, dtype=exact) for _, r in sizes],
        [0.1 * torch.randn(r, dtype=exact) for _, r in sizes],
        [0.1 * torch.randn(d, dtype=exact) for d, _ in sizes],
    )


def one_by_one(backend: Backend, layers: Lists) -> list[Tensor]:
    return [backend.fold(*layer) for layer in zip(*layers, strict=True)]


def assert_same(got: list[Tensor], wish: list[Tensor]) -> None:
    assert len(got) == len(wish)
    for a, b in zip(got, wish, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@every_dtype
def test_every_layer_is_its_own_fold(backend, dtype, poisoned_memory):
    layers = make_layers(SIZES, dtype)
    assert_same(backend.fold_many(*layers), one_by_one(backend, layers))


def test_more_layers_than_one_launch_takes(backend):
    layers = make_layers([(1 + k % 5, 8 + k % 3) for k in range(600)], torch.bfloat16)
    assert_same(backend.fold_many(*layers), one_by_one(backend, layers))


def test_large_layers(backend):
    """More than one task for a CPU, and many blocks; beside small ones."""
    layers = make_layers([(3, 4), (2000, 33), (1, 70000), (900, 64)], torch.float32)
    assert_same(backend.fold_many(*layers), one_by_one(backend, layers))


@every_dtype
def test_unaligned_and_strided_layers(backend, dtype):
    layers = make_layers([(20, 16)] * 6, dtype)
    U, S0, s, o = (list(tensors) for tensors in layers)

    def shifted(t: Tensor) -> Tensor:
        return t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape).copy_(t)

    U[1], S0[2], s[3], o[4] = shifted(U[1]), shifted(S0[2]), shifted(s[3]), shifted(o[4])
    U[5], s[5] = U[5].t().contiguous().t(), torch.stack([s[5], s[5]], -1)[..., 0]
    assert_same(backend.fold_many(U, S0, s, o), one_by_one(backend, layers))


def test_16_bit_deltas(backend):
    U, S0, s, o = make_layers(SIZES, torch.bfloat16)
    narrow = U, S0, [t.bfloat16() for t in s], [t.half() for t in o]
    assert_same(backend.fold_many(*narrow), one_by_one(backend, narrow))


@every_dtype
def test_same_bits_in_every_run(backend, dtype, monkeypatch):
    layers = make_layers(SIZES, dtype)
    first = backend.fold_many(*layers)
    for order in ("reverse", "random:1"):
        monkeypatch.setenv("OSORA_EMULATION_ORDER", order)
        assert_same(backend.fold_many(*layers), first)


def test_any_number_of_threads(backend):
    if backend.name != "cpu":
        pytest.skip("threads of the CPU kernels")
    layers = make_layers([(3, 4), (2000, 33), (900, 64)], torch.float32)
    first, threads = backend.fold_many(*layers), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same(backend.fold_many(*layers), first)
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_call_says_which_layer(backend):
    if backend.name == "reference":
        pytest.skip("the reference trusts its caller")
    U, S0, s, o = make_layers([(6, 4), (5, 3)], torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"osora::fold_many: .* lists of one length, got 2, 2, 1 and 2 tensors"):
        backend.fold_many(U, S0, s[:1], o)
    with pytest.raises(RuntimeError, match=r"osora::fold_many: layer 1: o must be \[out_features\] = \[5\].*\[6\]"):
        backend.fold_many(U, S0, s, [o[0], o[0]])
    with pytest.raises(RuntimeError, match=r"osora::fold_many: layer 1: every U must have one dtype.*got Half"):
        backend.fold_many([U[0], U[1].half()], S0, s, o)


# -- osora.ops.fold_many ---------------------------------------------------------------------------------------------


def test_no_layers_are_no_error():
    assert ops.fold_many([], [], [], []) == []
    with pytest.raises(RuntimeError, match="lists of one length, got 0, 1, 0 and 0 tensors"):
        ops.fold_many([], [torch.ones(2)], [], [])


@pytest.mark.parametrize("function", [ops.fold_many, torch.ops.osora.fold_many], ids=["ops", "raw"])
@pytest.mark.parametrize("which", range(4))
def test_a_wish_for_gradients_is_refused(function, which):
    layers = make_layers([(6, 4), (5, 3)], torch.float32)
    layers[which][1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"osora::fold_many has no derivative.*no_grad"):
        function(*layers)
    with torch.no_grad():
        assert_same(function(*layers), [ops.fold(*layer) for layer in zip(*layers, strict=True)])


def test_opcheck_and_compile():
    layers = make_layers([(6, 4), (5, 3)], torch.float32)
    torch.library.opcheck(torch.ops.osora.fold_many.default, layers)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(*lists: list[Tensor]) -> list[Tensor]:
        return [2 * D for D in ops.fold_many(*lists)]

    assert_same(doubled(*layers), [2 * D for D in ops.fold_many(*layers)])
