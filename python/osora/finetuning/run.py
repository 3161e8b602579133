# SPDX-License-Identifier: Apache-2.0
"""A whole run: everything that can be wrong is looked at before the model is loaded, and results appear whole."""

import hashlib
import importlib.util
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from osora import build_info
from osora.files.adapter import save_adapter
from osora.files.attach import attach
from osora.files.card import write_card
from osora.files.load import load_adapter
from osora.files.whole import new_folder, refuse_used, write_json
from osora.finetuning.data import Example, encode_all, read_jsonl
from osora.finetuning.listener import Listener
from osora.finetuning.settings import TrainSettings
from osora.model.numbers import count_parameters, summary

NEEDS = ("transformers", "accelerate", "huggingface_hub")
_LENGTHS = ("steps", "epochs")  # may grow: the schedule is then that of the longer run, from its last checkpoint on
ADAPTER, CHECKPOINTS, SETTINGS, REPORT = "adapter", "checkpoints", "settings.json", "report.json"
# What may differ between a run and its resumption: the numbers that are trained do not depend on it.
FREE = ("output", "device", "eval_data", "eval_steps", "log_steps", "save_steps", "keep_checkpoints", "resume")


def _check_surroundings(settings: TrainSettings) -> torch.device:
    for package in NEEDS:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"training needs the package {package!r}", name=package)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this trains on one device; for more use osora.trainer in a script of yours (docs/train.md)")
    if not (settings.model / "config.json").is_file():
        raise FileNotFoundError(f"model must be the folder of a model; there is no {settings.model / 'config.json'}")
    for path in filter(None, (settings.data, settings.eval_data)):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _recorded(output: Path) -> dict[str, Any]:
    """What the run in a folder was asked to do."""
    if not (output / SETTINGS).is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {output / SETTINGS}")
    try:
        before = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
        return before["settings"] | {"sha256 of data": before["data_sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output / SETTINGS} is not what a run writes: {error}") from error


def _is_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a run is to be longer than it was. Raises ValueError for one that is to be shorter, or measured anew."""
    kept = {name: (old.get(name), new[name]) for name in _LENGTHS}
    if all(was == now for was, now in kept.values()):
        return False
    for name, (was, now) in kept.items():
        if was is not None and now is not None:
            if now > was:
                return True
            raise ValueError(f"a run can be made longer, not shorter: {name} was {was:g}, is {now:g}")
    given = {name: was for name, (was, _) in kept.items() if was is not None} or {"epochs": 1.0}
    (name, was), *_ = given.items()
    if name == "epochs" and (now := new["epochs"]) is not None and now > was:  # the default, unsaid
        return True
    raise ValueError(f"the run was to have {was:g} {name}: say its new length as {name} too (--{name})")


def _check_output(settings: TrainSettings, record: dict[str, Any]) -> bool:
    """A new run needs a folder with nothing in it; a resumed one the folder of the same run. Whether it gets longer."""
    output = settings.output
    if not settings.resume:
        try:
            refuse_used(output)
        except FileExistsError as error:
            raise FileExistsError(f"{error}; or resume the run in it with --resume") from error
        return False
    old = _recorded(output)
    new = record["settings"] | {"sha256 of data": record["data_sha256"]}
    other = [name for name in new if name not in (*FREE, *_LENGTHS, "data") and old.get(name) != new[name]]
    if other:
        changes = "; ".join(f"{name} was {old.get(name)!r}, is {new[name]!r}" for name in other)
        raise ValueError(f"another run than the one in {output}: {changes}")
    longer = _is_longer(old, new)
    if (output / REPORT).exists() and not longer:
        raise FileExistsError(
            f"nothing to resume: the run is finished, {output / REPORT} is there; more --steps or --epochs lengthen it"
        )
    if longer and last_checkpoint(output / CHECKPOINTS) is None:
        raise ValueError(f"{output} has no complete checkpoint, so that the run cannot be made longer: start it anew")
    return longer


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end, which the trainer's state is; None if there is none."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{path} is not complete, and left alone", RuntimeWarning, stacklevel=2)
    return max(found)[1] if found else None


def _read(settings: TrainSettings, path: Path, tokenizer: Any, config: Any, kind: str) -> tuple[list[Example], int]:
    examples, too_long = encode_all(tokenizer, read_jsonl(path), settings.max_length, kind)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    longest = max(examples, key=len)
    if positions is not None and len(longest) > positions:
        raise ValueError(f"{longest.row.where}: {len(longest)} tokens, the model takes {positions}: lower max_length")
    largest = max(max(example.prompt + example.answer) for example in examples)
    if largest >= text.vocab_size:
        raise ValueError(f"the tokenizer in {settings.model} gives id {largest}, the model has {text.vocab_size}")
    return examples, too_long


def _check_layers(config: Any, settings: TrainSettings) -> None:
    """Which layers the adapter finds, from shapes alone: no weight is read."""
    import transformers

    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config)
    count_parameters(shapes, settings.config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars for loading weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def finetune(
    settings: TrainSettings, *, listener: Listener | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Fine-tune a causal language model in a folder, and write the adapter to ``settings.output``.

    The output folder gets ``adapter/`` (with its model card), ``report.json``, ``settings.json`` and ``checkpoints/``.
    Nothing is downloaded, and no code of a model's folder is run.

    Args:
        settings: what to do. With ``resume`` the run in the output folder goes on, to the same bits on the same machine
            with the same versions and threads; with more ``steps`` or ``epochs`` it gets longer.
        listener: is told of steps and losses.
        progress: of the decomposition; as for :func:`osora.attach`.

    Returns:
        What is in ``report.json``.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, TypeError: something asked for cannot be done, found before the
            model is loaded; or the loss is no number.
        ModuleNotFoundError: transformers, accelerate or huggingface_hub is missing.
        AdapterError: a checkpoint to resume from is damaged, or of another base.
        ConvergenceError: without ``save_basis``, a triplet does not reach ``tol``.
        Stopped: by SIGTERM, after a checkpoint from which ``resume`` goes on.
    """
    began = time.perf_counter()
    device = _check_surroundings(settings)
    plain = json.loads(json.dumps(settings.to_dict()))
    record = {"settings": plain, "data_sha256": _sha256(settings.data)}
    longer = _check_output(settings, record)

    import transformers

    from osora.finetuning.loop import train

    listener = Listener() if listener is None else listener
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(settings.model, **local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model, **local)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"config or tokenizer in {settings.model} cannot be loaded: {error}") from error
    examples, too_long = _read(settings, settings.data, tokenizer, config, "training")
    listener.say(f"{len(examples)} rows to train on; {too_long} left out, longer than {settings.max_length} tokens")
    evaluation, eval_too_long = None, 0
    if settings.eval_data is not None:
        evaluation, eval_too_long = _read(settings, settings.eval_data, tokenizer, config, "evaluation")
        listener.say(f"{len(evaluation)} rows to evaluate on; {eval_too_long} left out")
    _check_layers(config, settings)

    transformers.set_seed(settings.seed)
    with _quiet():
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                settings.model, dtype=getattr(torch, settings.dtype), **local
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the model in {settings.model} cannot be loaded: {error}") from error
    model.to(device)
    if settings.start is not None:
        load_adapter(model, settings.start, progress=progress)
        listener.say(f"beginning with the adapter in {settings.start}")
    else:
        attach(model, settings.config, unconverged="warn" if settings.save_basis else "raise", progress=progress)
    numbers = summary(model)
    listener.say(f"{numbers.trainable:,} numbers trained, {100 * numbers.share:.2g} % of {numbers.total:,}")

    output = settings.output
    resume_from = last_checkpoint(output / CHECKPOINTS) if settings.resume else None
    if settings.resume:
        listener.say(f"going on from {resume_from}" if resume_from else "there is no checkpoint yet: from the start")
    if longer:
        listener.say("longer than it was: the schedule of the learning rate is that of the longer run from here on")
        (output / REPORT).unlink(missing_ok=True)  # of the shorter run; its adapter stays until there is a new one
        write_json(output / SETTINGS, record)
    elif not settings.resume:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SETTINGS, record)
    training = time.perf_counter()
    state = train(model, settings, examples, evaluation, output / CHECKPOINTS, resume_from, listener)
    seconds = {"before": training - began, "training": time.perf_counter() - training}

    adapter = output / ADAPTER
    shutil.rmtree(adapter, ignore_errors=True)  # of a run that ended between this and its report
    with new_folder(adapter) as unfinished:
        save_adapter(model, unfinished, save_basis=settings.save_basis)
        write_card(unfinished)
    losses = {
        kind: [[entry["step"], entry[key]] for entry in state.log_history if key in entry]
        for kind, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    report = {
        **record,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "osora": build_info()},
        "rows": {
            "training": len(examples),
            "training_too_long": too_long,
            "evaluation": 0 if evaluation is None else len(evaluation),
            "evaluation_too_long": eval_too_long,
        },
        "layers": len(numbers.modules),
        "trainable": numbers.trainable,
        "total": numbers.total,
        "max_residual": numbers.max_residual,
        "converged": numbers.converged,
        "steps": state.global_step,
        "epochs": state.epoch,
        "losses": losses,
        "resumed_from": None if resume_from is None else str(resume_from),
        "seconds": seconds,
        "device": str(device),
        "adapter": str(adapter),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.iterdir()),
    }
    write_json(output / REPORT, report, allow_nan=True)  # at the end of a training nothing is refused
    return report


__all__ = ["finetune"]
