# SPDX-License-Identifier: Apache-2.0
"""A model card for an adapter's folder: ``README.md`` with the hub's metadata and what the adapter is.

What a person wrote stays: of a card that is there, missing metadata is filled in, and the generated section is renewed
only where it still is as it was generated, which its own digest tells.
"""

import hashlib
import os
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from osora.config import AdapterConfig
from osora.files.info import AdapterInfo, adapter_info
from osora.files.whole import finish, temporary_beside

CARD_FILE = "README.md"
_SECTION = re.compile(r"<!-- osora ([0-9a-f]{64}) -->\n(.*?)<!-- /osora -->", flags=re.DOTALL)
_PAPERS = {"osora": ("OSoRA", "2505.14350"), "sorsa": ("SORSA", "2409.00055")}


class CardError(ValueError):
    """A card is there whose metadata cannot be read; it is left as it is."""


def _base_on_hub(info: AdapterInfo) -> str | None:
    """The base's name on the hub. A folder's path says nothing to others, and may say too much."""
    name = info.base_model or ""
    on_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) and not Path(name).exists()
    return name if on_hub else None


def _unpublished(info: AdapterInfo) -> str:
    folder = re.sub(r"[^\w .+-]", "_", Path(info.base_model or "").name)  # its path is nobody's business
    named = f"a folder named {folder}" if folder else "not named in the file"
    return f"{named}; loading checks that it is the right one"


def _section(info: AdapterInfo, with_peft: bool) -> str:
    title, paper = _PAPERS[info.method]
    least, most = info.ranks
    general = {field.name for field in fields(AdapterConfig)} - {"dropout"}
    options = [field.name for field in fields(info.config) if field.name not in general]
    base = _base_on_hub(info)
    exact = "every triplet within it" if info.converged else "**not every triplet within it**"
    rows = {
        "method": f"{title} ([arXiv {paper}](https://arxiv.org/abs/{paper})), trained with osora",
        "base model": base or _unpublished(info),
        "adapted layers": f"{len(info.modules)}, weights in {', '.join(sorted({m.dtype for m in info.modules}))}",
        "rank": str(most) if least == most else f"{least} to {most}",
        **({"modules trained whole": ", ".join(f"{w.name} ({w.numbers:,})" for w in info.whole)} if info.whole else {}),
        "trained numbers": f"{info.trainable:,}",
        "options": ", ".join(f"{name} {getattr(info.config, name)}" for name in options),
        "basis": "in the file" if info.has_basis else "computed again from the base when it is loaded, and checked",
        "certificate of the SVD": f"largest residual {info.max_residual:.1e}; tol {info.config.tol:g}, {exact}",
        "file format": f"version {info.format_version}",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    model = f'"{base}"' if base else "..."
    if with_peft:
        code = (
            "import osora.peft\nfrom peft import PeftModel\nfrom transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained({model})  # the class it was trained as\n"
            'model = PeftModel.from_pretrained(model, "FOLDER")\n'
        )
    else:
        code = (
            "import osora\nfrom transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained({model})  # the class it was trained as\n"
            'osora.load_adapter(model, "FOLDER")\n'
        )
    text = f"\n| | |\n|---|---|\n{table}\n```python\n{code}```\n\n"
    return f"<!-- osora {hashlib.sha256(text.encode()).hexdigest()} -->\n{text}<!-- /osora -->"


def _renewed(text: str, section: str) -> str:
    found = _SECTION.search(text)
    if found is None or hashlib.sha256(found[2].encode()).hexdigest() != found[1]:
        return text  # a card without the section, or with one that a person has edited
    return text[: found.start()] + section + text[found.end() :]


def write_card(folder: str | os.PathLike[str]) -> Path:
    """Write the model card of a saved adapter, or bring the one that is there up to date, as saving an adapter does.

    A new card has the base model, the method, its numbers and the certificate of the SVD. Of one that is there, every
    word of a person is kept: metadata that are missing are added (``base_model``, ``library_name``, tags), and the
    section that osora generated is renewed if nobody has edited it.

    Args:
        folder: what :func:`osora.save_adapter` wrote.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError, AdapterError: no adapter in ``folder``, or a damaged one.
        ValueError: a card is there whose metadata are no YAML; it is left as it is.
        ModuleNotFoundError: huggingface_hub is missing.
    """
    return _write(adapter_info(folder))


def keep_card(info: AdapterInfo, *, with_peft: bool = False, add_section: bool = False) -> None:
    """The card of an adapter that has just been written, without reading its tensors again.

    Nothing is written where huggingface_hub is missing. A card with metadata that cannot be read is left, with a
    warning.

    Args:
        info: what was written.
        with_peft: show how PEFT loads it.
        add_section: add the section to the card that is there, which is PEFT's template and no person's.
    """
    try:
        _write(info, with_peft=with_peft, add_section=add_section)
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
    except CardError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)


def _write(info: AdapterInfo, *, with_peft: bool = False, add_section: bool = False) -> Path:
    try:
        from huggingface_hub import ModelCard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "model cards need the package huggingface_hub: pip install huggingface_hub", name="huggingface_hub"
        ) from error

    path = info.folder / CARD_FILE
    if path.exists():
        try:
            card = ModelCard(path.read_text(encoding="utf-8"))
        except Exception as error:  # YAML's errors, and the hub's about what the YAML says
            raise CardError(f"{path} has metadata that cannot be read, and is left as it is: {error}") from error
        section = _section(info, with_peft or card.data.get("library_name") == "peft")
        if add_section:
            card.text = f"{card.text.rstrip()}\n\n## The adapter\n\n{section}"
        else:
            card.text = _renewed(card.text, section)
    else:
        section = _section(info, with_peft)
        card = ModelCard(f"---\n{{}}\n---\n\n# An adapter of {_base_on_hub(info) or 'a model'}\n\n{section}\n")
    data: Any = card.data
    if (base := _base_on_hub(info)) and not data.get("base_model"):
        data["base_model"] = base
    if not data.get("library_name"):
        data["library_name"] = "peft" if with_peft else "osora"
    tags = data.get("tags")
    if tags is None or isinstance(tags, list):
        data["tags"] = [*(tags or []), *(tag for tag in ("osora", info.method, "adapter") if tag not in (tags or []))]
        data["tags"] = list(dict.fromkeys(data["tags"]))
    with temporary_beside(path) as new:
        new.write_text(str(card), encoding="utf-8")
        finish(new)
        os.replace(new, path)
    return path


__all__ = ["CardError", "keep_card", "write_card"]
