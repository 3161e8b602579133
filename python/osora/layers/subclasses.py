# SPDX-License-Identifier: Apache-2.0
"""Subclasses of ``torch.nn.Linear``: which of them compute ``x Wᵀ + b`` and nothing else.

A class with a forward of its own is tried: a small layer of it, with nothing but a weight and a bias, must give what a
linear layer gives, for a matrix and for a batch, with and without a bias, in training and in evaluation. It keeps its
forward all the same: an adapter's branch is added to what that returns, so that a base model's bits stay its own.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from osora.layers.quantised import kind_of

# torch.nn.MultiheadAttention reads the weight of its own subclass, and calls it never.
_NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)

_tried: "WeakKeyDictionary[type, bool]" = WeakKeyDictionary()


def _small(module: nn.Linear, bias: bool) -> nn.Linear:
    """The layer with a weight [3, 2] of float64 and values that tell."""
    made = copy.copy(module)
    values = torch.arange(1.0, 7.0, dtype=torch.float64, device="cpu").view(3, 2).sin()
    made._parameters = {"weight": nn.Parameter(values), "bias": nn.Parameter(values[:, 0].cos()) if bias else None}
    made.in_features, made.out_features = 2, 3
    return made


def _is_linear_at(module: nn.Linear, x: Tensor) -> bool:
    found = module.forward(x)
    return isinstance(found, Tensor) and torch.allclose(
        found, nn.functional.linear(x, module.weight, module.bias), rtol=1e-12, atol=1e-12
    )


def _try(module: nn.Linear) -> bool:
    if module._parameters.keys() != {"weight", "bias"} or module._buffers or module._modules:
        return False
    if any(isinstance(value, Tensor | nn.Module) for value in vars(module).values()):
        return False
    x = torch.linspace(-2, 3, 16, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad(), torch.inference_mode(False):
            return all(
                _is_linear_at(_small(module, bias).train(training), x.view(shape))
                for bias in (True, False)
                for training in (True, False)
                for shape in ((8, 2), (2, 4, 2))
            )
    except Exception:  # a forward that wants other arguments, or to be elsewhere
        return False


def is_linear_subclass(module: nn.Module) -> bool:
    """Whether it is of a subclass of ``torch.nn.Linear`` that computes what that computes.

    The answer is the class's, found once; a forward that was put on the instance is a hook (``has_hooks``).
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind is nn.Linear or isinstance(module, _NEVER_CALLED):
        return False
    if kind not in _tried:
        _tried[kind] = _try(module)
    return _tried[kind]


def has_own_forward(module: nn.Module) -> bool:
    """Whether it is such a layer with a forward of its own, which is called for the base's part of the output.

    Bitsandbytes' layers, whose classes are Linear's too, have their own ways.
    """
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return own and kind_of(module) is None


__all__ = ["has_own_forward", "is_linear_subclass"]
