# SPDX-License-Identifier: Apache-2.0
"""A basis made from a checkpoint on disk: begun, half done or whole, alone or with other processes."""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osora.config import AdapterConfig, OsoraConfig
from osora.files.basis import INDEX_FILE, BasisFolder
from osora.files.basis_layer import BasisError, file_name, told
from osora.files.whole import write_json
from osora.initialisation.claims import EXPIRY, Claims
from osora.initialisation.layers import SourceLayer
from osora.initialisation.parts import cores, part_of
from osora.initialisation.pipeline import Pipeline, Times
from osora.initialisation.progress import Progress
from osora.initialisation.request import InitialisationPlan, Request
from osora.initialisation.work import UNFINISHED, Work
from osora.svd.arguments import check_max_memory, check_unconverged
from osora.svd.certificate import Unconverged, report_failure

_REQUEST = "request.json"


@dataclass(frozen=True)
class Initialised:
    """What :func:`initialise` did."""

    folder: Path
    fingerprint: str
    """Of the whole basis; adapters refer to it."""
    layers: int
    computed: tuple[str, ...]
    """Names of the layers that this process decomposed."""
    kept: int
    """Layers that were there, and that this process checked against the base."""
    unconverged: tuple[str, ...]
    """Of those computed: layers that have no certificate of ``tol``."""
    times: Times


def _refuse_other(basis: BasisFolder, request: Request) -> None:
    """Raise BasisError for a finished basis of other layers, or of other options."""
    layers = request.source.layers
    if [layer.name for layer in layers] != list(basis.layers):
        raise BasisError(
            f"{basis.folder} is a finished basis of {len(basis.layers)} layers, {len(layers)} are asked for, and they "
            "are not the same: choose another folder"
        )
    for layer in layers:
        if (why := request.suits(layer, basis.layers[layer.name].entry)) is not None:
            raise BasisError(
                f"{basis.folder} is a finished basis with other options ({layer.name}: {why}): choose another folder"
            )


def _prepare(out: Path, request: Request) -> None:
    """Make the folder, or see that what is there belongs to this very basis."""
    wanted = {file_name(layer.name) for layer in request.source.layers} | {INDEX_FILE, UNFINISHED}
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder for the basis")
    if (out / INDEX_FILE).is_file():
        try:
            there = BasisFolder(out)
        except BasisError as error:
            warnings.warn(f"{error}: the index is made again", RuntimeWarning, stacklevel=3)
        else:
            _refuse_other(there, request)
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if strange := [name for name in names if name not in wanted and not name.startswith(".")]:
        raise FileExistsError(
            f"{out} holds {strange[0]}, which does not belong to the basis that is asked for: choose another folder, "
            "or the options it was made with; or remove that"
        )
    if (out / UNFINISHED).exists() and not (out / UNFINISHED).is_dir():
        raise FileExistsError(f"{out / UNFINISHED} is a file, where osora init keeps what is under way: remove it")
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    _agree(out / UNFINISHED / _REQUEST, request.text())


def _agree(path: Path, text: dict[str, Any]) -> None:
    """Be the first to say what is made here, or find that it is the same. Raises BasisError if it is not."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    with told(path):
        write_json(own, text)
        try:
            os.link(own, path)  # one process alone
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BasisError(f"{path} is damaged ({error}): remove it, and run the same command again") from error
    if there != text:
        raise BasisError(
            f"{path.parent.parent} was begun with another base, other options, layers or ranks: choose another folder, "
            "or the same options"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _device(asked: torch.device | str | None, local: int) -> torch.device:
    if asked is not None:
        try:
            found = torch.device(asked)
        except RuntimeError as error:
            raise ValueError(f'device must be "cpu" or a CUDA device such as "cuda:1", got {asked!r}') from error
        if found.type not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or a CUDA device such as "cuda:1", got {asked!r}')
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={asked!r}, and torch finds no CUDA device here")
        return torch.device("cuda", local) if found == torch.device("cuda") else found
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def _check_kinds(base: Any, out: Any, config: Any) -> None:
    """Raise TypeError for arguments in another order, or a config of PEFT's."""
    for name, value in {"base": base, "out": out}.items():
        if not isinstance(value, str | os.PathLike):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a folder's name, as in initialise(base, out, config); got a {kind}")
    if config is not None and not isinstance(config, AdapterConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config must be an osora.OsoraConfig or osora.SorsaConfig, got a {kind}")


def _check_room(plan: InitialisationPlan, out: Path) -> None:
    there = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if plan.bytes_written - there > plan.bytes_free:
        raise OSError(
            f"the basis takes {plan.bytes_written / 1e9:.2f} GB, and {out} has {plan.bytes_free / 1e9:.2f} GB left: "
            "take a smaller r, fewer layers, or another disk"
        )


def plan_initialisation(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: AdapterConfig | None = None,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> InitialisationPlan:
    """What :func:`osora.initialise` would do with the same arguments; nothing is written, and no weight read.

    Args:
        base: folder of the checkpoint.
        out: folder of the basis.
        config: which layers, at which rank.
        model: as for :func:`osora.initialise`.
        dtype: as for :func:`osora.initialise`.
        device: as for :func:`osora.initialise`.

    Returns:
        Layers, bytes to read and write, operations, memory; ``print`` it for a table.

    Raises:
        FileNotFoundError, ValueError, TypeError: what :func:`osora.initialise` refuses before it reads a weight.
    """
    _check_kinds(base, out, config)
    config = OsoraConfig() if config is None else config
    place = _device(device, 0)
    return Request.of(base, config, model, dtype, place.type == "cuda").plan(Path(out), place)


def initialise(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: AdapterConfig | None = None,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    part: str | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    max_memory: int | None = None,
    unconverged: Unconverged = "warn",
    claim_expiry: float = EXPIRY,
    progress: bool | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> Initialised:
    """Make the basis of a checkpoint on disk, without loading the model; see docs/initialise.md.

    Each weight is read once, decomposed and forgotten; reading, arithmetic and writing overlap. A finished layer is on
    the disk: after whatever ended the run, the same call goes on, and ends with the same bytes. Several processes may
    work on one folder.

    ``osora.attach(model, config, basis=out)`` then reads what it would have computed, bit for bit on a CPU where the
    number of threads is the same.

    Args:
        base: folder of the checkpoint in safetensors files, or a model's folder in the hub's cache.
        out: folder of the basis; new, empty, or begun by the same call.
        config: which layers and ranks, ``tol`` and ``seed``, as for :func:`osora.attach`. Its method plays no part.
        model: the checkpoint's module tree, made on the meta device; None makes what ``config.json`` names.
        dtype: to decompose in and to keep U and V in; None or "auto" for the one that the model is loaded in.
        part: which of several processes this one is, "3/8"; None for what torchrun says, or the only one.
        device: to decompose on; None for the process's card, if there is one, or the CPU.
        threads: of the arithmetic; None for torch's number, or under torchrun a share of the cores.
        max_memory: bytes that a decomposition may take beyond weights and factors, as for :func:`osora.attach`.
        unconverged: "warn" or "raise" when a decomposition misses ``config.tol``.
        claim_expiry: seconds without a sign of life after which another machine's process counts as gone.
        progress: a progress bar; by default only on a terminal.
        on_layer: called with a layer's name, how many are done, and of how many.

    Returns:
        What was done by this process.

    Raises:
        FileNotFoundError: no checkpoint there.
        FileExistsError: ``out`` holds something else.
        BasisError: ``out`` was begun with other options, or is of another base.
        ValueError: no checkpoint in safetensors files, or one that does not fit its model, naming the tensor
            (``BaseFolderError``); no target; NaN in a weight; one that does not fit in max_memory.
        OSError: a disk that is full, or is going to be. What was finished is kept.
        osora.ConvergenceError: see ``unconverged``.
    """
    check_max_memory(max_memory)
    check_unconverged(unconverged)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be at least 1, got {threads!r}")
    if isinstance(claim_expiry, bool) or not isinstance(claim_expiry, int | float) or not claim_expiry > 0:
        raise ValueError(f"claim_expiry must be a positive number of seconds, got {claim_expiry!r}")
    _check_kinds(base, out, config)
    config, out, mine = OsoraConfig() if config is None else config, Path(out), part_of(part)
    place = _device(device, mine.local)
    request = Request.of(base, config, model, dtype, place.type == "cuda")
    plan = request.plan(out, place)
    request.check_fits(place, max_memory)
    _prepare(out, request)
    _check_room(plan, out)
    began = time.perf_counter()
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
        _threads(threads or mine.threads(cores())),
        Progress(plan, progress) as bar,
        Claims(out / UNFINISHED / "claims", claim_expiry) as claims,
    ):

        def progressed(layer: SourceLayer, done: int) -> None:
            bar.advance(layer)
            if on_layer is not None:
                on_layer(layer.name, done, len(plan.layers))

        work = Work(request, out, mine, place, max_memory, unconverged, progressed, claims, plan)
        times = Pipeline(work.read, work.compute, work.write).run(work.tasks())
        found = work.index()
    times.whole = time.perf_counter() - began
    report_failure(work.failed, config.tol, unconverged, 3, "a smaller r")
    names = tuple(factors.name for factors in work.failed)
    return Initialised(out, found, len(plan.layers), tuple(work.computed), work.kept, names, times)


__all__ = ["Initialised", "initialise", "plan_initialisation"]
