# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD of CUDA tensors, on a card: against float64, alone and in a batch. Skipped without one."""

import pytest
import torch
from backends import unavailable
from matrices import powers, with_spectrum

import osora
from osora.svd.truncated import decompose

pytestmark = pytest.mark.filterwarnings("default::RuntimeWarning")


@pytest.fixture(autouse=True)
def card():
    if not torch.cuda.is_available():
        unavailable("CUDA", "no CUDA card")


@pytest.mark.parametrize("method", ["auto", "lanczos", "gram", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (257, 131)])
def test_cuda_factors_are_right(shape, dtype, method):
    weight = with_spectrum(*shape, powers(min(shape), -0.5)).to(dtype)
    found = osora.truncated_svd(weight.cuda(), 8, tol=1e-3, method=method, unconverged="raise")
    truth = torch.linalg.svdvals(weight.double())[:8]
    # of second order in tol where the spectrum has gaps, and float32 rounding
    assert torch.allclose(found.S.double().cpu(), truth, rtol=1e-5, atol=0)
    U, S, V = (t.double().cpu() for t in found[:3])
    left = torch.linalg.vector_norm(weight.double().T @ U - V * S, dim=0) / S
    assert (left <= 1e-3 + 1e-6).all()
    for Q in (U, V):
        assert (Q.T @ Q - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-5


def test_cuda_batch_and_alone_agree():
    weights = [with_spectrum(320, 256, powers(256, -0.3), seed).float().cuda() for seed in range(3)]
    names = ["a", "b", "c"]
    together = decompose(weights, 8, names=names, method="lanczos")
    for weight, name, item in zip(weights, names, together, strict=True):
        alone = decompose([weight], 8, names=[name], method="lanczos")[0]
        assert item.converged and alone.converged
        assert torch.allclose(item.S, alone.S, rtol=1e-5)


def test_cuda_refuses_what_is_not_finite():
    weight = torch.randn(40, 30, device="cuda")
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        osora.truncated_svd(weight, 4)
