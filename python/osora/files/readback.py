# SPDX-License-Identifier: Apache-2.0
"""What was written is read back as a loader would, before it takes the place of what may be the only good copy."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from osora.files.evidence import check_stored
from osora.files.format import AdapterError, described, read_json
from osora.files.info import config_of
from osora.files.tensors import check_shapes, check_values, check_whole, opened
from osora.layers.formulas import formula_of


def read_back(config: Path, tensors: Path) -> None:
    """Raise AdapterError unless two files, under whatever names, are an adapter that a loader would take.

    Names and shapes, digests and, where the file has its basis, that tensors and options give the change that was
    saved: all that can be told without the base. A module at a time is in memory.
    """
    try:
        description = described(read_json(config), config)
        formula = formula_of(config_of(description))
        with opened(tensors) as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            check_shapes(tensors, description, found)

            def check(name: str) -> None:
                here = {kind: file.get_tensor(description.method.key(name, kind)) for kind in description.kinds}
                check_values(description, name, here, tensors)
                if description.save_basis:
                    basis = here["U"], here["V"], here["S0"]
                    change = formula.factors(basis, formula.named(here))
                    check_stored(description.modules[name], basis, change, here["S0"])

            def check_module(item: tuple[str, dict[str, str]]) -> None:
                values = {key: file.get_tensor(stored) for key, stored in item[1].items()}
                check_whole(description, item[0], values, tensors)

            whole, _ = description.whole_keys(found.keys() - description.shapes().keys())
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing leaves the interpreter's lock
                for _ in pool.map(check, description.modules):
                    pass
                for _ in pool.map(check_module, whole.items()):
                    pass
    except (AdapterError, FileNotFoundError) as error:
        raise AdapterError(f"what was written cannot be loaded again, and nothing was replaced: {error}") from error


__all__ = ["read_back"]
