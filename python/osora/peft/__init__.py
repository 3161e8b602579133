# SPDX-License-Identifier: Apache-2.0
"""OSoRA and SORSA as methods of PEFT (docs/peft.md). The import registers them: PEFT loads adapters only then."""

try:
    import peft as _peft
except ImportError as error:
    raise ImportError('osora.peft needs PEFT 0.18 or newer: pip install "peft>=0.18"') from error

from osora.peft.config import OsoraConfig, SorsaConfig
from osora.peft.linears import OsoraLinear, SorsaLinear
from osora.peft.model import OsoraModel, SorsaModel
from osora.peft.registry import register
from osora.peft.reloading import check_reloading
from osora.peft.selecting import select_tensors
from osora.peft.whole_files import save_whole_files
from osora.peft.wrapping import wrap_or_leave

_release = tuple(int(part) for part in _peft.__version__.split(".")[:2])
if _release < (0, 18):
    raise ImportError(f"osora.peft needs PEFT 0.18 or newer, and {_peft.__version__} is installed: pip install -U peft")

register("osora", OsoraConfig, OsoraModel)
register("sorsa", SorsaConfig, SorsaModel)
select_tensors()
save_whole_files()
check_reloading()
wrap_or_leave()

__all__ = ["OsoraConfig", "OsoraLinear", "OsoraModel", "SorsaConfig", "SorsaLinear", "SorsaModel"]
