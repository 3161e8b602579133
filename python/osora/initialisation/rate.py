# SPDX-License-Identifier: Apache-2.0
"""How fast this machine is at what a decomposition mostly does, measured in a moment: for estimates, not for claims."""

import time

import torch

_SIZE, _COLUMNS, _TIMES = 4096, 32, 5


def product_rate(device: torch.device | str | None = None) -> float:
    """Operations per second of products of a float32 matrix and its transpose with a block of columns, as Lanczos has.

    The median of a few; some 0.2 s on a CPU.

    Args:
        device: None for the first card, or the CPU where there is none.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weight, block = torch.ones(_SIZE, _SIZE, device=place), torch.ones(_SIZE, _COLUMNS, device=place)
    seconds = []
    for _ in range(_TIMES + 1):  # the first one wakes threads and libraries
        began = time.perf_counter()
        image = weight.t() @ (weight @ block)
        float(image[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 4.0 * _SIZE * _SIZE * _COLUMNS / sorted(seconds[1:])[_TIMES // 2]


__all__ = ["product_rate"]
