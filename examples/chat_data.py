# SPDX-License-Identifier: Apache-2.0
"""Questions and answers in batches, with a loss on the answer alone. Reading them: osora.finetuning.data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from osora.finetuning.data import DataError, Example, Row, encode_all, parse_row, read_jsonl

__all__ = ["DataError", "Example", "Row", "answer_loss", "batches", "collate", "encode_all"]
__all__ += ["parse_row", "read_jsonl", "split"]

IGNORED = -100  # a label that has no loss


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): the same for the same rows and seed."""
    if not 1 <= held_out < len(rows):
        raise DataError(
            f"{held_out} rows cannot be held out of {len(rows)}: there must be a row to hold out and one to train on"
        )
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches for ever: each epoch in a new order, the orders decided by the seed."""
    order, shuffler = list(examples), random.Random(seed)
    while True:
        shuffler.shuffle(order)
        for start in range(0, len(order), size):
            yield order[start : start + size]


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, targets), each [rows, longest]. targets[:, t] is the token to predict from position t."""
    rows, longest = len(examples), max(map(len, examples))
    ids = torch.zeros(rows, longest, dtype=torch.long)  # the padding is masked, so its id does not matter
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length, begin = len(example), max(len(example.prompt), 1)  # nothing predicts the very first token
        tokens = torch.tensor(example.prompt + example.answer)
        ids[row, :length], mask[row, :length] = tokens, 1
        targets[row, begin - 1 : length - 1] = tokens[begin:]
    return ids.to(device), mask.to(device), targets.to(device)


def answer_loss(model: nn.Module, examples: Sequence[Example], keeps_logits: bool) -> tuple[Tensor, int]:
    """(sum of the cross entropies of the answers' tokens, how many tokens these are)."""
    ids, mask, targets = collate(examples, next(model.parameters()).device)
    counted = targets != IGNORED
    if keeps_logits:  # the vocabulary is the model's largest matrix: use it only where some row has an answer token
        columns = counted.any(0).nonzero()[:, 0]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns).logits
        targets, counted = targets[:, columns], counted[:, columns]
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")
    return loss, int(counted.sum())
