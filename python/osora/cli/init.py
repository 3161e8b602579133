# SPDX-License-Identifier: Apache-2.0
"""The command that makes a basis."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import osora
from osora.cli.output import REFUSED, Output, command, whole_bytes
from osora.files.basis import INDEX_FILE
from osora.initialisation.rate import product_rate


def _list(values: list[str] | None) -> list[str] | str | None:
    """Names, or one regular expression, as configs take them."""
    if values and len(values) == 1 and any(sign in values[0] for sign in r"\^$*+?{}[]|()"):
        return values[0]
    return values or None


def _config(
    r: int, targets: list[str] | None, exclude: list[str] | None, ranks: list[str] | None, tol: float, seed: int
) -> osora.OsoraConfig:
    pattern = {}
    for each in ranks or ():
        name, sign, rank = each.rpartition("=")
        if not sign or not rank.isdecimal():
            raise ValueError(f"--rank-pattern takes NAME=RANK, as q_proj=32, got {each!r}")
        pattern[name] = int(rank)
    given: dict[str, Any] = {} if targets is None else {"target_modules": _list(targets)}
    return osora.OsoraConfig(r=r, exclude_modules=_list(exclude), rank_pattern=pattern, tol=tol, seed=seed, **given)


def _checked(output: Output, out: Path, base: Path, sample: int) -> None:
    found = osora.check_basis(out, base, sample=sample)
    for layer in found.measured:
        output.say(f"{layer.name}: residual {layer.residual:.1e}, certified {layer.certified:.1e}")
    bad = [layer.name for layer in found.measured if not layer.ok]
    output.say(
        f"{out}: {found.layers} layers, all whole; {len(found.measured)} measured, "
        + (f"LESS EXACT THAN THEY CLAIM: {', '.join(bad)}" if bad else "as exact as they claim")
    )
    layers = [asdict(layer) | {"ok": layer.ok} for layer in found.measured]
    output.finish({"ok": found.ok, "fingerprint": found.fingerprint, "layers": found.layers, "measured": layers})
    if not found.ok:
        raise typer.Exit(REFUSED)


def _planned(output: Output, plan: osora.InitialisationPlan, flops_per_second: float) -> None:
    seconds = plan.flops / flops_per_second
    output.say(str(plan))
    output.say(f"time      {seconds:10.0f} s at the {flops_per_second / 1e9:.0f} GFLOP/s that a product ran at here")
    numbers = {key: getattr(plan, key) for key in ("bytes_read", "bytes_written", "flops", "memory", "bytes_free")}
    layers = [
        {"name": layer.name, "shape": list(layer.target.weight.shape), "rank": layer.target.rank}
        for layer in plan.layers
    ]
    output.finish(numbers | {"seconds": seconds, "layers": layers})


def init(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, in safetensors files.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(help="Folder of the basis; the same command goes on in it.", show_default=False)
    ],
    r: Annotated[int, typer.Option("--rank", "--r", help="It serves every rank up to it.", min=1)] = 64,
    tol: Annotated[float, typer.Option(help="Largest residual of a singular triplet.")] = 1e-3,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that module names end in, or one regular expression; again for more. All linear "
            "layers but the output head if not given.",
            show_default=False,
        ),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option(help="Names, or one regular expression, to leave out.", show_default=False)
    ] = None,
    rank_pattern: Annotated[
        list[str] | None, typer.Option(help="NAME=RANK for modules that differ from --r.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the decompositions' random start.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help='To decompose in: "auto", float32, bfloat16, float16, float64.')] = "auto",
    part: Annotated[
        str | None,
        typer.Option(
            help="Which of several processes this one is: 3/8. torchrun says it by itself.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda:1; a card if there is one.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the arithmetic on a CPU.", min=1, show_default=False)] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(help="Bytes that a decomposition may take.", metavar="BYTES", min=1, show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a layer that reaches no certificate.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it costs.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check a finished basis: every file, and the certificates of some layers.")
    ] = False,
    sample: Annotated[int, typer.Option(help="With --check: how many layers are measured.", min=0)] = 8,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and no progress bars.")] = False,
) -> None:
    """Decompose a model's weights once, and keep the basis for every adapter to come.

    The model is not loaded: each weight is read, decomposed and forgotten. Whatever ends the command, the same command
    goes on; under torchrun, or with --part on any machines that share OUT, several processes do it together.

    **Examples**

    `osora init ./SmolLM2-135M ./basis --r 128`

    `torchrun --nproc-per-node 8 -m osora init ./Llama-3-70B ./basis`

    `osora init ./SmolLM2-135M ./basis --check`
    """
    with command(json) as output:
        if check:
            if (base / INDEX_FILE).is_file() and not (out / INDEX_FILE).is_file():
                base, out = out, base  # in whichever order they were named
            _checked(output, out, base, sample)
            return
        config = _config(r, target_modules, exclude_modules, rank_pattern, tol, seed)
        if dry_run:
            plan = osora.plan_initialisation(base, out, config, dtype=dtype, device=device)
            _planned(output, plan, product_rate(device))
            return
        began = time.perf_counter()
        done = osora.initialise(
            base,
            out,
            config,
            dtype=dtype,
            part=part,
            device=device,
            threads=threads,
            max_memory=max_memory,
            unconverged="raise" if strict else "warn",
            progress=output.bars,
        )
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in out.iterdir())
        output.say(
            f"{len(done.computed)} layers decomposed, {done.kept} that were there checked, of {done.layers}, in "
            f"{seconds:.1f} s; {whole_bytes(size)} in {out}"
        )
        output.say(f"osora.attach(model, config, basis={str(out)!r}) reads it")
        output.finish(
            {
                "folder": str(out),
                "fingerprint": done.fingerprint,
                "layers": done.layers,
                "computed": list(done.computed),
                "kept": done.kept,
                "unconverged": list(done.unconverged),
                "seconds": asdict(done.times),
                "bytes": size,
            }
        )


__all__ = ["init"]
