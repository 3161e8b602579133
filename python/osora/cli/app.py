# SPDX-License-Identifier: Apache-2.0
"""The commands that look at saved adapters and turn them into other things."""

import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import osora
from osora.cli.init import init
from osora.cli.output import REFUSED, Output, command, print_json, silence, whole_bytes
from osora.cli.train import train
from osora.files.format import CONFIG_FILE

app = typer.Typer(
    name="osora",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Fine-tune Hugging Face models by training only singular values and output scales.

    An adapter is a folder that `osora.save_adapter` or `osora train` wrote. A base is a folder with a model in
    safetensors files, as `model.save_pretrained` writes it. Nothing is downloaded. ADAPTER and BASE may change places.

    **Exit codes**: 0 done; 1 refused: a damaged adapter, another base, a check that failed; 2 not usable: a wrong
    option, a file that is not there, an output that is; 3 a package is missing; 4 unexpected, out of memory say; 130
    interrupted; 141 the pipe that stdout goes to is closed; 143 a training was stopped by SIGTERM, with a checkpoint.
    """,
)

Adapter = Annotated[Path, typer.Argument(help="Folder of a saved adapter.", show_default=False)]
Base = Annotated[Path, typer.Argument(help="Folder of the base model, in safetensors files.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and no progress bars.")]
MaxMemory = Annotated[
    int | None,
    typer.Option(help="Bytes that computing a basis again may take.", metavar="BYTES", min=1, show_default=False),
]


def _in_order(adapter: Path, base: Path) -> tuple[Path, Path]:
    """Adapter and base, whichever was named first: the adapter's folder is the one that has an adapter's config."""
    if (base / CONFIG_FILE).is_file() and not (adapter / CONFIG_FILE).is_file():
        return base, adapter
    return adapter, base


def _version(wanted: bool) -> None:
    if wanted:
        print(osora.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version of osora.")
    ] = False,
) -> None:
    pass


def _ranks(info: osora.AdapterInfo) -> str:
    least, most = info.ranks
    return str(most) if least == most else f"{least} to {most}"


def _described(info: osora.AdapterInfo) -> dict[str, Any]:
    return {
        "folder": str(info.folder),
        "method": info.method,
        "format_version": info.format_version,
        "base_model": info.base_model,
        "layers": len(info.modules),
        "ranks": list(info.ranks),
        "trainable": info.trainable,
        "has_basis": info.has_basis,
        "bytes": info.bytes,
        "max_residual": info.max_residual,
        "converged": info.converged,
        "config": info.config.to_dict(),
        "modules": [asdict(module) for module in info.modules],
        "whole": [asdict(module) for module in info.whole],
    }


def _show(output: Output, info: osora.AdapterInfo) -> None:
    dtypes = sorted({module.dtype for module in info.modules})
    basis = "in the file" if info.has_basis else "not in the file: loading computes it again from the base"
    exact = "every triplet within tol" if info.converged else "NOT ALL TRIPLETS WITHIN TOL"
    rows = {
        "method": info.method,
        "base": info.base_model or "not named in the file",
        "layers": f"{len(info.modules)}, their weights in {', '.join(dtypes)}",
        "rank": _ranks(info),
        **({"trained whole": ", ".join(f"{w.name} ({w.numbers:,})" for w in info.whole)} if info.whole else {}),
        "numbers trained": f"{info.trainable:,}",
        "basis": basis,
        "certificate": f"largest residual {info.max_residual:.1e}, {exact} (tol {info.config.tol:g})",
        "on disk": whole_bytes(info.bytes),
    }
    output.table(rows, str(info.folder))


@app.command()
def info(
    adapter: Adapter,
    modules: Annotated[bool, typer.Option("--modules", help="A line for every layer, too.")] = False,
    json: Json = False,
) -> None:
    """Say what an adapter is: method, ranks, size, and how exact its SVD is.

    The whole folder is read and checked: every digest, every number. The base is not needed.

    **Examples**

    `osora info my-adapter`

    `osora info my-adapter --json | jq .max_residual`
    """
    with command(json) as output:
        found = osora.adapter_info(adapter)
        _show(output, found)
        if modules:
            for m in found.modules:
                output.say(
                    f"{m.name}  {m.out_features} x {m.in_features}  rank {m.rank}  residual {m.max_residual:.1e}"
                )
        output.finish(_described(found))


@app.command()
def verify(adapter: Adapter, base: Base, max_memory: MaxMemory = None, json: Json = False) -> None:
    """Check an adapter against its base model: is it the one, and is the basis as exact as it claims?

    Runs all the checks of loading, then measures the residual of every singular triplet in float64. The model is not
    loaded: one weight is in memory at a time. Exit code 1 if anything is wrong.

    **Examples**

    `osora verify my-adapter ./SmolLM2-135M`
    """
    with command(json) as output:
        adapter, base = _in_order(adapter, base)
        found = osora.verify_adapter(adapter, base, max_memory=max_memory, progress=output.bars)
        bad = [module for module in found.modules if not module.ok]
        rounded = sum(not module.same_bits for module in found.modules)
        for module in bad:
            output.say(f"{module.name}: residual {module.residual:.1e}, allowed {module.allowed:.1e}")
        exact = max(module.orthonormal for module in found.modules)
        output.table(
            {
                "base weights": f"{len(found.modules)} of {len(found.modules)} are the adapter's"
                + (f", {rounded} of them rounded to another dtype" if rounded else ", to the last bit"),
                "residual": f"{found.residual:.1e} measured, {max(m.certified for m in found.modules):.1e} certified",
                "orthonormality": f"off by {exact:.1e} at most",
                "verdict": "as it claims to be" if found.ok else f"{len(bad)} LAYERS ARE LESS EXACT THAN THEY CLAIM",
            },
            f"{adapter} on {base}",
        )
        checks = [asdict(module) | {"ok": module.ok} for module in found.modules]
        output.finish({"ok": found.ok, "residual": found.residual, "modules": checks})
        if not found.ok:
            raise typer.Exit(REFUSED)


@app.command()
def merge(
    adapter: Adapter,
    base: Base,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Write a copy of a model with the adapter merged into its weights.

    The model is not loaded: one weight is in memory at a time, so that a model larger than the memory can be merged.
    Config and tokenizer are copied. OUT appears when all of it is on the disk.

    **Examples**

    `osora merge my-adapter ./SmolLM2-135M ./SmolLM2-135M-tuned`
    """
    with command(json) as output:
        adapter, base = _in_order(adapter, base)
        with output.bar("merging") as step:  # closed before a line is said, which would go on in the bar's
            done = osora.merge_saved(base, adapter, out, max_memory=max_memory, progress=output.bars, on_weight=step)
        output.say(f"{len(done.merged)} weights merged, {len(done.copied)} other files copied, into {done.folder}")
        if done.added:
            output.say(f"new in it, of modules trained whole: {', '.join(done.added)}")
        if done.left_out:
            output.say(f"left out: {', '.join(done.left_out)}")
        names = {key: list(getattr(done, key)) for key in ("merged", "added", "copied", "left_out")}
        output.finish({"folder": str(done.folder)} | names)


@app.command("export-lora")
def export_lora(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder to write the LoRA to.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model; needed for an adapter without its basis.", show_default=False),
    ] = None,
    equal_ranks: Annotated[
        bool | None,
        typer.Option(
            "--equal-ranks/--own-ranks",
            help="Fill up to the largest rank, for programs that know one rank only; or say that none is meant.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write an adapter as a plain LoRA, which PEFT and others load without osora.

    Exact to rounding: OSoRA of rank r is a LoRA of rank r, SORSA one of rank 2r.

    **Examples**

    `osora export-lora my-adapter my-lora`

    `osora export-lora small-adapter my-lora --base ./SmolLM2-135M`
    """
    with command(json) as output:
        osora.export_lora(adapter, out, base, equal_ranks=equal_ranks)
        output.say(f"written to {out}; PeftModel.from_pretrained(base, {str(out)!r}) loads it")
        output.finish({"folder": str(out), "bytes": sum(p.stat().st_size for p in out.iterdir() if p.is_file())})


@app.command()
def card(adapter: Adapter, json: Json = False) -> None:
    """Write a model card (README.md) into an adapter's folder, or bring it up to date; what you wrote in it stays.

    **Examples**

    `osora card my-adapter`
    """
    with command(json) as output:
        path = osora.write_card(adapter)
        output.say(f"written: {path}")
        output.finish({"card": str(path)})


app.command()(init)
app.command()(train)

_WrongWords: Any = typer.BadParameter.__mro__[2]  # ClickException, click's or of typer's own copy


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line's exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold anything
    try:
        try:
            code = app(args=words, prog_name="osora", standalone_mode="--json" not in words)
        except SystemExit as end:
            code = end.code
        except _WrongWords as error:
            code = error.exit_code
            print_json({"error": error.format_message(), "exit_code": code, "warnings": []})
        sys.stdout.flush()
    except BrokenPipeError:
        return silence()
    return code if isinstance(code, int) else 0
