# SPDX-License-Identifier: Apache-2.0
"""What a model does before and after the training: its loss, its words, its exact weights."""

from __future__ import annotations

import hashlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chat_data import Example, answer_loss, collate
from torch import Tensor, nn

import osora
from osora.layers import OsoraLinear

# Largest difference of logits, relative to the largest logit, that is put down to the rounding of the merged weights.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
SAMPLE_TOKENS = 128
PROBE_ROWS = 2


@dataclass(frozen=True)
class Job:
    """A loaded model and its tokenised data."""

    model: nn.Module
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    keeps_logits: bool  # the model can compute its logits for chosen positions only


@torch.no_grad()
def held_out_loss(job: Job, batch_size: int) -> float:
    """Mean loss per answer token over the held-out rows."""
    job.model.eval()
    by_length = sorted(job.held_out, key=len)  # equal lengths together: little padding
    parts = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    losses, counts = zip(*(answer_loss(job.model, part, job.keeps_logits) for part in parts), strict=True)
    return sum(loss.item() for loss in losses) / sum(counts)


@torch.no_grad()
def sample(job: Job) -> str:
    """The model's own (greedy) answer to the first held-out question; of plain text, a continuation of its start."""
    job.model.eval()
    example = job.held_out[0]
    start = example.prompt or example.answer[: max(1, len(example.answer) // 2)]
    ids = torch.tensor([start], device=job.model.device)
    output = job.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=job.tokenizer.eos_token_id or 0,
    )[0, len(start) :]
    text = job.tokenizer.decode(output, skip_special_tokens=True)
    return text + (" ..." if len(output) == SAMPLE_TOKENS else "")


@torch.no_grad()
def probe_logits(job: Job) -> Tensor:
    """Float32 logits [tokens, vocabulary] of a few held-out rows, without their padding."""
    job.model.eval()
    ids, mask, _ = collate(job.held_out[:PROBE_ROWS], job.model.device)
    return job.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().cpu()


def checksums(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor of the model, by name."""
    tensors = ((name, tensor.detach().cpu().contiguous()) for name, tensor in model.state_dict().items())
    return {name: hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest() for name, tensor in tensors}


def check(job: Job, adapter: Path, base: dict[str, str], base_logits: Tensor) -> dict[str, Any]:
    """Merge, unmerge, detach and load again, and compare all that must be equal. The adapter is attached afterwards."""
    trained = probe_logits(job)
    osora.merge(job.model)
    merge_difference = (probe_logits(job) - trained).abs().max().item()
    osora.unmerge(job.model)
    unmerged = torch.equal(probe_logits(job), trained)
    osora.detach(job.model)
    now = checksums(job.model)
    changed = sorted(name for name in base.keys() | now.keys() if base.get(name) != now.get(name))
    detached = torch.equal(probe_logits(job), base_logits)
    osora.load_adapter(job.model, adapter)
    reload_difference = (probe_logits(job) - trained).abs().max().item()
    largest = trained.abs().max().item()
    allowed = MERGE_TOLERANCE[job.model.dtype] * largest
    return {
        "merge_max_logit_difference": merge_difference,
        "merge_ok": merge_difference <= allowed,
        "reload_max_logit_difference": reload_difference,
        "reload_ok": reload_difference <= allowed,
        "largest_logit": largest,
        "unmerge_logits_bit_equal": unmerged,
        "unmerge_weights_bit_equal": not changed,
        "changed_weights": changed,
        "tensors_compared": len(base),
        "base_logits_bit_equal": detached,
    }


def basis_bytes(model: nn.Module) -> int:
    """Size of the frozen U and V of all adapted layers, which an adapter's file may hold or leave out."""
    layers = [module for module in model.modules() if isinstance(module, OsoraLinear)]
    return sum(factor.numel() * factor.element_size() for layer in layers for factor in (layer.U, layer.V))


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_memory_gb(device: str) -> dict[str, float]:
    """Largest memory so far: of the process, and on the GPU if one is used."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if torch.device(device).type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak
