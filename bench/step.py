# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one training step (forward, backward, AdamW) against the same model frozen.

The peers share the base's weights and adapt the same linear layers at the same rank; they run in turn in one process:
  frozen     no adapter; a gradient flows through every layer to the embeddings, as it does for an adapter
  osora      osora.attach
  together   the same with set_execution(together=True); only if asked for
  op-by-op   the paper's formula in plain torch
  vera, lora PEFT's, with adapters in the base's dtype (--peft-float32: PEFT's own default)
Peak memory comes from one process per peer. "Saved" is what autograd keeps for the backward in the whole model beside
parameters and buffers, each storage once.

First osora's loss and its gradients of o and s are compared with those of the op-by-op model in float32. If they are
wrong, nothing is timed and the exit code is 1.
"""

import argparse
import copy
import json
import sys
from typing import Any

import clock
import loading
import measure
import models
import peers
import torch
from measure import Refused, Run, check_device, console, interleaved, show_bytes, show_ratio, show_seconds, table
from peers import ABOUT, PEERS, USUAL, Peer
from torch import Tensor, nn

from osora import adapted_layers
from osora.config import OsoraConfig
from osora.layers.base_weight import oriented_weight
from osora.model.targets import find_targets

# Largest relative error (norm of all of them together) of the gradients of o and of s; a tenth of it for the loss. A
# 16-bit model rounds every activation; how far its gradients are off is measured on plain torch too, and osora's may
# be off by half as much again, not more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.1}
THAN_PLAIN_TORCH = 1.5


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Step:
    """One training step of a peer, as a function without arguments."""

    def __init__(self, peer: Peer, tokens: Tensor) -> None:
        self.model, self.tokens = peer.model, tokens
        # A learning rate of 0 is the same work, and every repetition starts from the same numbers.
        self.optimiser = torch.optim.AdamW(peer.trained, lr=0.0) if peer.trained else None

    def __call__(self) -> None:
        if self.optimiser:
            self.optimiser.zero_grad(set_to_none=True)
        loss_of(self.model, self.tokens).backward()
        if self.optimiser:
            self.optimiser.step()


def gradients(peer: Peer, tokens: Tensor) -> tuple[float, Tensor, Tensor]:
    """The loss, and the gradients of every o (or O) and of every s (or S), in float64, one after the other."""
    for parameter in peer.trained:
        parameter.grad = None
    loss = loss_of(peer.model, tokens)
    loss.backward()
    found = [parameter.grad.detach().double().flatten() for parameter in peer.trained]
    for parameter in peer.trained:
        parameter.grad = None
    return float(loss.detach()), torch.cat(found[0::2]), torch.cat(found[1::2])


def check(ours: Peer, plain: Peer, dtype: str, tokens: Tensor) -> dict[str, Any]:
    """Relative errors of osora and of plain torch against the op-by-op model in float32; Refused if osora's are large.

    For a float32 model that model is `plain` itself.
    """
    truth = plain if dtype == "float32" else peers.make_op_by_op(copy.deepcopy(ours.model).float())
    expected = gradients(truth, tokens)
    names = ("loss", "grad_o", "grad_s")
    report: dict[str, Any] = {"against": "op-by-op OSoRA in float32", "tolerance": TOLERANCE[dtype]}
    for who, peer in (("osora", ours), ("op_by_op", plain)):
        errors = {}
        for name, got, true in zip(names, gradients(peer, tokens), expected, strict=True):
            got, true = torch.as_tensor(got).double(), torch.as_tensor(true).double()
            errors[name] = float((got - true).norm() / true.norm())
        report[who] = errors
    for name in names:
        error, plain_error = report["osora"][name], report["op_by_op"][name]
        limit = TOLERANCE[dtype] * (0.1 if name == "loss" else 1)
        if dtype != "float32" and name != "loss":
            limit = min(limit, THAN_PLAIN_TORCH * plain_error)
        if not error <= limit:  # NaN too
            raise Refused(
                f"{dtype}: osora's {name} is off by {error:.1e}, relative (limit {limit:.1e}): nothing is timed"
            )
    return report


def graphs_of(steps: dict[str, Step], options: argparse.Namespace) -> tuple[dict[str, measure.Timing], dict[str, str]]:
    """On a card: forward and backward, without the optimiser, as replays of a graph; and why there is none of some."""
    card = clock.card_of(options.device)
    if card is None:
        return {}, {}
    calls = {name: lambda step=step: loss_of(step.model, step.tokens).backward() for name, step in steps.items()}
    replays, reasons = clock.graphs(calls, card)
    if not replays:
        return {}, reasons
    return interleaved(replays, options.repetitions, warm_up=options.warm_up, device=options.device), reasons


def saved_bytes(peer: Peer, tokens: Tensor) -> int:
    """What autograd keeps for the backward, parameters and buffers left out."""
    known = (*peer.model.parameters(), *peer.model.buffers())
    # D of layers that work together, [d, r] as U, is not kept under the hooks that count
    together = [layer.U for layer in adapted_layers(peer.model).values() if layer.together]
    return measure.saved_bytes(lambda: loss_of(peer.model, tokens), known) + sum(U.nbytes for U in together)


def floor(base: nn.Module, rank: int) -> dict[str, float]:
    """Products with an adapter over products without: in the adapted layers, and with the output head counted.

    A frozen layer does two products of n·k·d, the adapter 2k + 3d columns of n·r.
    """
    targets = find_targets(base, OsoraConfig(r=rank))
    shapes = [(*oriented_weight(target.module).shape, target.rank) for target in targets]
    extra, frozen = sum(r * (2 * k + 3 * d) for d, k, r in shapes), sum(2 * k * d for d, k, _ in shapes)
    head = base.get_output_embeddings()
    return {"linears": 1 + extra / frozen, "with_head": 1 + extra / (frozen + 2 * head.weight.numel())}


def make_tokens(base: nn.Module, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    size = (options.batch, options.tokens)
    return torch.randint(base.config.vocab_size, size, generator=generator).to(options.device)


def child(options: argparse.Namespace) -> int:
    """Peak memory of one peer: prints one line of JSON."""
    (name,), (dtype,) = options.peers, options.dtype
    base = loading.load(options.model, dtype, options.device, options.layers)
    peer = peers.make([name], base, options.rank, options.seed, options.peft_float32)[name]
    step = Step(peer, make_tokens(base, options))
    del base
    loaded = measure.memory_now(options.device)
    reset = measure.reset_peak(options.device)
    for _ in range(2):  # the second has the optimiser's state
        step()
    peak = measure.peak_memory(options.device)
    print(json.dumps({"loaded": loaded, "peak": peak, "reset": reset}))
    return 0


def memory(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one peer, from a process of its own."""
    keys = ("model", "rank", "batch", "tokens", "threads", "device", "seed", "layers")
    given = [(f"--{key}", str(getattr(options, key))) for key in keys if getattr(options, key) is not None]
    flags = ["--peft-float32"] if options.peft_float32 else []
    arguments = [word for pair in given for word in pair]
    return measure.run_child([__file__, "--child", "--peers", name, "--dtype", dtype, *arguments, *flags])


def run_dtype(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One dtype: load, check, count, time, show."""
    base = loading.load(options.model, dtype, options.device, options.layers)
    tokens = make_tokens(base, options)
    # osora and its twin are always there, for the check.
    names = [name for name in PEERS if name in {*options.peers, "osora", "op-by-op"}]
    made = peers.make(names, base, options.rank, options.seed, options.peft_float32)
    if "together" in made:
        check(made["together"], made["op-by-op"], dtype, tokens)
    report = check(made["osora"], made["op-by-op"], dtype, tokens)
    console.print(
        f"{dtype}: osora's gradients are right (o {report['osora']['grad_o']:.1e}, s {report['osora']['grad_s']:.1e} "
        f"relative; op by op {report['op_by_op']['grad_o']:.1e}, {report['op_by_op']['grad_s']:.1e}). Timing."
    )
    count = len(adapted_layers(made["osora"].model))
    made = {name: peer for name, peer in made.items() if name in options.peers}
    saved = {name: saved_bytes(peer, tokens) for name, peer in made.items()}
    steps = {name: Step(peer, tokens) for name, peer in made.items()}
    times = interleaved(steps, options.repetitions, warm_up=options.warm_up, device=options.device)
    replays, reasons = graphs_of(steps, options)
    trained = {name: sum(p.numel() for p in peer.trained) for name, peer in made.items()}
    least = floor(base, options.rank)
    del steps, made, base
    peaks = {name: memory(name, dtype, options) for name in saved} if options.memory else {}

    rows, results, graph_lines = [], {}, []
    for name, timing in times.items():
        facts = {"seconds": timing.as_dict(), "saved_bytes": saved[name], "trained": trained[name]}
        facts["memory_bytes"] = peaks.get(name)
        if name in replays:
            facts["graph"] = replays[name].as_dict()
            if name != "frozen" and "frozen" in replays:
                over = replays[name].ratio(replays["frozen"])
                facts["graph_over_frozen"] = dict(zip(("median", "min", "max"), over, strict=True))
                graph_lines.append(f"{ABOUT[name]} / frozen in a graph: {show_ratio(over)}")
        elif name in reasons:
            facts["no_graph"] = reasons[name]
        cells = {"frozen": "", "osora": ""}
        for other, text in (("frozen", "over_frozen"), ("osora", "osora_over_this")):
            if other in times and name != other and (other, name) != ("osora", "frozen"):
                ratio = timing.ratio(times["frozen"]) if other == "frozen" else times["osora"].ratio(timing)
                facts[text] = dict(zip(("median", "min", "max"), ratio, strict=True))
                cells[other] = show_ratio(ratio)
        results[name] = facts
        more = f"+{show_bytes(saved[name] - saved['frozen'])}" if "frozen" in saved and name != "frozen" else ""
        peak = f"{show_bytes(peaks[name]['peak'])}" if name in peaks else "not measured"
        first = [ABOUT[name], show_seconds(timing), cells["frozen"], cells["osora"]]
        rows.append([*first, peak, show_bytes(saved[name]), more, f"{trained[name]:,}"])
    where = f"{models.label(options.model)}, {dtype}, {options.batch}×{options.tokens} tokens, r = {options.rank}"
    columns = ("peer", "step (min-max)", "/ frozen", "osora / this", "peak memory", "saved", "/ frozen", "trained")
    table(f"Training step: {where}, {count} layers adapted", columns, rows)
    for line in graph_lines:
        console.print(line)
    console.print(
        f"By arithmetic alone osora / frozen is {least['linears']:.3f} in the adapted layers and at most "
        f"{least['with_head']:.3f} in the whole model, whose output head no adapter touches."
    )
    return {"dtype": dtype, "layers": count, "check": report, "floor": least, "peers": results}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=models.CHOICES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="per sequence")
    parser.add_argument("--peers", nargs="+", default=list(USUAL), choices=PEERS)
    parser.add_argument("--peft-float32", action="store_true", help="PEFT's adapters in float32 in a 16-bit model")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = models.parse(parser, argv)
    if options.quick:
        options.batch, options.tokens = 2, 24
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        check_device(options.device)
        if options.child:
            return child(options)
        keys = ("rank", "batch", "tokens", "layers", "repetitions", "warm_up", "quick", "seed", "peft_float32")
        settings = {"model": models.label(options.model)} | {key: getattr(options, key) for key in keys}
        run = Run("step", options.device, settings)
        results = []
        for dtype in options.dtype:
            results.append(run_dtype(dtype, options))
            run.case(results[-1])
        run.finish({"results": results}, options.output)
    except Refused as reason:
        print(f"refused: {reason}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
