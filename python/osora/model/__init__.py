# SPDX-License-Identifier: Apache-2.0
"""Adapters in a model: which layers, their way in and out, several at once, their numbers."""
