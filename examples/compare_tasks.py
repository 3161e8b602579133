# SPDX-License-Identifier: Apache-2.0
"""The two tasks of the comparison. Every method gets the same rows in the same order, for the same number of steps.

A task's rows are parted once, by a constant: a cell's seed decides the order of the training rows, the classifier's
start and the adapter's random numbers, never what is held out.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import compare_assets
import compare_tiny
import demo_assets
import torch
import transformers
from chat_data import Example, Row, answer_loss, batches, encode_all, parse_row, read_jsonl
from torch import Tensor, nn

PARTING = 2026  # seed of the split into training, validation and test rows
CLASSES = compare_assets.NOUN_FILES


@dataclass(frozen=True)
class Size:
    """How much is done; part of every result, so that results of different sizes are never mixed."""

    steps: int
    batch: int
    max_length: int  # tokens; encoder: longer texts are cut, language model: longer rows are left out
    validation: int  # rows that the learning rate is chosen on
    test: int  # rows that are reported
    seeds: int  # of the reported runs
    rates: int  # learning rates tried to begin with
    questions: int = 0  # of PIQA and of ARC-Easy, each; one seed answers them
    both: bool = False  # the search's runs are evaluated on the test rows too, and the best one is seed 0


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANDOM = "a random encoder"  # for a rehearsal
AT_ONCE = 64  # rows of an evaluation


class Encoder(nn.Module):
    """A BERT encoder, the mean of its last hidden states, and a linear classifier."""

    def __init__(self, encoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[rows, tokens] → [rows, classes]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights, states = mask[:, :, None].float(), states.float()
        return self.head((states * weights).sum(1) / weights.sum(1))


def linear_names(model: nn.Module, head: nn.Module | None = None) -> list[str]:
    """The last parts of the names of all linear layers but the head."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({name.rpartition(".")[2] for name in names})


class EncoderTask:
    """all-MiniLM-L6-v2 in float32 tells which of WordNet's 26 kinds of things a definition defines."""

    name = "encoder"
    title = "MiniLM on WordNet supersenses"
    sizes: ClassVar = {
        "default": Size(steps=60, batch=32, max_length=32, validation=400, test=1000, seeds=3, rates=4),
        "full": Size(steps=1500, batch=32, max_length=64, validation=4000, test=8000, seeds=5, rates=4),
        "card": Size(1500, 32, max_length=64, validation=2000, test=8000, seeds=3, rates=4, both=True),
        "tiny": Size(steps=4, batch=8, max_length=16, validation=16, test=32, seeds=2, rates=2, both=True),
    }
    head_rate = 3.16e-2  # of the classifier, whatever the adapter's rate; "no adapter" searches its own

    def __init__(self, size: str, wordnet: Path, device: str = "cpu", dtype: str | None = None) -> None:
        self.size, self.device, self.dtype = self.sizes[size], device, dtype or "float32"
        if size == "tiny":
            self.tokenizer, base, rows = compare_tiny.encoder()
            name, data = RANDOM, "made of words"
        else:
            folder = compare_assets.minilm_folder()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            # Without the encoder's dropout the seeds alone make the spread, and the methods see the same activations.
            options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "add_pooling_layer": False}
            base = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
            rows = compare_assets.glosses(wordnet)
            name, data = folder.name, "WordNet 3.0 noun glosses"
        self._base = base.to(device, DTYPES[self.dtype])
        random.Random(PARTING).shuffle(rows)
        validation, test = self.size.validation, self.size.test
        self.parts = {
            "validation": rows[:validation],
            "test": rows[validation : validation + test],
            "train": rows[validation + test :],
        }
        self.source = {"model": name, "data": data, "rows": len(rows)}

    def fresh(self, seed: int, last: bool = False) -> Encoder:
        """The pretrained encoder with a random classifier; ``last`` saves the memory of a copy."""
        torch.manual_seed(seed)
        encoder = self._base if last else copy.deepcopy(self._base)
        return Encoder(encoder, self._base.config.hidden_size).to(self.device).train()

    def adapted(self, model: Encoder) -> tuple[nn.Module, list[str]]:
        """What gets the adapter, and the names of its layers."""
        return model.encoder, linear_names(model.encoder)

    def head(self, model: Encoder) -> list[nn.Parameter]:
        """What every method trains beside the adapter."""
        return list(model.head.parameters())

    def stream(self, seed: int) -> Iterator[Sequence[compare_assets.Gloss]]:
        """Batches for ever."""
        return batches(self.parts["train"], self.size.batch, seed)

    def _logits(self, model: Encoder, rows: Sequence[compare_assets.Gloss]) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.size.max_length}
        tokens = self.tokenizer([row.text for row in rows], return_tensors="pt", **options)
        labels = torch.tensor([row.label for row in rows], device=self.device)
        return model(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)), labels

    def loss(self, model: Encoder, rows: Sequence[compare_assets.Gloss]) -> Tensor:
        """Mean cross entropy, in nats."""
        return nn.functional.cross_entropy(*self._logits(model, rows))

    @torch.no_grad()
    def evaluate(self, model: Encoder, part: str) -> dict[str, float]:
        """Mean loss and accuracy."""
        model.eval()
        rows = sorted(self.parts[part], key=lambda row: len(row.text))  # equal lengths together: little padding
        loss = right = 0.0
        for start in range(0, len(rows), AT_ONCE):
            logits, labels = self._logits(model, rows[start : start + AT_ONCE])
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
        model.train()
        return {"loss": loss / len(rows), "accuracy": right / len(rows)}

    def benchmarks(self, model: Encoder) -> dict[str, float]:
        """None: an encoder's forgetting has no agreed measure."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What a result depends on beside method, rate and seed."""
        return {**asdict(self.size), **self.source, **where_of(self), "head_rate": self.head_rate}


class CausalTask:
    """SmolLM2-135M-Instruct (from 4-bit weights) learns to answer GSM8K questions: on a card in bfloat16.

    The adapters' numbers are float32 with every method there, too.
    """

    name = "smollm2"
    title = "SmolLM2-135M on GSM8K"
    sizes: ClassVar = {
        "default": Size(8, 4, max_length=320, validation=12, test=32, seeds=2, rates=3, questions=60),
        "full": Size(600, 8, max_length=512, validation=128, test=1319, seeds=3, rates=4, questions=500),
        "card": Size(400, 8, max_length=384, validation=128, test=640, seeds=3, rates=3, both=True),
    }
    head_rate = 0.0

    def __init__(self, size: str, gsm8k: Path | None, device: str = "cpu", dtype: str | None = None) -> None:
        self.size, self.device = self.sizes[size], device
        self.dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        folder = demo_assets.smollm2_folder()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[self.dtype])
        self._base = base.to(device)
        held_out = _without_notes([parse_row(row, f"GSM8K, row {i}") for i, row in enumerate(demo_assets.gsm8k_rows())])
        random.Random(PARTING).shuffle(held_out)
        if gsm8k is not None:
            train = _without_notes(read_jsonl(gsm8k))
            random.Random(PARTING).shuffle(train)
            validation, test = train[: self.size.validation], held_out[: self.size.test]
            train = train[self.size.validation :]
            data = "GSM8K, official train and test splits"
        else:
            ends = self.size.test, self.size.test + self.size.validation
            test, validation, train = held_out[: ends[0]], held_out[ends[0] : ends[1]], held_out[ends[1] :]
            data = "GSM8K's test split, parted: not comparable with published numbers"
            if len(train) < self.size.batch:
                raise demo_assets.DemoAssetError(
                    f"the test split has {len(held_out)} rows, too few to train on when {ends[1]} are held out: give "
                    "the train split with --gsm8k FILE"
                )
        self.parts = {
            part: encode_all(self.tokenizer, rows, self.size.max_length, part)[0]
            for part, rows in (("train", train), ("validation", validation), ("test", test))
        }
        self.source = {
            "model": folder.name,
            "data": data,
            "rows": {part: len(rows) for part, rows in self.parts.items()},
        }

    def fresh(self, seed: int, last: bool = False) -> nn.Module:
        """The pretrained model; ``last`` saves the memory of a copy."""
        torch.manual_seed(seed)
        return (self._base if last else copy.deepcopy(self._base)).train()

    def adapted(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        """What gets the adapter, and the names of its layers."""
        return model, linear_names(model, model.get_output_embeddings())

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """Nothing is trained beside the adapter."""
        return []

    def stream(self, seed: int) -> Iterator[list[Example]]:
        """Batches for ever."""
        return batches(self.parts["train"], self.size.batch, seed)

    def loss(self, model: nn.Module, rows: list[Example]) -> Tensor:
        """Mean cross entropy of the answers' tokens, in nats."""
        total, tokens = answer_loss(model, rows, keeps_logits=True)
        return total / tokens

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Mean loss of an answer's token."""
        model.eval()
        rows = sorted(self.parts[part], key=len)
        loss, tokens = 0.0, 0
        at_once = self.size.batch if self.device == "cpu" else AT_ONCE
        for start in range(0, len(rows), at_once):
            total, count = answer_loss(model, rows[start : start + at_once], keeps_logits=True)
            loss, tokens = loss + float(total), tokens + count
        model.train()
        return {"loss": loss / tokens}

    @torch.no_grad()
    def benchmarks(self, model: nn.Module) -> dict[str, float]:
        """Zero-shot PIQA and ARC-Easy: share of questions whose right answer has the largest log-probability.

        And the loss of the right answers' tokens, which moves long before a choice flips.
        """
        model.eval()
        found = {}
        for which in compare_assets.CHOICES:
            rows = compare_assets.questions(which)
            random.Random(PARTING).shuffle(rows)
            rows, right, loss, tokens = rows[: self.size.questions], 0, 0.0, 0
            for row in rows:
                context = self.tokenizer(row.context, add_special_tokens=False).input_ids
                answers = [self.tokenizer(each, add_special_tokens=False).input_ids for each in row.choices]
                examples = [Example(Row(which, (), ""), context, answer) for answer in answers]
                losses = [float(answer_loss(model, [example], keeps_logits=True)[0]) for example in examples]
                right += min(range(len(losses)), key=losses.__getitem__) == row.right
                loss, tokens = loss + losses[row.right], tokens + len(answers[row.right])
            found |= {which: right / len(rows), f"{which} loss": loss / tokens}
        model.train()
        return found

    def settings(self) -> dict[str, Any]:
        """What a result depends on beside method, rate and seed."""
        return {**asdict(self.size), **self.source, **where_of(self), "benchmark_form": "sum of log-probabilities"}


def where_of(task: Any) -> dict[str, str]:
    """What its numbers are rounded by: results of a card and of a CPU are not mixed."""
    return {"device": task.device.partition(":")[0], "dtype": task.dtype}


def _without_notes(rows: list[Row]) -> list[Row]:
    """Without the data's notes for a calculator, as demo_assets.gsm8k_rows leaves them out."""
    return [replace(row, answer=re.sub(r"<<.*?>>", "", row.answer)) for row in rows]


TASKS = {task.name: task for task in (EncoderTask, CausalTask)}
