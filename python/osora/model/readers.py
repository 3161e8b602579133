# SPDX-License-Identifier: Apache-2.0
"""Which layers a model reads the weight of instead of calling them: what forwards have shown, and what is known.

A LoRA of PEFT adds its branch where a layer is called. Where the weight is read it does nothing, and nobody is told.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn


def _always(options: Any) -> bool:
    return True


def _slow_but_exact(options: Any) -> bool:
    """Of BLOOM's modules or its configuration."""
    of = options.get if isinstance(options, Mapping) else lambda key: getattr(options, key, None)
    return bool(of("slow_but_exact")) and (of("pretraining_tp") or 1) > 1


class _Known(NamedTuple):
    children: str
    """Names of the layers that are read in evaluation."""
    when: Callable[[Any], bool] = _always


# transformers' classes, from its sources; where fused kernels read more while training, evaluation counts.
_ATTENTION = _Known("q_proj k_proj v_proj out_proj")
_IN_TRAINING_ALONE = _Known("")
_CLASSES = {
    "MambaMixer": _Known("dt_proj"),
    "FalconMambaMixer": _Known("dt_proj"),
    "JambaMambaMixer": _Known("dt_proj"),
    "WavLMAttention": _ATTENTION,
    "TDNNLayer": _Known("kernel"),
    "MobileBertLMPredictionHead": _Known("dense decoder"),
    "BloomAttention": _Known("dense", _slow_but_exact),
    "BloomMLP": _Known("dense_4h_to_h", _slow_but_exact),
    "DetrMHAttentionMap": _Known("k_proj"),
    "MaskFormerDetrMHAttentionMap": _Known("k_proj"),
    "ConditionalDetrMHAttentionMap": _Known("k_proj"),
    "DabDetrMHAttentionMap": _Known("k_linear"),
    "BambaMixer": _IN_TRAINING_ALONE,
    "Mamba2Mixer": _IN_TRAINING_ALONE,
    "FalconH1Mixer": _IN_TRAINING_ALONE,
    "NemotronHMamba2Mixer": _IN_TRAINING_ALONE,
    "GraniteMoeHybridMambaLayer": _IN_TRAINING_ALONE,
    "Zamba2MambaMixer": _IN_TRAINING_ALONE,
}
# The same by model_type, for folders: ends of names.
_KINDS = {
    "mamba": (r"mixer\.dt_proj", _always),
    "falcon_mamba": (r"mixer\.dt_proj", _always),
    "jamba": (r"mamba\.dt_proj", _always),
    "wavlm": (r"attention\.(q|k|v|out)_proj|tdnn\.\d+\.kernel", _always),
    "mobilebert": (r"predictions\.(dense|decoder)", _always),
    "bloom": (r"self_attention\.dense|mlp\.dense_4h_to_h", _slow_but_exact),
}


def _known(owner: nn.Module) -> _Known | None:
    return next((_CLASSES[kind.__name__] for kind in type(owner).__mro__ if kind.__name__ in _CLASSES), None)


def read_layers(model: nn.Module, names: Iterable[str], seen: Collection[str]) -> list[str]:
    """Those of a model's layers whose weights it reads itself.

    Args:
        model: the model that the names are of.
        names: of layers.
        seen: what its forwards have read, as :class:`osora.layers.read_weight.Readers` keeps it; it decides for
            classes that are not known.
    """
    found = []
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        known = _known(owner)
        if (name in seen) if known is None else (last in known.children.split() and known.when(owner)):
            found.append(name)
    return found


def read_in_kind(options: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of a saved model's layers that are read, by its ``config.json``: as far as its kind is known."""
    ends, when = _KINDS.get(str(options.get("model_type")), ("", _always))
    return [name for name in names if re.search(rf"(^|\.)({ends})$", name)] if ends and when(options) else []


__all__ = ["read_in_kind", "read_layers"]
