# SPDX-License-Identifier: Apache-2.0
"""What training did to singular values (docs/analysis.md)."""
