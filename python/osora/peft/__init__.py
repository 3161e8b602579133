# SPDX-License-Identifier: Apache-2.0
"""OSoRA as a method of PEFT (docs/peft.md). Importing this registers it; PEFT loads adapters only after that."""

try:
    import peft as _peft
except ImportError as error:
    raise ImportError('osora.peft needs PEFT 0.18 or newer: pip install "peft>=0.18"') from error

from osora.peft.config import OsoraConfig
from osora.peft.layer import OsoraLinear
from osora.peft.model import OsoraModel
from osora.peft.registry import register

_release = tuple(int(part) for part in _peft.__version__.split(".")[:2])
if _release < (0, 18):
    raise ImportError(f"osora.peft needs PEFT 0.18 or newer, and {_peft.__version__} is installed: pip install -U peft")

register("osora", OsoraConfig, OsoraModel)

__all__ = ["OsoraConfig", "OsoraLinear", "OsoraModel"]
