# SPDX-License-Identifier: Apache-2.0
"""What makes a materialised weight safe to keep: its tensors stay the same ones, and each write to them is counted."""

import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from osora.ops.materialised import drop

_watched: "weakref.WeakSet[Materialised]" = weakref.WeakSet()
_hooked = False


class Materialised:
    """That a layer runs on a materialised weight, and the parameters it is made of.

    torch does not count every write (FSDP fills parameters of its own without), so a layer whose parameters were
    replaced is stopped rather than run on a weight that may be old. Copies of a layer get copies of this.

    Raises:
        TypeError: a parameter that is no plain ``torch.nn.Parameter``, such as a DTensor.
    """

    def __init__(self, weight: nn.Parameter, o: nn.Parameter, s: nn.Parameter) -> None:
        for name, tensor in {"the base weight": weight, "o": o, "s": s}.items():
            if type(tensor) is not nn.Parameter:
                raise TypeError(
                    f"{name} is a {type(tensor).__name__}, not a plain torch.nn.Parameter: the materialised plan "
                    "cannot see its changes; leave the layer on the split plan"
                )
        self.__setstate__({"weight": weight, "o": o, "s": s})

    def __setstate__(self, state: dict[str, nn.Parameter]) -> None:
        """Watch them here too: copy and pickle make an object without __init__."""
        self.weight, self.o, self.s = state["weight"], state["o"], state["s"]
        _count_steps_of_optimisers()
        _watched.add(self)

    def check(self, weight: object, o: object, s: object) -> None:
        """Raise RuntimeError unless they are the tensors of the beginning."""
        if weight is not self.weight or o is not self.o or s is not self.s:
            raise RuntimeError(
                "a parameter of this layer was replaced after its execution was set to materialised (by FSDP, "
                "load_state_dict(assign=True), torch.func.functional_call, ...), and its changes cannot be seen: call "
                'osora.set_execution(model, "materialised") again if it was replaced once, or "split" if it will be '
                "again and again"
            )

    def drop(self) -> None:
        """Free the materialised weight."""
        drop(self.weight, self.o)

    def __del__(self) -> None:
        """The weight goes with the layer."""
        if hasattr(self, "s") and not sys.is_finalizing():
            self.drop()


def _count_steps_of_optimisers() -> None:
    """Fused optimisers of torch (2.13 and 2.14), and kernels of other packages, write without counting."""
    global _hooked
    if not _hooked:
        _hooked = True
        # not traced into a compiled step, which would see the layers of the first trace alone
        register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if not _watched:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = [t for each in _watched for t in (each.o, each.s) if id(t) in stepped and not t.is_inference()]
    torch.autograd.graph.increment_version(found)
