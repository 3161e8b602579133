# SPDX-License-Identifier: Apache-2.0
"""Adapters and base models on disk (docs/format.md)."""
