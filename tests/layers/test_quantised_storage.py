# SPDX-License-Identifier: Apache-2.0
"""osora.layers.quantised: what a quantised layer's storage stands for, however bitsandbytes happens to pack it."""

import copy

import pytest
import torch
from precision import unit
from torch import Tensor, nn

from osora import ops
from osora.layers import quantised
from osora.layers.quantised import kind_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# NF4 as the QLoRA paper defines it (appendix E), a code a place.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def linear4bit(d: int = 96, k: int = 128, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    layer = bnb.nn.Linear4bit(k, d, **({"quant_type": "nf4"} | options))
    layer.weight.data = (torch.randn(d, k, dtype=torch.float64) / k**0.5).to(dtype)
    layer.bias.data = torch.randn(d).to(dtype)
    return layer.to("cpu")


def linear8bit(d: int = 96, k: int = 128, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(k, d, **({"has_fp16_weights": False, "threshold": 6.0} | options))
    layer.weight.data = (torch.randn(d, k, dtype=torch.float64) / k**0.5).to(dtype)
    if layer.bias is not None:
        layer.bias.data = torch.randn(d).to(dtype)
    return layer.to("cpu")


def packs_for_cpu() -> bool:
    return bool(bnb.functional.has_avx512bf16())


needs_packing = pytest.mark.skipif(not packs_for_cpu(), reason="bitsandbytes packs on CPUs with AVX512-BF16 alone")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_by_the_papers_table(storage, nested):
    """Codes and scales by hand: no function of bitsandbytes stands between the storage and the expected weight."""
    layer = linear4bit(quant_storage=storage, compress_statistics=nested)
    state = layer.weight.quant_state
    scales = state.absmax
    if nested:  # eight bits by a table, in blocks of 256, around a mean
        codes, blocks = state.absmax.long(), torch.arange(len(state.absmax)) // state.state2.blocksize
        scales = state.state2.code[codes] * state.state2.absmax[blocks] + state.offset
    halves = layer.weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([halves // 16, halves % 16], 1).flatten()
    want = torch.tensor(NF4, dtype=torch.float64)[codes] * scales.double().repeat_interleave(state.blocksize)
    got = kind_of(layer).dense(layer)
    assert got.dtype == torch.float32 and got.shape == (96, 128)
    # one product in float32, and of the nested scales a product and a sum
    torch.testing.assert_close(got.double(), want.view(96, 128), rtol=4 * unit(torch.float32), atol=1e-7)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_the_one_that_the_layer_computes_with(quant_type, dtype):
    layer = linear4bit(dtype=dtype, quant_type=quant_type, compute_dtype=torch.float32).train()
    kind = kind_of(layer)
    assert kind.name(layer) == f"bnb-{quant_type}" and kind.dtype(layer) == dtype and kind.shape(layer) == (96, 128)
    x = torch.randn(5, 128)
    want = x.double() @ kind.dense(layer).double().t() + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)  # sums of 128 terms in float32


@needs_packing
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packing_for_the_cpu_changes_nothing_but_the_scales_last_digits(quant_type, nested):
    layer = linear4bit(quant_type=quant_type, compress_statistics=nested)
    kind = kind_of(layer)
    before, digest = kind.dense(layer), kind.digest(layer)
    layer.eval()(torch.randn(3, 128))
    assert layer.weight.quant_state.packing_format_for_cpu
    wrong = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert (wrong.float() - before).abs().max() > 0.05  # why there is code of our own
    # scales were rounded to bfloat16, each of them by itself
    torch.testing.assert_close(kind.dense(layer), before, rtol=unit(torch.bfloat16), atol=0)
    assert (
        kind.digest(layer) == digest and kind.dtype(layer) == torch.float32 and kind.name(layer) == f"bnb-{quant_type}"
    )
    layer.state_dict()  # which unpacks
    assert not layer.weight.quant_state.packing_format_for_cpu and kind.digest(layer) == digest


def test_reading_leaves_the_storage_alone():
    for layer in (linear4bit(), linear8bit()):
        kind, bits = kind_of(layer), layer.weight.data.clone()
        address, state = layer.weight.data_ptr(), copy.copy(vars(getattr(layer, "quant_state", None) or layer.state))
        kind.dense(layer), kind.digest(layer)
        assert layer.weight.data_ptr() == address and torch.equal(layer.weight.data, bits)
        assert all(v is state[k] for k, v in vars(getattr(layer, "quant_state", None) or layer.state).items())


def test_one_code_more_is_another_digest():
    for layer in (linear4bit(), linear4bit(quant_storage=torch.float32), linear8bit()):
        kind = kind_of(layer)
        before = kind.digest(layer)
        layer.weight.data.view(torch.uint8).view(-1)[17] += 1
        assert kind.digest(layer) != before


@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits(bias):
    layer = linear8bit(bias=bias).train()
    kind = kind_of(layer)
    codes, scales = layer.weight.data.clone().double(), layer.weight.SCB.clone().double()
    want, digest = codes * scales[:, None] / 127, kind.digest(layer)
    assert kind.name(layer) == "bnb-int8" and kind.dtype(layer) == (torch.float32 if bias else torch.float16)
    torch.testing.assert_close(kind.dense(layer).double(), want, rtol=2 * unit(torch.float32), atol=0)
    x = torch.randn(5, 128)
    full = x.double() @ want.t() + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), full, rtol=1e-5, atol=1e-5)  # sums of 128 terms in float32
    # the forward moved the scales from the weight to the layer's state
    assert layer.weight.SCB is None and kind.digest(layer) == digest
    torch.testing.assert_close(kind.dense(layer).double(), want, rtol=2 * unit(torch.float32), atol=0)


def stored(layer: nn.Module) -> Tensor:
    return layer.weight.data.view(torch.uint8).clone()


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_packing)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_four_bits_replaced_and_restored(packed, nested, storage):
    layer = linear4bit(dtype=torch.bfloat16, quant_storage=storage, compress_statistics=nested)
    kind, x = kind_of(layer), torch.randn(3, 128)
    if packed:
        layer.eval()(x)
    weight, state, bits = layer.weight, layer.quant_state, stored(layer)
    new = kind.dense(layer) + 0.01 * torch.randn(96, 128)
    held: list = []
    kind.replace(layer, new, held.append)
    (kept,) = held
    now = layer.weight
    assert type(now) is type(weight) and now.dtype == storage and kind.dtype(layer) == torch.bfloat16
    assert now.quant_state.nested == nested and now.quant_state.blocksize == state.blocksize
    # a code's place is within half of the widest gap (0.304 of NF4), a scale within 1 % of the block's largest entry
    largest = new.view(-1, 64).abs().amax(1).repeat_interleave(64).view(96, 128)
    assert ((kind.dense(layer) - new).abs() <= (0.152 + 0.01) * largest).all()
    got = layer.train()(x)
    torch.testing.assert_close(got, x @ kind.dense(layer).t() + layer.bias, rtol=0.03, atol=0.03)  # bfloat16
    quantised.restore(layer, kept)
    assert layer.weight is weight and layer.quant_state is state and torch.equal(stored(layer), bits)


@pytest.mark.parametrize("used", [False, True])
def test_eight_bits_replaced_and_restored(used):
    layer = linear8bit().eval()
    kind, x = kind_of(layer), torch.randn(3, 128)
    if used:
        layer(x)
    weight, state, before = layer.weight, layer.state, kind.dense(layer)
    new = before + 0.01 * torch.randn(96, 128)
    held: list = []
    kind.replace(layer, new, held.append)
    (kept,) = held
    # half a step of 1/127 of each row's largest entry, and float16
    step = new.abs().amax(1, keepdim=True) / 127
    assert ((kind.dense(layer) - new).abs() <= step * (0.5 + 1e-2) + 1e-3 * new.abs()).all()
    assert layer.state.threshold == state.threshold == 6.0
    y = layer.train()(x)
    torch.testing.assert_close(y, x @ kind.dense(layer).t() + layer.bias, rtol=1e-4, atol=1e-4)
    quantised.restore(layer, kept)
    assert layer.weight is weight and layer.state is state and torch.equal(kind.dense(layer), before)


def test_what_is_not_ready_says_so():
    fresh = bnb.nn.Linear4bit(16, 16)
    with pytest.raises(ValueError, match="not quantised yet"):
        kind_of(fresh).check(fresh)
    fresh = bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)
    with pytest.raises(ValueError, match="not quantised yet"):
        kind_of(fresh).check(fresh)
    fresh = bnb.nn.Linear8bitLt(16, 16).to("cpu")
    with pytest.raises(ValueError, match="has_fp16_weights=False"):
        kind_of(fresh).check(fresh)
    kind_of(linear4bit()).check(linear4bit())
    kind_of(linear8bit()).check(linear8bit())


# -- the branch beside such a base: x may be of any dtype, whatever the basis is kept in ------------------------------

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("basis", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("given", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("call", ["linear", "linear_add_"])
def test_a_basis_in_another_dtype_is_cast(call, given, basis):
    from helpers import linear_case

    case = linear_case((5,), dtype=given, bias=False).replace(weight=None)
    U, V = case.U.to(basis), case.V.to(basis)
    s, o, x = (t.clone().requires_grad_() for t in (case.s, case.o, case.x))
    want = ops.linear(x, None, None, U.to(given), V.to(given), case.S0, s, o)
    dy = torch.randn_like(want)
    expected = torch.autograd.grad(want, (x, s, o), dy)
    if call == "linear":
        got = ops.linear(x, None, None, U, V, case.S0, s, o)
    else:
        got = ops.linear_add_(torch.zeros_like(want), x, U, V, case.S0, s, o)
    assert got.dtype == given and torch.equal(got, want)
    for ours, theirs in zip(torch.autograd.grad(got, (x, s, o), dy), expected, strict=True):
        assert torch.equal(ours, theirs)
