# SPDX-License-Identifier: Apache-2.0
"""Matrices whose singular triplets are known, with the spectra of a language model's layers.

``W = T_U Σ T_Vᵀ``: each T is three rounds of random signs and a discrete Hartley transform, so it is orthogonal for
every size and costs n² log n. It is not uniformly distributed, but no method here can tell: its entries spread evenly
over rows and columns, and a Gaussian start sees the same in every basis.

W is made in float64, where it is right to some 1e-15, and rounded once. Each entry then moves by 2⁻²⁴ of itself at
most, at random: the singular values asked for stay true to 1e-7 relative (measured: 1e-8), and the true vectors have
residuals of some 5e-8 (checked before a matrix is used). Vectors next to a relative gap γ move by that much over γ.
Rounding to 16 bits moves far more: such matrices get the truth of a real layer, float64 LAPACK on what was rounded.
"""

from dataclasses import dataclass
from typing import Any

import models
import torch
from measure import Refused
from torch import Tensor

# SmolLM2-135M-Instruct (4-bit GGUF, as examples/demo_assets.py reads it), block 15. Of each layer's 576 singular
# values those at NODES; between them, log σ is linear in log (i + ½), which gives back the first 200 to 1.5 % and all
# but the smallest to 5 %.
BLOCK, POINTS = 15, 576
LAYERS = {"gate": "mlp.gate_proj", "down": "mlp.down_proj", "query": "self_attn.q_proj"}
# fmt: off
NODES = (
    0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 19, 25, 31, 39, 50, 63, 79, 100, 127, 160, 203, 256, 324, 410, 518, 547, 561, 568,
    572, 574, 575,
)
STORED = {
    "gate": (
        22.547, 18.225, 17.745, 17.479, 17.115, 16.227, 15.932, 15.406, 15.036, 14.602, 14.207, 13.61, 12.967, 12.405,
        11.699, 11.122, 10.534, 9.8622, 9.1317, 8.3603, 7.5637, 6.6887, 5.6797, 4.5355, 3.1171, 2.6723, 2.3837, 2.1482,
        1.7117, 1.495, 1.0051,
    ),
    "down": (
        30.33, 16.62, 15.833, 15.636, 15.375, 14.829, 14.286, 13.817, 13.528, 12.989, 12.607, 12.167, 11.713, 11.323,
        10.843, 10.425, 9.9419, 9.4204, 8.8309, 8.1856, 7.3993, 6.5693, 5.5972, 4.4957, 3.1004, 2.6457, 2.3866, 2.1905,
        2.0629, 1.9479, 1.629,
    ),
    "query": (
        18.503, 18.197, 17.206, 15.425, 14.615, 13.862, 13.525, 13.145, 12.919, 12.548, 12.071, 11.392, 10.938, 9.6493,
        8.64, 7.7318, 6.7514, 5.8511, 4.9897, 4.1258, 3.289, 2.481, 1.6782, 0.92539, 0.26881, 0.12844, 0.067978,
        0.034203, 0.020374, 0.0070506, 0.0033682,
    ),
}
# fmt: on
JITTER = 3e-4
REAL = {(1536, 576): "mlp.gate_proj", (576, 1536): "mlp.down_proj", (576, 576): "self_attn.q_proj"}
KINDS = (*STORED, "real")
LAPACK_UP_TO = 2048  # columns; beyond it a float64 SVD takes minutes, the eigenvectors of a Gram matrix half of one
# What the true vectors' residuals on the rounded matrix may be, over σ₁.
ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass
class Truth:
    """The first r triplets in float64, and the singular value that follows them (0 where none does)."""

    U: Tensor
    S: Tensor
    V: Tensor
    next: float

    def top(self, rank: int) -> "Truth":
        """Its first triplets."""
        after = float(self.S[rank]) if rank < len(self.S) else self.next
        return Truth(self.U[:, :rank], self.S[:rank], self.V[:, :rank], after)

    @property
    def gap(self) -> float:
        """Relative, after the last triplet: what its vectors' accuracy hangs on."""
        return 1 - self.next / float(self.S[-1]) if self.S[-1] > 0 else 0.0


@dataclass
class Matrices:
    """Equal shapes: what is decomposed, and the truth of each."""

    weight: Tensor  # [batch, d, k]
    truth: list[Truth]
    origin: str


# -- spectra ---------------------------------------------------------------------------------------------------------


class Source:
    """SmolLM2's layers where the demo's package is installed, else (for spectra) the stored numbers; loaded once."""

    def __init__(self, which: str = "auto") -> None:
        self.which = which
        self._blocks: Any = None

    def blocks(self) -> Any:
        """The model's blocks; Refused with the cure where it cannot be had."""
        if self._blocks is None:
            model: Any = models.load_stored("smollm2", "float32", "cpu", BLOCK + 1)
            self._blocks = model.model.layers
        return self._blocks

    def spectrum(self, kind: str) -> tuple[Tensor, Tensor, str]:
        """Places in (0, 1), the singular values there, and where they come from."""
        if self.which != "stored":
            try:
                weight = self.blocks()[BLOCK].get_submodule(LAYERS[kind]).weight
                values = torch.linalg.svdvals(weight.detach().double())
                places = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
                return places, values, "SmolLM2's own singular values"
            except Refused:
                if self.which == "smollm2":
                    raise
        places = (torch.tensor(NODES, dtype=torch.float64) + 0.5) / POINTS
        return places, torch.tensor(STORED[kind], dtype=torch.float64), f"{len(NODES)} stored points of SmolLM2's"


def stretch(places: Tensor, values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` singular values, descending: log σ linear in log place, level beyond the ends, then the jitter."""
    at = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).log()
    known, logs = places.log(), values.log()
    right = torch.searchsorted(known, at).clamp(1, len(known) - 1)
    share = ((at - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    smooth = (logs[right - 1] + share * (logs[right] - logs[right - 1])).exp()
    jitter = torch.randn(count, dtype=torch.float64, generator=generator)
    return (smooth * (1 + JITTER * jitter)).sort(descending=True).values


# -- matrices --------------------------------------------------------------------------------------------------------


def _hartley(columns: Tensor) -> Tensor:
    """The orthonormal discrete Hartley transform of each column, symmetric and its own inverse."""
    frequencies = torch.fft.fft(columns, dim=0, norm="ortho")
    return frequencies.real - frequencies.imag


def rotate(columns: Tensor, signs: Tensor) -> Tensor:
    """T times a matrix, some columns at a time (the transform is complex, and several times as large)."""
    parts = []
    for part in columns.split(512, dim=1):
        for sign in signs:
            part = _hartley(part * sign[:, None])
        parts.append(part)
    return torch.cat(parts, dim=1)


def signs(count: int, generator: torch.Generator) -> Tensor:
    """±1 for three rounds."""
    return torch.randint(2, (3, count), generator=generator).double() * 2 - 1


def known(d: int, k: int, S: Tensor, rank: int, generator: torch.Generator, device: str) -> tuple[Tensor, Truth]:
    """W [d, k] in float64 with the singular values S [min(d, k)], and its first `rank` triplets."""
    S = S.to(device)
    left, right = (signs(n, generator).to(device) for n in (d, k))
    diagonal = torch.zeros(d, k, dtype=torch.float64, device=device)
    diagonal.diagonal().copy_(S)
    W = rotate(rotate(diagonal, left).T, right).T.contiguous()
    unit = torch.eye(max(d, k), rank, dtype=torch.float64, device=device)
    after = float(S[rank]) if rank < len(S) else 0.0
    return W, Truth(rotate(unit[:d], left), S[:rank], rotate(unit[:k], right), after)


def by_float64(W: Tensor, rank: int) -> Truth:
    """LAPACK's SVD, or for large matrices eigenvectors of the Gram matrix: σ to 1e-15 (σ₁ / σ)² relative."""
    W = W.double()
    if min(W.shape) <= LAPACK_UP_TO:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    elif W.shape[0] < W.shape[1]:
        turned = by_float64(W.mT, rank)
        return Truth(turned.V, turned.S, turned.U, turned.next)
    else:
        values, V = torch.linalg.eigh(W.mT @ W)
        S, V = values.flip(0).clamp_min(0).sqrt(), V.flip(1)
        U = W @ V[:, :rank] / S[:rank]
    after = float(S[rank]) if rank < len(S) else 0.0
    return Truth(U[:, :rank].clone(), S[:rank].clone(), V[:, :rank].clone(), after)


def residual(W: Tensor, truth: Truth) -> float:
    """The largest of ‖Wᵀu − σv‖ and ‖Wv − σu‖, over σ."""
    W = W.double()
    sides = (W.mT @ truth.U - truth.V * truth.S, W @ truth.V - truth.U * truth.S)
    return max(float((torch.linalg.vector_norm(side, dim=0) / truth.S).max()) for side in sides)


def make(
    kind: str, d: int, k: int, batch: int, rank: int, dtype: torch.dtype, device: str, seed: int, source: Source
) -> Matrices:
    """`batch` matrices [d, k] and the first `rank` triplets of each; Refused where the truth does not hold."""
    weights, truths = [], []
    if kind == "real":
        blocks, name = source.blocks(), REAL[d, k]
        if batch > len(blocks):
            raise Refused(f"real layers come in batches of at most {len(blocks)}, got {batch}")
        for number in range(batch):
            weight = blocks[BLOCK - number].get_submodule(name).weight.detach().to(device, dtype)
            weights.append(weight)
            truths.append(by_float64(weight, rank))
        return Matrices(torch.stack(weights), truths, f"SmolLM2's {name}, block {BLOCK} and before")
    places, values, origin = source.spectrum(kind)
    for number in range(batch):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        S = stretch(places, values, min(d, k), generator)
        exact, truth = known(d, k, S, rank, generator, device)
        weight = exact.to(dtype)
        del exact
        if dtype not in ROUNDED:
            truth = by_float64(weight, rank)
        elif not (left := residual(weight, truth) * float(truth.S[-1] / truth.S[0])) <= ROUNDED[dtype]:
            raise Refused(f"the known triplets of {kind} {d}x{k} fit only to {left:.1e}: nothing was measured")
        weights.append(weight)
        truths.append(truth)
    return Matrices(torch.stack(weights), truths, origin)
