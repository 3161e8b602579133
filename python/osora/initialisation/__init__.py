# SPDX-License-Identifier: Apache-2.0
"""A basis from a checkpoint on disk, without its model: streamed, resumed, shared (docs/initialise.md)."""
