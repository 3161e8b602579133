# SPDX-License-Identifier: Apache-2.0
"""Every operator once on a device, each against float64 there: what a card should be asked before anything else.

  python bench/gpu_smoke.py [--device cuda|cpu] [--small]

A line for each check, as it ends; what fails does not stop the rest. Tensors that are unaligned or strided are made
so on the device: the tests move theirs there, which lays them out anew. --small: small shapes alone, for a tool that
makes everything slow (and on a CPU). Exit code: 0 all right, 1 some failed, 3 the card's context broke and the
rest was left out.
"""

import argparse
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import clock
import gpu_modules
import measure
import spectra
import torch
from gpu_modules import relative
from torch import Tensor

import osora
from osora import ops, reference
from osora.svd.arguments import METHOD_NAMES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Norm of the error over the norm of the result. float32: sums of up to 11008 terms; 16 bits: one or two roundings.
LIMIT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SVD_LIMIT = 1e-4  # what a residual may be off, what vectors may lack of orthonormal
SMALL, LARGE = [(77, 130, 17), (96, 64, 16)], [(4096, 4096, 64), (11008, 4096, 64)]  # d, k, r
op = torch.ops.osora


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def worst(**errors: float) -> dict[str, float]:
    """The largest, NaN the largest of all, and each by name."""
    return {"error": max(value if value == value else float("inf") for value in errors.values()), **errors}


def doubles(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers, one number behind a 16-byte boundary."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16
    return moved


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with others between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
    return wide[..., 1::2].copy_(tensor)


class Checks:
    """Runs checks on a device, tells each, and counts those that failed."""

    def __init__(self, device: str) -> None:
        self.device, self.count, self.failed = device, 0, 0

    def __call__(self, name: str, call: Callable[[], Any], limit: float = 0.0) -> None:
        """`call` gives an error, or facts with one called "error"."""
        began, facts = time.perf_counter(), {}
        try:
            found = call()
            measure.synchronise(self.device)
            facts = dict(found) if isinstance(found, dict) else {"error": float(found)}
            right = facts["error"] <= limit  # NaN is not
        except Exception as error:  # told, and the next check goes on
            right, facts = False, {"exception": f"{type(error).__name__}: {error}"[:400]}
            traceback.print_exc(limit=-3)
        self.count, self.failed = self.count + 1, self.failed + (not right)
        facts |= {"limit": limit, "seconds": round(time.perf_counter() - began, 3)}
        print("ok  " if right else "FAIL", name, json.dumps(facts, default=str), flush=True)
        measure.append_line({"benchmark": "smoke", "case": {"check": name, "ok": right, **facts}})
        text = facts.get("exception", "")
        if "CUDA error" in text and "out of memory" not in text:
            print(f"the card's context is broken: {self.count} checks were made, {self.failed} failed", flush=True)
            sys.exit(3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    # -- the operators -------------------------------------------------------------------------------------------------

    def case(self, n: int, d: int, k: int, r: int, dtype: torch.dtype) -> list[Tensor]:
        """x, W, bias, U, V, S0, s, o; singular vectors where the rank allows them."""
        exact = reference.accumulate_dtype(dtype)
        U, V = (
            (torch.linalg.qr(self.random(m, r).double())[0] if r <= m else self.random(m, r) / r**0.5).to(dtype)
            for m in (d, k)
        )
        base = [self.random(n, k).to(dtype), (self.random(d, k) / k**0.5).to(dtype), self.random(d).to(dtype)]
        S0 = torch.linspace(2, 1, r, device=self.device).to(exact)
        return [*base, U, V, S0, (0.1 * self.random(r)).to(exact), (0.1 * self.random(d)).to(exact)]

    def linear(self, n: int, d: int, k: int, r: int, dtype: torch.dtype, lay: Callable[[Tensor], Tensor]) -> Any:
        """linear and linear_backward, of tensors laid out by `lay`."""
        a = self.case(n, d, k, r, dtype)
        dy, wide = self.random(n, d).to(dtype), doubles(a)
        y, h = op.linear(*(lay(tensor) for tensor in a))
        true_y, true_h = reference.linear(*wide)
        _, W, _, U, V, S0, s, o = (lay(tensor) for tensor in a)
        found = op.linear_backward(lay(dy), lay(h), W, U, V, S0, s, o, True, True, True)
        _, W, _, U, V, S0, s, o = wide
        true = reference.linear_backward(dy.double(), true_h, W, U, V, S0, s, o)
        gradients = {name: relative(*pair) for name, *pair in zip(("dx", "ds", "do"), found, true, strict=True)}
        return worst(y=relative(y, true_y), h=relative(h, true_h), **gradients)

    def halves(self, dtype: torch.dtype) -> Any:
        """down and up, and linear_trained with its derivative, against linear's."""
        x, W, bias, U, V, S0, s, o = self.case(50, 96, 64, 16, dtype)
        true, true_h = reference.linear(*doubles((x, W, bias, U, V, S0, s, o)))
        h = op.down(x, V)
        y = op.up(x, h, W, bias, U, S0, s, o)
        for tensor in (x, s, o):
            tensor.requires_grad_()
        trained = op.linear_trained(x, W, bias, U, V, S0, s, o, False)
        dy = self.random(50, 96).to(dtype)
        found = torch.autograd.grad(trained, (x, s, o), dy)
        wide = doubles(tensor.detach() for tensor in (W, U, V, S0, s, o))
        wanted = reference.linear_backward(dy.double(), true_h, *wide)
        gradient = max(relative(*pair) for pair in zip(found, wanted, strict=True))
        return worst(h=relative(h, true_h), y=relative(y, true), trained=relative(trained, true), gradient=gradient)

    def fold(self, d: int, r: int, dtype: torch.dtype, lay: Callable[[Tensor], Tensor]) -> Any:
        """fold and fold_backward; fold_many beside another layer gives fold's bits."""
        _, _, _, U, _, S0, s, o = self.case(1, d, 8, r, dtype)
        P = self.random(d, r).to(S0)
        D = op.fold(*(lay(tensor) for tensor in (U, S0, s, o)))
        both = op.fold_many(*([lay(tensor), tensor] for tensor in (U, S0, s, o)))
        assert all(torch.equal(D, other) for other in both), "fold_many's bits are not fold's"
        found = op.fold_backward(*(lay(tensor) for tensor in (U, P, S0, s, o)), True, True)
        true = reference.fold_backward(*doubles((U, P, S0, s, o)))
        errors = {name: relative(*pair) for name, *pair in zip(("ds", "do"), found, true, strict=True)}
        return worst(D=relative(D, reference.fold(*doubles((U, S0, s, o)))), **errors)

    def linear_add(self, n: int, dtype: torch.dtype) -> Any:
        x, _, _, *adapter = self.case(n, 96, 64, 16, dtype)
        y = self.random(n, 96).to(dtype)
        true = y.double() + reference.linear(x.double(), None, None, *doubles(adapter))[0]
        h = op.linear_add_(y, x, *adapter)
        return worst(y=relative(y, true), h=relative(h, x.double() @ adapter[1].double()))

    def linear_multi(self, n: int, dtype: torch.dtype) -> Any:
        """Three adapters of different ranks; a third of the rows has none."""
        x, W, bias, U, V, S0, s, _ = self.case(n, 96, 64, 16, dtype)
        many = [0.1 * self.random(3, size).to(s) for size in (16, 96)]
        index = torch.arange(n, device=self.device) % 4 - 1
        ranks = torch.tensor([16, 5, 9], device=self.device)
        true = reference.linear_multi(*doubles((x, W, bias, U, V, S0, *many)), index, ranks)
        return relative(op.linear_multi(x, W, bias, U, V, S0, *many, index, ranks), true)

    def sorsa(self, n: int, dtype: torch.dtype) -> Any:
        x, W, bias, U, V, S0, s, _ = self.case(n, 96, 64, 16, dtype)
        u, v = (0.1 * self.random(m, 16).to(s) for m in (96, 64))
        a, dy = (x, W, bias, U, S0, V, u, s, v), self.random(n, 96).to(dtype)
        y, h = op.sorsa_linear(*a)
        true, true_h = reference.sorsa_linear(*doubles(a))
        found = op.sorsa_linear_backward(dy, x, h, W, U, S0, V, u, s, v, True, True, True, True)
        wanted = reference.sorsa_linear_backward(*doubles((dy, x)), true_h, *doubles((W, U, S0, V, u, s, v)))
        names = ("dx", "du", "ds", "dv")
        errors = {name: relative(*pair) for name, *pair in zip(names, found, wanted, strict=True)}
        return worst(y=relative(y, true), h=relative(h, true_h), **errors)

    def effective(self, n: int, dtype: torch.dtype) -> Any:
        """The materialised weight: used, made again after o has changed, and dropped."""
        _, W, _, U, V, S0, s, o = a = self.case(n, 96, 64, 16, dtype)
        dy = self.random(n, 96).to(dtype)
        before = relative(op.linear_effective(*a, True)[0], reference.linear(*doubles(a))[0])
        o.mul_(-2)
        op.effective_refresh(W, U, V, S0, s, o)
        y, h = op.linear_effective(*a, True)
        true, true_h = reference.linear(*doubles(a))
        found = op.linear_effective_backward(dy, h, W, U, V, S0, s, o, True, True, True)
        wanted = reference.linear_backward(dy.double(), true_h, *doubles((W, U, V, S0, s, o)))
        kept = len(op.effective_kept(W, o))
        op.effective_drop(W, o)
        assert (kept, len(op.effective_kept(W, o))) == (1, 0), "W_eff was not kept, or not dropped"
        errors = {name: relative(*pair) for name, *pair in zip(("dx", "ds", "do"), found, wanted, strict=True)}
        return worst(before=before, y=relative(y, true), **errors)

    # -- the card alone ------------------------------------------------------------------------------------------------

    def graph(self, n: int) -> dict[str, Any]:
        """A step captured and replayed with other numbers gives what a step gives that was not."""
        x, W, _, U, V, S0, s, o = self.case(n, 96, 64, 16, torch.bfloat16)
        wanted = [tensor.requires_grad_() for tensor in (x, s, o)]

        def step() -> list[Tensor]:
            y = ops.linear(x, W, None, U, V, S0, s, o)
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]

        replay, results = clock.Card("cuda").capture(step)
        with torch.no_grad():
            for tensor in wanted:
                tensor.normal_(std=0.1)
        replay()
        kept = [tensor.clone() for tensor in results]
        again = step()
        same = all(torch.equal(*pair) for pair in zip(kept, again, strict=True))
        return {"error": max(relative(*pair) for pair in zip(kept, again, strict=True)), "same_bits": same}

    def two_streams(self) -> dict[str, Any]:
        """Two threads with a stream each, against one after the other: handles, workspaces, the allocator."""
        weights = [torch.randn(512, 384, device=self.device) for _ in range(4)]
        weights = [weight * torch.logspace(0, -2, 384, device=self.device) for weight in weights]

        def run(weight: Tensor) -> Any:
            return osora.truncated_svd(weight, 8, method="lanczos")

        alone: list[Any] = [run(weight) for weight in weights]
        other: list[Any] = [None] * len(weights)

        def work(numbers: tuple[int, ...]) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                for number in 3 * numbers:
                    other[number] = run(weights[number])
                torch.cuda.current_stream().synchronize()

        measure.synchronise(self.device)
        threads = [threading.Thread(target=work, args=(numbers,)) for numbers in ((0, 1), (2, 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        same = all(torch.equal(a.U, b.U) for a, b in zip(alone, other, strict=True))
        return {"error": max(relative(b.S, a.S) for a, b in zip(alone, other, strict=True)), "same_bits": same}

    # -- the SVD -------------------------------------------------------------------------------------------------------

    def svd(self, weights: Tensor, rank: int, method: str = "auto", tol: float = 1e-3) -> dict[str, Any]:
        """A batch: both sides of every triplet, the residuals that are reported, orthonormal vectors."""
        found = osora.truncated_svd(weights, rank, method=method, tol=tol)
        W, U, S, V = (tensor.double() for tensor in (weights, found.U, found.S, found.V))
        left = (W.mT @ U - V * S[:, None]).norm(dim=-2) / S
        right = (W @ V - U * S[:, None]).norm(dim=-2) / S
        eye = torch.eye(rank, dtype=torch.float64, device=self.device)
        lacks = max(float((side.mT @ side - eye).abs().max()) for side in (U, V))
        excess = float((left.cpu() - found.residuals).abs().max())
        facts = worst(residual_excess=excess, other_side=float(right.max()), orthogonality=lacks)
        facts |= {"residual": float(found.residuals.max()), "passes": found.passes.tolist()}
        if not bool(found.converged.all()):
            facts |= {"error": float("inf"), "converged": found.converged.tolist()}
        return facts

    def method(self, method: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        """Two matrices whose singular values are 1/i."""
        U, S, Vh = torch.linalg.svd(self.random(2, *shape).double(), full_matrices=False)
        S = 1 / torch.arange(1, S.shape[-1] + 1, device=self.device, dtype=torch.float64)
        return self.svd(((U * S) @ Vh).to(dtype), 8, method, tol=0.5 if method == "lowrank" else 1e-3)

    def known(self, d: int, k: int, rank: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
        """A language model's spectrum; where float32 keeps what is known of it, the singular values too. Whether the
        bits are the same again, and alone, is told and not judged."""
        made = spectra.make("gate", d, k, batch, rank, torch.float32, self.device, 0, spectra.Source("stored"))
        weight = made.weight.to(dtype)
        facts = self.svd(weight, rank)
        if dtype == torch.float32:
            found = osora.truncated_svd(weight, rank)
            sigma = [((S.double() - true.S) / true.S).abs().max() for S, true in zip(found.S, made.truth, strict=True)]
            facts["sigma"] = float(max(sigma))
            facts["error"] = max(facts["error"], facts["sigma"])
            facts["same_bits_again"] = torch.equal(found.U, osora.truncated_svd(weight, rank).U)
            facts["same_bits_alone"] = torch.equal(found.U[-1], osora.truncated_svd(weight[-1], rank).U)
        return facts


def run(check: Checks, small: bool) -> None:
    on_card = check.device != "cpu"

    def dense(tensor: Tensor) -> Tensor:
        return tensor

    for dtype in DTYPES:
        name, limit = short(dtype), LIMIT[dtype]
        for d, k, r in SMALL if small else [*SMALL, *LARGE]:
            for n in (1, 3, 8, 9, 200):
                size = (n, d, k, r, dtype)
                check(f"linear {name} {d}x{k} r{r} n{n}", lambda size=size: check.linear(*size, dense), limit)
        for n in (1, 4, 8, 33):
            for lay in (unaligned, strided):
                size = (n, 80, 64, 16, dtype)
                about = f"linear {lay.__name__} {name} n{n}"
                check(about, lambda size=size, lay=lay: check.linear(*size, lay), limit)
        for d, r, lay in ((300, 40, dense), (131, 257, dense), (7, 5, dense), (300, 40, unaligned), (300, 40, strided)):
            about = f"fold {lay.__name__} {name} {d}x{r}"
            check(about, lambda d=d, r=r, lay=lay, dtype=dtype: check.fold(d, r, dtype, lay), limit)
        check(f"down, up, linear_trained {name}", lambda dtype=dtype: check.halves(dtype), 2 * limit)
        check(f"linear_add_ {name}", lambda dtype=dtype: check.linear_add(70, dtype), limit)
        check(f"linear_multi {name}", lambda dtype=dtype: check.linear_multi(50, dtype), 2 * limit)
        check(f"sorsa_linear {name}", lambda dtype=dtype: check.sorsa(50, dtype), 2 * limit)
        check(f"linear_effective {name}", lambda dtype=dtype: check.effective(70, dtype), 2 * limit)
        for rows in (40, 700):  # of the second, siblings share a product
            about = f"layers together {name} n{rows}"
            check(about, lambda rows=rows, dtype=dtype: gpu_modules.together(check.device, dtype, rows), 8 * limit)
    for rows in (1, 8):
        for both in (False, True):
            about = f"decode of a block n{rows}{', together' if both else ''}"
            asked = (check.device, torch.bfloat16, rows, both)
            check(about, lambda asked=asked: gpu_modules.decode(*asked), 4 * LIMIT[torch.bfloat16])
    if on_card:
        check("a graphed block", lambda: gpu_modules.graphed(torch.bfloat16, 300), LIMIT[torch.bfloat16])
    if on_card and not small:
        check("W_eff on two streams", lambda: gpu_modules.effective_on_two_streams(check.device), 1e-4)
    if on_card:
        check("graph, split", lambda: check.graph(64), LIMIT[torch.bfloat16])
        check("graph, decode", lambda: check.graph(4), LIMIT[torch.bfloat16])
    for method in METHOD_NAMES:
        if on_card or not method.startswith("gesvd"):  # cuSOLVER's
            for dtype in DTYPES:
                for shape in ((300, 200), (200, 300)):
                    about = f"truncated_svd {method} {short(dtype)} {shape[0]}x{shape[1]}"
                    asked = (method, shape, dtype)
                    check(about, lambda asked=asked: check.method(*asked), SVD_LIMIT)
    if on_card:
        check("two threads, two streams", check.two_streams, 1e-5)
    d, k, rank = (256, 192, 16) if small else (4096, 4096, 64)
    for dtype, times, batch in ((0, 1, 1), (0, 1, 8), (0, 2, 1), (1, 1, 1), (1, 1, 8)):
        asked = (d, k, rank * times, batch, DTYPES[dtype])
        about = f"truncated_svd known {short(DTYPES[dtype])} {d}x{k} r{rank * times} batch {batch}"
        check(about, lambda asked=asked: check.known(*asked), SVD_LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, **osora.build_info()}, default=str), flush=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return 1
    if options.device == "cuda" and not osora.build_info()["cuda"]:
        print("osora was built without CUDA: nothing was checked", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    check = Checks(options.device)
    run(check, options.small or options.device == "cpu")
    print(f"{check.count} checks, {check.failed} failed", flush=True)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
