# SPDX-License-Identifier: Apache-2.0
"""``PeftModel.save_pretrained`` for osora's adapters: every file whole or not at all, and never a pickle.

PEFT writes tensors in place, over what may be the only good copy, or the very file that a model's tensors are mapped
from. It is let write into a folder of its own within the one that was asked for, and the files are renamed from there.
"""

import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from osora.files.card import CARD_FILE, keep_card
from osora.files.format import CONFIG_FILE, TENSOR_FILE
from osora.files.info import info_of
from osora.files.readback import read_back
from osora.files.together import replace_together
from osora.files.whole import finish, why_unreadable
from osora.peft.config import AdapterConfig
from osora.peft.saving import descriptions_written
from osora.peft.selecting import selections_kept

_MARK = "_osora_whole_files"


def _rename(new: Path, folder: Path) -> None:
    """Everything in ``new`` to its place: of each adapter the tensors first, as natively; what says so comes last."""
    files = [path for path in new.rglob("*") if path.is_file()]
    for path in files:
        finish(path)
    ordered = sorted(files, key=lambda path: (path.name == CONFIG_FILE, str(path)))
    places = {folder / path.relative_to(new): path for path in ordered}
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    replace_together(places)


def _whole(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def save(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        configs, names = options["self"].peft_config, options["selected_adapters"]
        chosen = [configs.get(name) for name in (configs if names is None else names)]
        if not any(isinstance(config, AdapterConfig) for config in chosen):
            return save_pretrained(*args, **kwargs)
        if not options["safe_serialization"]:
            raise ValueError(
                "safe_serialization=False makes a pickle, and osora's adapters are never pickled: leave that option out"
            )
        folder = Path(options["save_directory"])
        if None in chosen or not options["is_main_process"] or folder.is_file():
            return save_pretrained(*args, **kwargs)  # which refuses, or writes nothing
        if (why := why_unreadable(folder)) is not None:
            raise ValueError(why)
        folder.mkdir(parents=True, exist_ok=True)
        places = {
            "" if name == "default" else name: config
            for name, config in zip(configs if names is None else names, chosen, strict=True)
            if isinstance(config, AdapterConfig)
        }
        with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as made:
            new = Path(made)
            cards = {place for place in {*places, ""} if (folder / place / CARD_FILE).is_file()}
            for place in cards:
                (new / place).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / place / CARD_FILE, new / place / CARD_FILE)
            options["save_directory"] = made
            with selections_kept(), descriptions_written() as written:
                try:
                    save_pretrained(*given.args, **given.kwargs)
                except SafetensorError as error:  # its name for a disk that is full
                    raise OSError(f"{folder} cannot be written, and what was there is left: {error}") from error
            for place in places:
                read_back(new / place / CONFIG_FILE, new / place / TENSOR_FILE)
            for place, config in places.items():
                info = info_of(new / place, written[new / place], config.native())
                keep_card(info, with_peft=True, add_section=place not in cards)
            _rename(new, folder)

    setattr(save, _MARK, True)
    return save


def save_whole_files() -> None:
    """Have ``PeftModel.save_pretrained`` do so; adapters of other methods are saved as before."""
    if not hasattr(PeftModel.save_pretrained, _MARK):
        PeftModel.save_pretrained = _whole(PeftModel.save_pretrained)  # type: ignore[method-assign]


__all__ = ["save_whole_files"]
