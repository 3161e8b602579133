# SPDX-License-Identifier: Apache-2.0
"""The triplets of an adapter whose file has none: from the kept basis that it came from, or computed again."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from osora.config import AdapterConfig
from osora.files.basis import INDEX_FILE, BasisFolder, Rest, from_basis
from osora.files.basis_layer import BasisError
from osora.files.format import Description
from osora.model.state import BasisNote
from osora.model.targets import Target
from osora.svd.certificate import Decomposition


def noted_basis(note: BasisNote, adapter: Path | None = None) -> BasisFolder | None:
    """The basis that an adapter came from, if it is still where the adapter's file says.

    Its folder is looked for as it is named, and under its last name beside the adapter's folder, if that is known. One
    that is damaged or another one by now is warned about.
    """
    places = [Path(note.folder)]
    if adapter is not None:
        places.append(adapter.resolve().parent / Path(note.folder).name)
    for folder in dict.fromkeys(places):
        try:
            if not (folder / INDEX_FILE).is_file():
                continue
            found = BasisFolder(folder)
        except (BasisError, OSError, ValueError) as error:
            warnings.warn(
                f"the adapter's basis cannot be used, so it is computed: {error}", RuntimeWarning, stacklevel=4
            )
            continue
        if found.fingerprint == note.fingerprint:
            return found
        warnings.warn(
            f"{folder} is another basis than the one that the adapter came from, so that is computed",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


def rebuilt_factors(
    targets: list[Target],
    description: Description,
    config: AdapterConfig,
    basis: str | os.PathLike[str] | None,
    rest: Rest,
) -> Iterator[tuple[Target, Decomposition]]:
    """The triplets of an adapter whose file has none: from its basis, where that is kept, or computed again."""
    if basis is not None:
        kept: BasisFolder | None = BasisFolder(basis)
    else:
        kept = noted_basis(description.basis, description.path.parent) if description.basis else None
    if kept is None:
        return rest(targets)
    wanted = description.basis
    if wanted is not None and kept.fingerprint != wanted.fingerprint:
        raise BasisError(
            f"{kept.folder} is not the basis that {description.path.parent} came from (that was {wanted.folder}): name "
            "that one, or none to compute it again"
        )
    targets = [replace(target, rank=description.modules[target.name]["rank"]) for target in targets]
    known = {name: item["weight_sha256"] for name, item in description.modules.items()}  # load_adapter has looked
    return from_basis(kept, targets, config=config, missing="compute", unconverged="warn", rest=rest, known=known)


__all__ = ["noted_basis", "rebuilt_factors"]
