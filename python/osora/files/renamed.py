# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose names are not the model's: transformers renames tensors as it loads, and its own rules are asked.

A model of the checkpoint's ``config.json`` is made on the meta device for that; none of its weights is.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

log = logging.getLogger("osora")


@dataclass(frozen=True)
class Renamed:
    """What a checkpoint's tensors are called in its model."""

    keys: dict[str, str] = field(default_factory=dict)
    """The model's name → the checkpoint's, of tensors that stay as they are."""
    made: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """A name in the model → the checkpoint's tensors that it is computed from."""
    why_not: str = ""
    """Why transformers could not be asked, where it could not."""

    @property
    def note(self) -> str:
        """What an error about a name that is not found says of it; nothing where transformers has answered."""
        return f" (whether transformers calls it otherwise could not be told: {self.why_not})" if self.why_not else ""


def renamed(folder: Path, keys: Iterable[str]) -> Renamed:
    """Ask transformers; nothing but the reason where it is not installed, or does not know the checkpoint's model."""
    if not (folder / "config.json").is_file():
        return Renamed(why_not=f"{folder} has no config.json")
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        return Renamed(why_not=f"transformers is missing, or before 5: {error}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)  # it would ask at a terminal
        name = next(iter(config.architectures or ()), "")
        if not hasattr(transformers, name or "-"):
            return Renamed(
                why_not=f"{name or 'nothing'}, in its config.json's architectures, is no class of transformers"
            )
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        rules = get_model_conversion_mapping(model)
        there, prefix = model.state_dict(), model.base_model_prefix
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        found, made = {}, dict[str, list[str]]()
        for key in keys:
            new, converted = rename_source_key(key, renamings, converters, prefix, there)
            if converted is None:
                found[new] = key
            else:
                made.setdefault(new, []).append(key)
    except Exception as error:  # whatever a config of somebody's, or another version's rules, may raise
        log.info("transformers cannot say how it names the tensors of %s: %s", folder, error)
        return Renamed(why_not=f"{type(error).__name__}: {_shortened(str(error))}")
    return Renamed(found, {key: tuple(sources) for key, sources in made.items()})


def _shortened(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


__all__ = ["Renamed", "renamed"]
