# SPDX-License-Identifier: Apache-2.0
"""The decompositions that an adapter starts from: all of a shape at once, and what is kept of each."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from osora.config import AdapterConfig
from osora.layers.base_weight import dense_weight
from osora.model.lanes import Lane, card_lanes, lanes_and_memory, side_by_side
from osora.model.targets import Target
from osora.reference import accumulate_dtype
from osora.svd.arguments import check_matrix, check_max_memory, check_unconverged
from osora.svd.certificate import Decomposition, Unconverged, report_failure
from osora.svd.plan import svd_plan
from osora.svd.spectrum import captured_energy, rank_for_energy
from osora.svd.truncated import decompose

_CPU_ENTRIES = 2**24  # weight entries decomposed in one call on a CPU, where they run one after the other
_CARD_SHARE = 4  # on a card the factors of one call take at most this part of what is free, one over it


def free_on_card(device: torch.device) -> int:
    """Bytes that tensors can still take on a card: what nobody has, and what torch keeps of freed ones."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def batch_size(target: Target, free: int | None) -> int:
    """How many matrices of a target's kind are decomposed in one call; their factors are held at once.

    On a card they run side by side, the more the better; how many are in work at a time the operator bounds by itself.

    Args:
        target: one of them.
        free: bytes that are free on the card, None on a CPU.
    """
    (d, k), weight = target.weight.shape, target.weight
    if free is None:
        return max(1, _CPU_ENTRIES // weight.numel)
    each = (d + k + 1) * target.rank * accumulate_dtype(weight.stored).itemsize
    if weight.quantised:
        each += weight.numel * weight.stored.itemsize  # its matrix, made for the call
    return max(1, free // _CARD_SHARE // each)


def batches(targets: list[Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, dtype and device together, in batches of bounded size."""
    groups: dict[tuple, list[Target]] = defaultdict(list)
    for target in targets:
        weight = target.weight
        groups[(*weight.shape, target.rank, weight.stored, weight.device)].append(target)
    for group in groups.values():
        device = group[0].weight.device
        size = batch_size(group[0], free_on_card(device) if device.type == "cuda" else None)
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def check_fits(target: Target, max_memory: int) -> None:
    """Raise ValueError for a target whose decomposition takes more than ``max_memory`` bytes."""
    weight = target.weight
    plan = svd_plan(weight.shape, target.rank, weight.stored, weight.device)
    if plan.bytes > max_memory:
        raise ValueError(
            f"{target.name}.weight {list(weight.shape)} takes {plan.bytes} bytes to decompose at rank {target.rank}, "
            f"and max_memory is {max_memory}: allow more, take a smaller r, or leave it out with exclude_modules"
        )


Batch = tuple[list[Target], list[Decomposition]]


def lanes_for(targets: list[Target], max_memory: int | None) -> tuple[list[Callable[[], Lane]], int | None]:
    """Those that the calls for these targets run in, none where they run one after the other; and memory for each."""
    device = targets[0].weight.device if targets else torch.device("cpu")
    if device.type != "cuda" or any(target.weight.device != device for target in targets):
        return [], max_memory
    kinds = {(*target.weight.shape, target.rank, target.weight.stored) for target in targets}
    largest = max(svd_plan((d, k), rank, stored, device).bytes for d, k, rank, stored in kinds)
    count, memory = lanes_and_memory(len(kinds), largest, free_on_card(device), max_memory)
    return card_lanes(device, count) if count > 1 else [], memory


def _decompose_batch(batch: list[Target], config: AdapterConfig, max_memory: int | None) -> Batch:
    return batch, decompose(
        [dense_weight(target.module) for target in batch],  # of quantised ones copies, which go with the batch
        batch[0].rank,
        names=[target.name for target in batch],
        labels=[f"{target.name}.weight" for target in batch],
        tol=config.tol,
        seed=config.seed,
        max_memory=max_memory,
        unconverged=None,  # told where the factors are handed on
    )


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for factors in batch[1]:
        yield from (factors.U, factors.S, factors.V)


def decompose_targets(
    targets: list[Target],
    config: AdapterConfig,
    *,
    max_memory: int | None,
    unconverged: Unconverged,
    progress: bool | None,
) -> Iterator[tuple[Target, Decomposition]]:
    """Each target with its factors, as they come; a bar on a terminal unless ``progress`` says otherwise."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # slow to import

    check_max_memory(max_memory)
    check_unconverged(unconverged)
    for target in targets:  # all of them before any work
        if not target.weight.quantised:
            check_matrix(dense_weight(target.module), f"{target.name}.weight")
        if max_memory is not None:
            check_fits(target, max_memory)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=progress is False, transient=progress is None) as bar:
        if progress is None and not bar.console.is_terminal:
            bar.disable = True
        task = bar.add_task("decomposing", total=len(targets))
        lanes, memory = lanes_for(targets, max_memory)
        calls = (partial(_decompose_batch, batch, config, memory) for batch in batches(targets))
        for batch, found in side_by_side(calls, lanes, _tensors):
            failed = [factors for factors in found if not factors.converged]
            report_failure(failed, config.tol, unconverged, 4, "a smaller r")
            for target, factors in zip(batch, found, strict=True):
                yield target, factors
                bar.advance(task)


def with_enough(target: Target, S: Tensor, norm: Tensor | float, fraction: float) -> Target:
    """The target with the fewest triplets that hold ``fraction`` of its weight's energy, or all of them and a note."""
    energy = captured_energy(S, norm)
    rank = rank_for_energy(energy, fraction)
    if rank is not None:
        return replace(target, rank=rank)
    held = math.floor(float(energy[-1]) * 1e4) / 1e4  # rounded up, it could read as enough
    note = f"rank {target.rank} holds {held} of the energy, rank_for_energy={fraction:g} asks for more"
    return replace(target, note="; ".join(filter(None, (target.note, note))))


def rank_note(factors: Decomposition) -> str:
    """What is worth a line where a weight has a smaller rank than the triplets that were asked for, else nothing."""
    zeros, asked = int(factors.below_floor.sum()), factors.S.numel()
    return f"its weight has rank {asked - zeros} to rounding, less than {asked}" if zeros else ""


def as_asked(target: Target, factors: Decomposition, config: AdapterConfig) -> tuple[Target, Decomposition]:
    """What an adapter keeps of a decomposition, by its ``rank_for_energy``; and a note of triplets that are zero."""
    if config.rank_for_energy is not None:
        target = with_enough(target, factors.S, factors.norm, config.rank_for_energy)
        factors = factors.leading(target.rank)
    return replace(target, note="; ".join(filter(None, (target.note, rank_note(factors))))), factors


def notes_of(targets: Iterable[Target]) -> dict[str, str]:
    """Module name → its target's note."""
    return {target.name: target.note for target in targets if target.note}
