# SPDX-License-Identifier: Apache-2.0
"""``osora train``: the settings of a file and of options, and what is shown of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from osora.cli.output import Output, command, whole_bytes
from osora.finetuning import Listener, TrainSettings, finetune, read_settings


def _option(help: str, **more: Any) -> Any:
    return typer.Option(help=help, show_default=False, **more)


def _show(output: Output, report: dict[str, Any]) -> None:
    rows = {
        "adapter": f"{report['adapter']} ({whole_bytes(report['adapter_bytes'])})",
        "numbers trained": f"{report['trainable']:,} of {report['total']:,}, in {report['layers']} layers",
        "steps": f"{report['steps']}, {report['epochs']:.2f} epochs of {report['rows']['training']} rows",
    }
    for kind, losses in report["losses"].items():
        if losses:
            (first, before), (last, after) = losses[0], losses[-1]
            rows[f"{kind} loss"] = f"{before:.4f} at step {first}, {after:.4f} at step {last}"
    output.table(rows, report["settings"]["output"])


class _Shown(Listener):
    """Tells a person about a run."""

    def __init__(self, output: Output, bar: Callable[[int, int], None]) -> None:
        self.output, self.bar = output, bar

    def step(self, done: int, of: int) -> None:
        self.bar(done, of)

    def say(self, text: str) -> None:
        self.output.note(text)


def train(
    config: Annotated[
        Path | None, typer.Argument(help="File of settings: .yaml, .yml, .toml or .json.", show_default=False)
    ] = None,
    model: Annotated[Path | None, _option("Folder of a causal language model.")] = None,
    data: Annotated[Path | None, _option("JSON lines to train on.", metavar="FILE")] = None,
    eval_data: Annotated[Path | None, _option("JSON lines to evaluate on.", metavar="FILE")] = None,
    output: Annotated[Path | None, _option("Folder for the adapter, its report and checkpoints.")] = None,
    method: Annotated[str | None, _option("osora or sorsa.")] = None,
    rank: Annotated[int | None, _option("Singular triplets per layer.")] = None,
    target_modules: Annotated[
        list[str] | None, _option("Name that the layers' names end in; may be given several times.", metavar="NAME")
    ] = None,
    start: Annotated[Path | None, _option("Folder of a saved adapter to begin with.", metavar="ADAPTER")] = None,
    save_basis: Annotated[bool | None, _option("Whether U and V are saved, too.")] = None,
    max_length: Annotated[int | None, _option("Most tokens of a row; longer ones are left out.")] = None,
    steps: Annotated[int | None, _option("Optimiser steps, instead of --epochs.")] = None,
    epochs: Annotated[float | None, _option("Passes over the data.")] = None,
    batch_size: Annotated[int | None, _option("Rows at a time.")] = None,
    gradient_accumulation: Annotated[int | None, _option("Batches per optimiser step.")] = None,
    lr: Annotated[float | None, _option("Learning rate.")] = None,
    seed: Annotated[int | None, _option("Decides order, dropout and decomposition.")] = None,
    dtype: Annotated[str | None, _option("Of the model's weights: float32 or bfloat16.")] = None,
    bf16: Annotated[bool | None, _option("Compute in bfloat16 by autocast.")] = None,
    gradient_checkpointing: Annotated[bool | None, _option("Less memory, more time.")] = None,
    device: Annotated[str | None, _option("auto, cpu or cuda.")] = None,
    eval_steps: Annotated[int | None, _option("Steps between evaluations; there is one before and one after.")] = None,
    save_steps: Annotated[int | None, _option("Steps between checkpoints.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on from the last checkpoint.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and no progress bars.")] = False,
) -> None:
    """Fine-tune a causal language model on questions and answers, and write the adapter with its model card.

    Options override the file's settings, which are more than the options: docs/cli.md names all. The model is a folder;
    nothing is downloaded. A line of the data is an object with messages (role, content; the last one the assistant's),
    with prompt and completion, or with text. The loss counts the answer's tokens only; of text, all.

    Everything is checked before the model is loaded. Interrupted, the run goes on with `--resume`, to the same bits;
    with more `--steps` or `--epochs` it is made longer. SIGTERM stops it after the step that runs, with a checkpoint.

    **Examples**

    `osora train run.yaml`

    `osora train run.yaml --rank 32 --output runs/r32`

    `osora train --model ./SmolLM2-135M --data chats.jsonl --output run --steps 300`

    `osora train run.yaml --resume`

    `osora train run.yaml --resume --steps 600`

    `osora train run.yaml --start runs/r32/adapter --output runs/further`
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "json") and value is not None}
    with command(json, "train") as shown:
        settings = {} if config is None else read_settings(config)
        if names := given.pop("target_modules", None):
            old = settings.get("adapter", {})
            if not isinstance(old, dict):
                raise TypeError(f"adapter must map names to values, got {old!r}")
            settings["adapter"] = old | {"target_modules": "all-linear" if names == ["all-linear"] else names}
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if one in given and other not in given:
                settings.pop(other, None)  # the option is instead of the file's
        checked = TrainSettings.from_dict(settings | given)
        with shown.bar("training") as step:
            try:
                report = finetune(checked, listener=_Shown(shown, step), progress=shown.bars)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt("interrupted: --resume goes on from the last checkpoint") from error
        _show(shown, report)
        shown.finish(report)
