# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model by training a thousandth of its numbers, and prove that nothing else changed.

Without --model and --data this is the demo: SmolLM2-135M-Instruct learns to answer GSM8K questions. With them it is
a small but complete training script for your own model. `python examples/finetune.py --help` says the rest.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is ever downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log

try:
    import matplotlib  # noqa: F401  (used at the very end; its absence should be noticed now)
    import rich  # noqa: F401
    import torch
    import transformers
except ModuleNotFoundError as missing:
    sys.exit(f"This example needs the package {missing.name!r}. Install what it uses with: pip install 'osora[demo]'")

from chat_data import DataError, Row, answer_loss, batches, encode_all, parse_row, read_jsonl, split
from demo_assets import DemoAssetError, gsm8k_rows, smollm2_folder
from evaluate import Job, basis_bytes, bytes_in, check, checksums, held_out_loss, peak_memory_gb, probe_logits, sample
from report import Phases, console, plot_losses, show_report, show_sample, whole, write_json

import osora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DESCRIPTION = """\
Fine-tune a causal language model with OSoRA: per linear layer only r shifts of singular values (s) and one scale per
output (o) are trained, about a thousandth of all numbers. The base weights are never changed.
Without --model and --data it runs the demo: SmolLM2-135M-Instruct on GSM8K questions."""
EPILOG = """\
the data: one JSON object a line, with question and answer, or prompt and completion, or messages (role, content; the
last one the assistant's), or text. The model's chat template is used if it has one. The loss counts the answer's
tokens only (of text: all).

examples:
  finetune.py --model ./my-model --data chats.jsonl
  finetune.py --model ./my-model --data chats.jsonl --r 32 --target-modules q_proj v_proj --steps 300 --lr 5e-3

the output folder: adapter/ (for osora.load_adapter), loss.png, report.json.
exit code: 0 all checks passed, 1 a check failed, 2 wrong request or data."""


class Stop(RuntimeError):
    """The request cannot be served; the message says why and what to change."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --help is meant to be read."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=_Help)
    gpu = torch.cuda.is_available()
    for title, options in {
        "what is trained on what": {
            "--model": dict(type=Path, metavar="PATH", help="folder of a Hugging Face causal LM (default: the demo's)"),
            "--data": dict(type=Path, metavar="FILE", help="JSONL file of examples (default: GSM8K questions)"),
            "--eval-rows": dict(type=int, default=32, help="rows held out of the training, chosen by the seed"),
            "--max-length": dict(type=int, default=384, help="tokens of question and answer; longer rows are left out"),
            "--output": dict(type=Path, default=Path("build/finetune"), help="folder for the results"),
        },
        "the adapter": {
            "--r": dict(type=int, default=64, help="singular triplets per layer; more: stronger and slower"),
            "--target-modules": dict(
                nargs="+", default="all-linear", metavar="NAME", help="last parts of layer names, or all-linear"
            ),
            "--exclude-modules": dict(nargs="+", metavar="NAME", help="last parts of layer names to leave alone"),
            "--dropout": dict(type=float, default=0.0, help="on the adapter's input, against overfitting"),
            "--tol": dict(
                type=float,
                default=1e-4,
                help="largest relative residual of a singular triplet; above 1e-4, use --save-basis",
            ),
            "--save-basis": dict(action="store_true", help="store U and V too: a large file that loads faster"),
        },
        "the training": {
            "--steps": dict(type=int, default=40, help="optimiser steps"),
            "--batch-size": dict(type=int, default=4, help="rows per step"),
            "--lr": dict(type=float, default=1e-2, help="relative size of a step, of scales and of singular values"),
            "--seed": dict(type=int, default=0, help="decides the split, the order, dropout and initialisation"),
            "--dtype": dict(choices=DTYPES, default="float32", help="of the model; o and s are always float32"),
            "--device": dict(default="cuda" if gpu else "cpu", help="cpu, cuda, cuda:1 ..."),
        },
    }.items():
        group = parser.add_argument_group(title)
        for name, option in options.items():
            if option.get("type") in (int, float):
                option["metavar"] = "N" if option["type"] is int else "X"
            group.add_argument(name, **option)
    arguments = parser.parse_args(argv)
    for name, least in (("r", 1), ("steps", 1), ("batch_size", 1), ("eval_rows", 1), ("max_length", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if not 0 < arguments.lr < math.inf:
        parser.error(f"--lr must be a positive number, got {arguments.lr}")
    if not 0 <= arguments.dropout < 1:
        parser.error(f"--dropout must be in [0, 1), got {arguments.dropout}")
    return arguments


def load_rows(data: Path | None) -> list[Row]:
    """The rows of a JSONL file, or of GSM8K."""
    if data is not None:
        return read_jsonl(data)
    return [parse_row(fields, f"GSM8K, row {number}") for number, fields in enumerate(gsm8k_rows())]


def load_model(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of a Hugging Face folder."""
    if not (folder / "config.json").is_file():
        raise Stop(f"--model must be the folder of a Hugging Face model; there is no {folder / 'config.json'}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise Stop(f"the model in {folder} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer


def prepare(arguments: argparse.Namespace, phases: Phases) -> Job:
    """Model and data. Whatever can be wrong with them shows here, before the long work."""
    training_rows, held_out_rows = split(load_rows(arguments.data), arguments.eval_rows, arguments.seed)
    folder = arguments.model
    if folder is None:
        with phases("convert", "finding SmolLM2-135M-Instruct (the first time it is converted to safetensors)"):
            folder = smollm2_folder()
    with phases("load", f"loading {folder.name} in {arguments.dtype}"):
        model, tokenizer = load_model(folder, arguments.dtype, arguments.device)
        train, too_long = encode_all(tokenizer, training_rows, arguments.max_length, "training")
        held_out, too_long_too = encode_all(tokenizer, held_out_rows, arguments.max_length, "held-out")
    console.print(
        f"  {len(train)} rows to train on, {len(held_out)} held out, "
        f"{too_long + too_long_too} left out as longer than {arguments.max_length} tokens"
    )
    return Job(model, tokenizer, train, held_out, "logits_to_keep" in inspect.signature(model.forward).parameters)


def attach(job: Job, arguments: argparse.Namespace) -> None:
    """Put the adapters in; all other parameters are frozen."""
    names = arguments.target_modules  # one name is a list of one; all-linear is a word of the config's own
    config = osora.OsoraConfig(
        r=arguments.r,
        target_modules="all-linear" if names == ["all-linear"] else names,
        exclude_modules=arguments.exclude_modules,
        dropout=arguments.dropout,
        tol=arguments.tol,
        seed=arguments.seed,
    )
    try:
        osora.attach(job.model, config)
    except (ValueError, osora.ConvergenceError) as error:
        raise Stop(str(error)) from error


def train(job: Job, arguments: argparse.Namespace, loss_before: float) -> dict[str, list[Any]]:
    """The training loop: loss and seconds of each step, and (step, loss) of the held-out rows."""
    steps = arguments.steps
    warm_up = max(1, steps // 12)
    # A scale is 1 + o, so o takes lr as it is; s is added to singular values of any size.
    groups = osora.parameter_groups(job.model, arguments.lr, relative_s=True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    seconds: list[float] = []
    held_out = [(0, loss_before)]
    stream = batches(job.train, arguments.batch_size, arguments.seed)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        job.model.train()
        total, tokens = answer_loss(job.model, next(stream), job.keeps_logits)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        schedule.step()
        losses.append(total.item() / tokens)
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            raise Stop(f"the loss is {losses[-1]} at step {step}: try a smaller --lr than {arguments.lr}")
        note = ""
        if step in (steps // 3, 2 * steps // 3, steps):
            held_out.append((step, held_out_loss(job, arguments.batch_size)))
            note = f"   held-out loss [bold]{held_out[-1][1]:.4f}[/]"
        if note or step == 1 or step % max(1, steps // 10) == 0:
            console.print(f"  step {step:4d} of {steps}   loss {losses[-1]:.4f}   {seconds[-1]:5.2f} s{note}")
    return {"losses": losses, "step_seconds": seconds, "held_out": held_out}


def finetune(arguments: argparse.Namespace) -> bool:
    """The whole job; True if every check passed."""
    began = time.perf_counter()
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise Stop(f"--output {output} is a file; it must be a folder")
    phases = Phases()
    torch.manual_seed(arguments.seed)
    job = prepare(arguments, phases)

    with phases("before", "held-out loss and a sample of the untouched model"):
        base, base_logits = checksums(job.model), probe_logits(job)
        loss_before, sample_before = held_out_loss(job, arguments.batch_size), sample(job)
    console.print(f"  held-out loss {loss_before:.4f}")

    with phases("attach", f"attaching adapters: a truncated SVD, r = {arguments.r}, of every target layer"):
        attach(job, arguments)
    summary = osora.summary(job.model)
    console.print(str(summary), markup=False)
    unchanged = torch.equal(probe_logits(job), base_logits)

    with phases("train", f"training {summary.trainable:,} of {summary.total:,} numbers"):
        trained = train(job, arguments, loss_before)
    with phases("sample", "the same sample again"):
        sample_after = sample(job)

    adapter = output / "adapter"
    with phases("save", f"saving the adapter to {adapter}"):
        (output / "report.json").unlink(missing_ok=True)  # of an earlier run: it would not fit the new adapter
        with whole(adapter) as unfinished:
            osora.save_adapter(job.model, unfinished, save_basis=arguments.save_basis)
    with phases("check", "checking: merge, unmerge, detach, load the saved adapter"):
        checks = check(job, adapter, base, base_logits)

    phases.seconds["total"] = time.perf_counter() - began
    step_seconds = statistics.median(trained["step_seconds"])
    tokens = arguments.batch_size * statistics.mean(map(len, job.train))
    report = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "osora": osora.build_info()},
        "rows": {"train": len(job.train), "held_out": len(job.held_out)},
        "initialisation": {
            "seconds": summary.seconds,
            "layers": len(summary.modules),
            "max_residual": summary.max_residual,
            "trainable": summary.trainable,
            "total": summary.total,
            "share": summary.share,
            "logits_bit_equal": unchanged,
        },
        "held_out_loss": {"before": loss_before, "after": trained["held_out"][-1][1]},
        "training": {**trained, "median_step_seconds": step_seconds, "tokens_per_second": tokens / step_seconds},
        "sample": {"before": sample_before, "after": sample_after, "expected": job.held_out[0].row.answer},
        "adapter_bytes": bytes_in(adapter),
        "basis_bytes": basis_bytes(job.model),
        "checks": checks,
        "peak_memory_gb": peak_memory_gb(arguments.device),
        "seconds": phases.seconds,
    }
    what = arguments.model.resolve().name if arguments.model else "SmolLM2-135M-Instruct"
    title = f"{what} on {arguments.data.stem if arguments.data else 'GSM8K'}, {100 * summary.share:.2g} % trained"
    plot_losses(output / "loss.png", trained["losses"], trained["held_out"], title)
    show_sample(job.held_out[0].row, sample_before, sample_after)
    if arguments.model is None:
        console.print("A model of this size learns the form of the answers; its arithmetic stays weak.\n", style="dim")
    show_report(report)
    write_json(output / "report.json", report)
    console.print(f"Written to {output}: adapter/, loss.png, report.json", markup=False)
    return unchanged and all(passed for passed in checks.values() if isinstance(passed, bool))


def main(argv: Sequence[str] | None = None) -> int:
    """0: done and every check passed. 1: a check failed. 2: wrong request or data."""
    arguments = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if finetune(arguments):
            return 0
        console.print("[bold red]A check failed; see the report above.[/]")
        return 1
    except (Stop, DataError, DemoAssetError, osora.AdapterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
