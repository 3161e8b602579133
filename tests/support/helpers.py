# SPDX-License-Identifier: Apache-2.0
"""Random cases, tiny models made from configs (nothing is downloaded), and the one table of tolerances."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from precision import accumulate, unit
from torch import Tensor, nn

# The largest error allowed, as a share of the sum of the sizes of all terms (see `Linear.sizes`).
TOLERANCE = {
    # every sum runs in the dtype itself; some hundred roundings that cancel like a random walk
    torch.float64: 32 * unit(torch.float64),
    torch.float32: 32 * unit(torch.float32),
    # sums run in float32; h, D, the branch and the result are each rounded to 16 bits once
    torch.bfloat16: 4 * unit(torch.bfloat16),
    torch.float16: 4 * unit(torch.float16),
}


@dataclass
class Linear:
    """The arguments of osora::linear, in its order, and a dy."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    U: Tensor
    V: Tensor
    S0: Tensor
    s: Tensor
    o: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def double(self) -> "Linear":
        return self.map(lambda t: t.detach().double())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Linear":
        return Linear(*(None if t is None else change(t) for t in self.arguments))

    def replace(self, **tensors: Tensor | None) -> "Linear":
        return replace(self, **tensors)

    def trainable(self, *names: str) -> "Linear":
        return self.replace(**{name: getattr(self, name).detach().clone().requires_grad_() for name in names})


def linear_case(
    rows: tuple[int, ...],
    k: int = 24,
    d: int = 20,
    r: int = 6,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    step: float = 0.1,
) -> Linear:
    """Random arguments of the sizes they have in a model: weights near 1/sqrt(k), an orthonormal basis."""
    exact = accumulate(dtype)
    weight = (torch.randn(d, k, dtype=torch.float64) / k**0.5).to(dtype)
    U = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64))[0].to(dtype)
    V = torch.linalg.qr(torch.randn(k, r, dtype=torch.float64))[0].to(dtype)
    S0 = 2 / (1 + torch.arange(r, dtype=exact))
    return Linear(
        torch.randn(*rows, k, dtype=torch.float64).to(dtype),
        weight,
        torch.randn(d, dtype=torch.float64).to(dtype) if bias else None,
        U,
        V,
        S0,
        step * torch.randn(r, dtype=exact),
        step * torch.randn(d, dtype=exact),
    )


@dataclass
class Expected:
    """Values in float64, and for each the sum of the sizes of its terms."""

    value: dict[str, Tensor]
    size: dict[str, Tensor]


def expected_linear(case: Linear, dy: Tensor | None = None) -> Expected:
    """y, and with dy the gradients dx, ds, do, dbias: the paper's layer W = W0 + U (O Sᵀ − 1 S0ᵀ) Vᵀ, in float64."""
    c = case.double()
    scale, S = 1 + c.o, c.S0 + c.s
    W0 = torch.zeros(len(scale), c.x.shape[-1], dtype=torch.float64) if c.weight is None else c.weight
    D = c.U * (scale[:, None] * S - c.S0)
    D_size = c.U.abs() * ((c.o[:, None] * S).abs() + c.s.abs())
    value = {"y": c.x @ (W0 + D @ c.V.t()).t()}
    size = {"y": c.x.abs() @ (W0.abs() + D_size @ c.V.abs().t()).t()}
    if c.bias is not None:
        value["y"], size["y"] = value["y"] + c.bias, size["y"] + c.bias.abs()
    if dy is not None:
        dy = dy.detach().double()
        rows, x = dy.flatten(0, -2) if dy.dim() > 1 else dy[None], c.x.flatten(0, -2) if c.x.dim() > 1 else c.x[None]
        P, P_size = rows.t() @ (x @ c.V), rows.abs().t() @ (x.abs() @ c.V.abs())
        value |= {
            "dx": dy @ (W0 + D @ c.V.t()),
            "ds": (scale[:, None] * c.U * P).sum(0),
            "do": (c.U * S * P).sum(1),
            "dbias": rows.sum(0),
        }
        size |= {
            "dx": dy.abs() @ (W0.abs() + D_size @ c.V.abs().t()),
            "ds": ((scale[:, None] * c.U).abs() * P_size).sum(0),
            "do": ((c.U * S).abs() * P_size).sum(1),
            "dbias": rows.abs().sum(0),
        }
    return Expected(value, size)


@contextmanager
def saved_tensors(*known: Tensor | None) -> Iterator[list[Tensor]]:
    """What autograd keeps for the backward, beside `known` tensors: one entry a storage."""
    storages = {t.untyped_storage().data_ptr() for t in known if t is not None}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in storages and t.numel():
            storages.add(address)
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


# -- models ----------------------------------------------------------------------------------------------------------

VOCABULARY = 97


def token_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def tiny_llama(layers: int = 2, tied: bool = True, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """A Llama with grouped-query attention: 7 linears a layer, of four shapes."""
    transformers = pytest.importorskip("transformers")
    sizes: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | config)))
    return _as_pretrained(model, dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A GPT-2: its linears are Conv1D, with the weight as [in, out]."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)
    return _as_pretrained(transformers.GPT2LMHeadModel(config), dtype)


def tiny_bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A BERT for masked words: linears with biases, a tied decoder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=64,
    )
    return _as_pretrained(transformers.BertForMaskedLM(config), dtype)


def _as_pretrained(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights as large as trained ones (the library's 0.02 makes a network that hardly depends on its input)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "bias" in "".join(n for n, p in model.named_parameters() if p is parameter):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def move_adapter(model: nn.Module, step: float = 0.05) -> nn.Module:
    """Deltas as training would leave them."""
    import osora

    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.normal_(std=step)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def run_python(program: str, *arguments: object) -> str:
    """Run a program in a new process that finds what this one finds; give back what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # other threads, other rounding
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
