# SPDX-License-Identifier: Apache-2.0
"""What transformers' and TRL's trainers need: a tokenizer of 97 words, data, and settings that ask nobody outside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, tiny_llama
from torch import nn


def rows(count: int = 16, length: int = 9) -> list[dict[str, Any]]:
    """Token ids and labels, the same ones in every run."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def tokenizer() -> Any:
    """w3 … w96, and three special tokens: of tiny_llama's ids."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def settings(kind: type, folder: Path, **options: Any) -> Any:
    """Six steps of two rows, a checkpoint after three."""
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        }
    )


def base() -> nn.Module:
    """The same weights in every call."""
    return tiny_llama().train()


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_small(folder: Path) -> None:
    """An adapter, and nothing of the model it belongs to."""
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(("model", "pytorch_model"))], names
