# SPDX-License-Identifier: Apache-2.0
"""cuSOLVER's SVD drivers: right factors in every layout, every limit refused in words, every failure reported.

On stand-ins for cuSOLVER, which check how it is called; the factors also on a card.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from backends import Backend, make_backend
from torch import Tensor

METHODS = {"gesvd": 4, "gesvdj": 5, "gesvdp": 6, "gesvda": 7, "gesvdr": 8}  # SvdMethod of csrc/core/svd_plan.h
CALLS = {
    "gesvd": "cusolverDnXgesvd",
    "gesvdj": "cusolverDnSgesvdj",
    "gesvdp": "cusolverDnXgesvdp",
    "gesvda": "cusolverDnSgesvdaStridedBatched",
    "gesvdr": "cusolverDnXgesvdr",
}
INT32_MAX = 2**31 - 1
# Of every figure below, relative to 1 or to the largest singular value; gesvda squares a condition of up to 30.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}

Driver = Callable[[Tensor, str, int], tuple[Tensor, Tensor, Tensor]]


class Emulated(NamedTuple):
    operators: Backend
    standins: Any  # torch.ops.osora_standins: tests/emulation/standins/operators.cpp

    def driver(self, weight: Tensor, method: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.operators.svd_driver(weight, METHODS[method], rank)


@pytest.fixture
def emulated() -> Iterator[Emulated]:
    """Nothing that a test asks for may be refused by a stand-in."""
    backend = make_backend("emulated")
    backend.svd_driver  # noqa: B018  (skips where the build has none)
    standins = torch.ops.osora_standins
    standins.reset()
    standins.set("capability", 80)  # cuBLAS gets a workspace of 4 MiB, not 32
    yield Emulated(backend, standins)
    assert standins.refusals() == []
    assert standins.faults_left() == 0
    standins.reset()


@pytest.fixture(params=["emulated", "cuda"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """U, S, V of a weight by a driver; on a card by way of osora::truncated_svd, which certifies them."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated").driver
    backend = make_backend("cuda")

    def certified(weight: Tensor, method: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V, residuals, *_ = backend.truncated_svd([weight], rank, 1e-3, 0, [0], method)
        assert residuals.isfinite().all()
        return U[0], S[0], V[0]

    return certified


def matrix(d: int, k: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[d, k] with `rank` singular values from 1 down and the others far below: no driver has an excuse."""
    count = min(d, k)
    sigma = 0.9 ** torch.arange(count, dtype=torch.float64)
    sigma[rank:] *= 1e-4
    U = torch.linalg.qr(torch.randn(d, count, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(k, count, dtype=torch.float64))[0]
    return ((U * sigma) @ V.T).to(dtype)


def check(weight: Tensor, rank: int, U: Tensor, S: Tensor, V: Tensor) -> None:
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert U.dtype == S.dtype == V.dtype == work
    assert U.shape == (weight.shape[0], rank) and S.shape == (rank,) and V.shape == (weight.shape[1], rank)
    assert U.is_contiguous() and S.is_contiguous() and V.is_contiguous()
    tolerance = TOLERANCE[work]
    exact = weight.double()
    truth = torch.linalg.svdvals(exact)[:rank]
    U, S, V = U.double(), S.double(), V.double()
    assert (S - truth).abs().max() <= tolerance * truth[0]
    assert (exact @ V - U * S).abs().max() <= tolerance * truth[0]
    assert (exact.T @ U - V * S).abs().max() <= tolerance * truth[0]
    for basis in (U, V):
        assert (basis.T @ basis - torch.eye(rank, dtype=torch.float64)).abs().max() <= 10 * tolerance


SHAPES = [(40, 24, 6), (24, 40, 6), (32, 32, 5), (32, 32, 30), (3, 300, 1), (300, 3, 1)]
WHOLE = [(1, 1, 1), (1, 9, 1), (9, 1, 1), (12, 12, 12), (20, 8, 8), (8, 20, 8), (8, 20, 7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d, k, rank", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_factors(driver: Driver, method, d, k, rank, dtype):
    weight = matrix(d, k, rank, dtype)
    before = weight.clone()
    check(weight, rank, *driver(weight, method, rank))
    assert weight.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d, k, rank", WHOLE)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "gesvdr"])
def test_every_triplet(driver: Driver, method, d, k, rank, dtype):
    weight = matrix(d, k, rank, dtype)
    check(weight, rank, *driver(weight, method, rank))


@pytest.mark.parametrize("method", METHODS)
def test_strided_weights(driver: Driver, method):
    wide = matrix(60, 48, 6)
    for weight in (wide[::2, ::3], wide.T, wide[5:, 7:].T):
        check(weight, 4, *driver(weight, method, 4))


@pytest.mark.parametrize("exponent", [-90, 120])
@pytest.mark.parametrize("method", METHODS)
def test_a_power_of_two_changes_no_digit(driver: Driver, method, exponent):
    """Without scaling the Gram matrix of gesvda would be zero or infinite."""
    weight = matrix(24, 16, 5)
    U, S, V = driver(weight * 2.0**exponent, method, 5)
    S = S * 2.0**-exponent
    check(weight, 5, U, S, V)
    if method != "gesvdr":  # which draws new numbers on a card
        expected = driver(weight, method, 5)
        assert U.equal(expected[0]) and S.equal(expected[1]) and V.equal(expected[2])


@pytest.mark.parametrize("method", METHODS)
def test_zeros(emulated: Emulated, method):
    _, S, _ = emulated.driver(torch.zeros(9, 7), method, 3)
    assert S.equal(torch.zeros(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(driver: Driver, bad):
    weight = matrix(9, 7, 2)
    weight[3, 4] = bad
    with pytest.raises(ValueError, match="a weight has NaN or infinite entries"):
        driver(weight, "gesvd", 2)


@pytest.mark.parametrize("method", METHODS)
def test_one_wait_and_no_memory_kept(emulated: Emulated, method):
    weight = matrix(24, 16, 5)
    emulated.driver(weight, method, 5)  # makes the handles
    before = emulated.standins.counts()
    emulated.driver(weight, method, 5)
    after = emulated.standins.counts()
    # gesvdp waits by itself, to give the host its h_err_sigma
    assert after["host_waits"] - before["host_waits"] == (2 if method == "gesvdp" else 1)
    for name in ("live_bytes", "live_allocations", "live_objects"):
        assert after[name] == before[name], name


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info, message", [(3, "did not converge"), (-4, "found one of its arguments wrong")])
@pytest.mark.parametrize("method", METHODS)
def test_info(emulated: Emulated, method, info, message):
    emulated.standins.inject(CALLS[method], info=info)
    with pytest.raises(RuntimeError, match=rf"cuSOLVER's {method} {message} \(info = {info}\)"):
        emulated.driver(matrix(24, 16, 5), method, 5)


@pytest.mark.parametrize("method", METHODS)
def test_status(emulated: Emulated, method):
    weight = matrix(24, 16, 5)
    emulated.standins.inject(CALLS[method], status=6)
    with pytest.raises(RuntimeError, match=f"{method}: cuSOLVER status 6"):
        emulated.driver(weight, method, 5)
    emulated.standins.inject(f"{CALLS[method]}_bufferSize", status=3)
    with pytest.raises(RuntimeError, match=f"{method}, workspace size: cuSOLVER status 3"):
        emulated.driver(weight, method, 5)


@pytest.mark.parametrize(
    "call", ["cusolverDnCreateGesvdjInfo", "cusolverDnXgesvdjSetTolerance", "cusolverDnXgesvdjSetMaxSweeps"]
)
def test_parameters_of_gesvdj(emulated: Emulated, call):
    weight = matrix(24, 16, 5)
    emulated.driver(weight, "gesvdj", 5)
    objects = emulated.standins.counts()["live_objects"]
    emulated.standins.inject(call, status=2)
    with pytest.raises(RuntimeError, match=f"{call}: cuSOLVER status 2"):
        emulated.driver(weight, "gesvdj", 5)
    assert emulated.standins.counts()["live_objects"] == objects


@pytest.mark.parametrize("method", METHODS)
def test_no_memory(emulated: Emulated, method):
    weight = matrix(24, 16, 5)
    emulated.driver(weight, method, 5)
    live = emulated.standins.counts()["live_bytes"]
    emulated.standins.inject("allocate", nth=4, status=1)  # cuBLAS's workspace, A, U, S
    with pytest.raises(RuntimeError, match="out of device memory"):
        emulated.driver(weight, method, 5)
    assert emulated.standins.counts()["live_bytes"] == live


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def limits() -> Callable[[str, int, int, int], None]:
    """core::refuse_driver, which needs no CUDA."""
    operator = make_backend("emulated").svd_driver_limits
    return lambda method, d, k, rank: operator(METHODS[method], d, k, rank, 4)


@pytest.mark.parametrize("d, k", [(64, 100), (100, 64), (64, 64)])
def test_gesvdr_needs_room_for_oversampling(limits, d, k):
    limits("gesvdr", d, k, 62)
    message = r'method "gesvdr" needs rank <= min\(out_features, in_features\) - 2 = 62, got 63'
    with pytest.raises(ValueError, match=message):
        limits("gesvdr", d, k, 63)
    with pytest.raises(ValueError, match=r"= -1, got 1"):
        limits("gesvdr", 1, k, 1)


@pytest.mark.parametrize(
    "method, most, reason",
    [("gesvdj", INT32_MAX // 4, "an int counts its workspace"), ("gesvda", INT32_MAX, "an int counts its entries")],
)
def test_sizes_in_int(limits, method, most, reason):
    for k in (1, 7, 4096):
        d = most // k
        limits(method, d, k, 1)
        limits(method, k, d, 1)
        for shape in ((d + 1, k), (k, d + 1)):
            message = rf'method "{method}" needs out_features \* in_features <= {most}: {reason}; got '
            with pytest.raises(ValueError, match=message + rf"{shape[0]} \* {shape[1]}$"):
                limits(method, *shape, 1)


@pytest.mark.parametrize("method", ["gesvd", "gesvdp"])
def test_no_limits(limits, method):
    limits(method, 2**20, 2**20, 2**20)


def test_a_workspace_beyond_int():
    operator = make_backend("emulated").svd_driver_workspace
    operator(METHODS["gesvdj"], INT32_MAX)
    with pytest.raises(ValueError, match=r'method "gesvdj" asks for a workspace of -2147483648 numbers: the count has'):
        operator(METHODS["gesvdj"], -(2**31))


def test_refused_before_any_call(emulated: Emulated):
    with pytest.raises(ValueError, match=r'method "gesvdr" needs rank'):
        emulated.driver(matrix(9, 7, 6), "gesvdr", 6)
    assert not any("gesvdr" in name for name in emulated.standins.counts())
