# SPDX-License-Identifier: Apache-2.0
"""The part --multi of bench/linear.py: 64 adapters in one batch of 64 rows, each row with its own, without gradients.

All share the base weight, U, V and S0; an adapter is one s [r] and one o [d]. The peers, in turn:
  frozen    the base layer alone
  one       osora.ops.linear: one adapter for all rows, the reference
  multi     osora.ops.linear_multi: each row has its own
  in-turn   osora.ops.linear for one row after the other
  gathered  plain torch, op by op, with the rows' vectors gathered
  lora      PEFT LoRA's layer with `adapter_names`, as many adapters of the same rank

Before that each row of `multi`, of `gathered` and of `in-turn` is compared with float64, as bench/linear.py does.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import clock
import layers
import measure
import models
import torch
from measure import Refused, interleaved, show_ratio, show_seconds
from torch import Tensor

from osora import ops

ROWS = ADAPTERS = 64
ABOUT = {
    "frozen": "frozen linear",
    "one": "osora, one adapter",
    "multi": f"osora, {ADAPTERS} adapters",
    "in-turn": "osora, row after row",
    "gathered": "plain torch, op by op",
    "lora": f"PEFT LoRA, {ADAPTERS} adapters",
}
TOLERANCE = {"float32": 3e-5, "bfloat16": 1.5e-2, "float16": 2e-3}  # of a row, relative; reasons in linear.py
OF_PLAIN_TORCH = 5


def gathered(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, S0: Tensor, s: Tensor, o: Tensor, index: Tensor
) -> Tensor:
    """``y = x Wᵀ + o ⊙ ((h ⊙ S) Uᵀ) + (h ⊙ s) Uᵀ`` with the s and o of each row."""
    h, s_rows = x @ V, s[index]
    scaled, changed = (h * (S0 + s_rows)).to(x.dtype), (h * s_rows).to(x.dtype)
    return x @ weight.t() + o[index].to(x.dtype) * (scaled @ U.t()) + changed @ U.t()


def lora(basis: layers.Basis, rank: int, index: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's layer with an adapter for each row."""
    layer = layers.make_peft(basis, "lora", rank, ADAPTERS)
    names = [layers.adapter_name(number) for number in index.tolist()]
    return lambda x: layer(x, adapter_names=names)


def error(found: Tensor, true: Tensor) -> float:
    """The worst row, over the size of a row."""
    worst = (found.double() - true).norm(dim=1).max()
    return float(worst / true.norm() * len(true) ** 0.5)


def run(dtype: str, options: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """All shapes and ranks in one dtype, each told as it ends."""
    found = []
    for d, k in options.multi_shapes:
        for rank in options.multi_ranks:
            shape = layers.Shape("given", d, k, False)
            size = (d * k + ROWS * (d + k)) * models.DTYPES[dtype].itemsize
            sets = clock.sets_for(clock.card_of(options.device), size)
            bases = [
                layers.make_basis(shape, rank, models.DTYPES[dtype], options.device, options.seed + 1000 * number)
                for number in range(sets)
            ]
            with torch.no_grad():
                found.append(run_case(dtype, bases, rank, options))
            tell(found[-1])
    return found


@dataclass
class Batch:
    """The peers as functions without arguments, and what they were made of."""

    calls: dict[str, Callable[[], Tensor]]
    true: Callable[[], Tensor]


def make(basis: layers.Basis, rank: int, seed: int, with_lora: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    weight = basis.linear.weight
    d, k = weight.shape
    one = layers.make_osora(basis, rank, seed)
    s = torch.randn(ADAPTERS, rank, generator=generator).to(one.s) * one.s.std()
    o = torch.randn(ADAPTERS, d, generator=generator).to(one.o) * 0.3
    x = torch.randn(ROWS, k, generator=generator).to(weight)
    index = torch.randperm(ADAPTERS, generator=generator).to(x.device)
    frozen_factors = (one.U, one.V, one.S0)
    names = index.tolist()

    def alone(rows: Tensor, number: int) -> Tensor:
        return ops.linear(rows, weight, None, *frozen_factors, s[number], o[number])

    calls: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: basis.linear(x),
        "one": lambda: alone(x, 0),
        "multi": lambda: ops.linear_multi(x, weight, None, *frozen_factors, s, o, index),
        "in-turn": lambda: torch.cat([alone(x[row : row + 1], number) for row, number in enumerate(names)]),
        "gathered": lambda: gathered(x, weight, *frozen_factors, s, o, index),
    }
    if with_lora:
        layer = lora(basis, rank, index)
        calls["lora"] = lambda: layer(x)
    return Batch(calls, lambda: truth(x, weight, one, s, o, index))


def run_case(dtype: str, bases: list[layers.Basis], rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Make, check, time, show. On a card several batches, each with a weight of its own, take turns."""
    d, k = bases[0].linear.weight.shape
    title = f"{ADAPTERS} adapters, {ROWS} rows, {d}×{k}, r = {rank}, {dtype}"
    batches = [make(basis, rank, options.seed, "lora" in options.peers) for basis in bases]
    errors = check(title, dtype, batches[0].calls, batches[0].true())
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: [batch.calls[name]() for batch in batches] for name in batches[0].calls
    }
    card, sets = clock.card_of(options.device), len(batches)
    count = max(options.repetitions, 15 if options.spend else 0)
    times = interleaved(calls, count, warm_up=1, device=options.device, each=sets)
    replays, reasons = clock.graphs(calls, card) if card else ({}, {})
    graphs = interleaved(replays, count, warm_up=1, device=options.device, each=sets) if replays else {}
    lines, facts = [], []
    for name, timing in times.items():
        about: dict[str, Any] = {"peer": name, "seconds": timing.as_dict()}
        over, shown = timing.ratio(times["one"]), ""
        about |= {"over_one": middle_of(over), "error": errors.get(name)}
        if name in graphs:
            about["graph"] = graphs[name].as_dict()
            if "one" in graphs:
                about["graph_over_one"] = middle_of(graphs[name].ratio(graphs["one"]))
                shown = f"{about['graph_over_one']['median']:.3f}"
        if name in reasons:
            about["no_graph"] = reasons[name]
        wrong = f"{errors[name]:.0e}" if name in errors else ""
        lines.append([ABOUT[name], show_seconds(timing), "" if name == "one" else show_ratio(over), shown, wrong])
        facts.append(about)
    measure.table(title, ("peer", "time (min-max)", "/ one adapter", "in a graph", "error"), lines)
    about = {"dtype": dtype, "d": d, "k": k, "rank": rank, "adapters": ADAPTERS, "rows": ROWS}
    return {**about, "sets": sets, "peers": facts}


def middle_of(ratio: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("median", "min", "max"), ratio, strict=True))


def truth(x: Tensor, weight: Tensor, one: Any, s: Tensor, o: Tensor, index: Tensor) -> Tensor:
    """In float64, [ROWS, d]: ``D = U ⊙ (o (S0 + s) + s)`` for each row."""
    x, weight, U, V, S0 = (tensor.double() for tensor in (x, weight, one.U, one.V, one.S0))
    rows = [row @ V @ (U * (b[:, None] * (S0 + a) + a)).t() for row, a, b in zip(x, s[index], o[index], strict=True)]
    return x @ weight.t() + torch.stack(rows)


def check(title: str, dtype: str, calls: dict[str, Callable[[], Tensor]], true: Tensor) -> dict[str, float]:
    """Errors of the peers that compute this; Refused if one is wrong, `multi` first of all."""
    errors = {name: error(calls[name](), true) for name in ("multi", "in-turn", "gathered")}
    for name, found in errors.items():
        limit = TOLERANCE[dtype] * (OF_PLAIN_TORCH if name == "gathered" else 1)
        if not found <= limit:  # NaN too
            who = "this benchmark's own peer" if name == "gathered" else "osora's answer"
            raise Refused(f"{title}: {who} ({ABOUT[name]}) is off by {found:.1e}, relative (limit {limit:.1e})")
    return errors
