# SPDX-License-Identifier: Apache-2.0
"""The decomposition and its certificate (docs/svd.md)."""
