# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a causal language model as one function, which ``osora train`` calls (docs/cli.md).

Nothing here is imported by ``import osora``, and transformers not before something is trained.
"""

from osora.finetuning.listener import Listener, Stopped
from osora.finetuning.run import finetune
from osora.finetuning.settings import TrainSettings, read_settings

__all__ = ["Listener", "Stopped", "TrainSettings", "finetune", "read_settings"]
