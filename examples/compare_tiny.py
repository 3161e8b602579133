# SPDX-License-Identifier: Apache-2.0
"""A random encoder and made-up definitions, for a rehearsal of the comparison that needs no package and no data."""

from __future__ import annotations

import random
from typing import Any

from compare_assets import NOUN_FILES, Gloss

ROWS, WIDTH = 160, 80  # wider than the largest rank


def glosses() -> list[Gloss]:
    """Definitions whose kind can be told from their words."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(4 * NOUN_FILES)]
    labels = [number % NOUN_FILES for number in range(ROWS)]
    return [Gloss(" ".join(["a", *draw.choices(words[4 * label : 4 * label + 4], k=6)]), label) for label in labels]


def encoder() -> tuple[Any, Any, list[Gloss]]:
    """Tokenizer, model, rows."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    rows = glosses()
    words = ["[PAD]", "[UNK]", *sorted({word for row in rows for word in row.text.split()})]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    nothing_left_out = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=len(words), **sizes, **nothing_left_out)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tokenizer, transformers.BertModel(config, add_pooling_layer=False), rows
