# SPDX-License-Identifier: Apache-2.0
"""Tensors of which each process holds a part: FSDP2's and DeepSpeed's ZeRO 3, and the way to all of one."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from osora.layers import fingerprint
from osora.layers.base_weight import is_conv1d

PATIENCE = timedelta(minutes=5)
"""How long a process waits for the others before it says who is missing."""


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor (FSDP2, tensor parallel), or a parameter that ZeRO 3 has partitioned."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def _gathered(parameter: Tensor) -> Any:
    """DeepSpeed's context in which a partitioned parameter is whole on every process."""
    deepspeed = sys.modules.get("deepspeed")  # without it nothing is partitioned, whatever the mark
    return nullcontext() if deepspeed is None else deepspeed.zero.GatheredParameters([parameter])


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; of a sharded one a copy. Collective: every process that has a part must call it."""
    if hasattr(tensor, "ds_id"):
        with _gathered(tensor):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_gradient(function: Any, parameter: nn.Parameter, *arguments: Any) -> Tensor:
    """``function(parameter, *arguments)`` where a partitioned parameter is whole for that long. Collective."""
    if not hasattr(parameter, "ds_id"):
        return function(parameter, *arguments)
    with _gathered(parameter):
        return function(parameter, *arguments)


def ranks_of(tensor: Tensor) -> list[int]:
    """The processes that hold parts of a sharded tensor."""
    if hasattr(tensor, "full_tensor"):
        return sorted(tensor.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
    return sorted(distributed.get_process_group_ranks(tensor.ds_process_group))  # type: ignore[attr-defined]


def sketch(weight: Tensor, module: nn.Module, name: str) -> list[float]:
    """:func:`fingerprint.weight_sketch` of a sharded weight, each process reading its own part. Collective."""
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor import DTensor, Replicate

        oriented, mesh = weight.detach().to(torch.float64), weight.device_mesh  # type: ignore[attr-defined]
        oriented = oriented.t() if is_conv1d(module) else oriented
        _, h = fingerprint.probes(name, *oriented.shape)
        image = oriented @ DTensor.from_local(h.to(oriented.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        return fingerprint.sketch_of_image(image.full_tensor().cpu(), name)  # type: ignore[attr-defined]
    rows, columns = weight.ds_shape  # type: ignore[attr-defined]
    conv1d = is_conv1d(module)
    g, h = fingerprint.probes(name, *((columns, rows) if conv1d else (rows, columns)))
    left, right = (h, g) if conv1d else (g, h)  # of the weight as it is stored
    part, group = weight.ds_tensor.detach(), weight.ds_process_group  # type: ignore[attr-defined]
    begin = distributed.get_rank(group) * part.numel()  # a part is a run of the flattened weight, the last one padded
    end = min(begin + part.numel(), rows * columns)
    total = torch.zeros(fingerprint.PROBES, dtype=torch.float64)
    if begin < end:
        first, last = begin // columns, -(-end // columns)
        framed = torch.zeros((last - first) * columns, dtype=torch.float64)
        framed[begin - first * columns : end - first * columns] = part.flatten()[: end - begin].to("cpu", torch.float64)
        total = (left[first:last] * (framed.view(-1, columns) @ right)).sum(0)
    total = total.to(part.device)
    distributed.all_reduce(total, group=group)
    return [float(value) for value in total.tolist()]


# -- all at once -----------------------------------------------------------------------------------------------------

_HERE = "here"
_met: dict[str, int] = {}  # what for -> how often all have met


def meet(ranks: Iterable[int], what: str, says: str = "") -> Mapping[int, str]:
    """Wait until all processes of ``ranks`` have come here for the same, each with a word. Raises RuntimeError.

    By the store that the processes found each other with: whatever the backend, nothing is left half sent when one of
    them does not come.
    """
    ranks, rank = list(ranks), distributed.get_rank()
    store = distributed.distributed_c10d._get_default_store()
    place = f"osora/{what}/{'-'.join(map(str, ranks))}/{_met.get(what, 0)}"
    store.set(f"{place}/{rank}", says or _HERE)
    for other in ranks:
        try:
            store.wait([f"{place}/{other}"], PATIENCE)
        except RuntimeError as error:  # the store's, for time that is up
            store.delete_key(f"{place}/{rank}")
            raise RuntimeError(
                f"process {rank} has waited {PATIENCE.total_seconds():g} seconds in {what} for process {other}: the "
                f"model is sharded over the processes {ranks}, and each of them must call it, not the first alone"
            ) from error
    _met[what] = _met.get(what, 0) + 1
    return {other: store.get(f"{place}/{other}").decode() for other in ranks}


@contextmanager
def one_writes(ranks: Sequence[int], what: str) -> Iterator[bool]:
    """A block that processes which share tensors enter and leave together; gives whether this one is to write files.

    Raises:
        RuntimeError: one of them has not come; or what another one raised within the block.
    """
    if not ranks:
        yield True
        return
    meet(ranks, what)
    word = ""
    try:
        yield distributed.get_rank() == ranks[0]
    except Exception as error:
        word = f"{type(error).__name__}: {error}"
        raise
    finally:
        said = meet(ranks, what, word)
        if not word and (wrong := {rank: each for rank, each in said.items() if each != _HERE}):
            rank, each = next(iter(wrong.items()))
            raise RuntimeError(f"{what} failed in process {rank}: {each}")


@contextmanager
def all_or_none(ranks: Sequence[int], what: str, same: str) -> Iterator[None]:
    """A block of :func:`one_writes` in which each process works for itself, from one and the ``same`` thing.

    Raises:
        RuntimeError: as :func:`one_writes`; or another process has something else.
    """
    with one_writes(ranks, what):
        if ranks:
            said = meet(ranks, what, same)
            if other := [rank for rank in ranks if said[rank] != same]:
                raise RuntimeError(
                    f"{what} was given one thing in process {distributed.get_rank()} and another in process "
                    f"{other[0]} ({same} and {said[other[0]]}): all of them must have the same"
                )
        yield


__all__ = ["all_or_none", "is_sharded", "meet", "one_writes", "ranks_of", "sketch", "whole", "with_gradient"]
