# SPDX-License-Identifier: Apache-2.0
"""The operators: types, fake kernels, derivatives and autocast over ``torch.ops.osora``.

Where the extension was built without CUDA, CUDA tensors are served by :mod:`osora.reference`, with one warning.
"""

from osora.ops import materialised as materialised  # its operators exist as soon as osora is imported
from osora.ops.multi import linear_multi
from osora.ops.osora import fold, fold_many, linear, linear_add_
from osora.ops.sorsa import sorsa_linear

__all__ = ["fold", "fold_many", "linear", "linear_add_", "linear_multi", "sorsa_linear"]
