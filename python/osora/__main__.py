# SPDX-License-Identifier: Apache-2.0
"""``python -m osora`` is the command ``osora``."""

import sys

from osora.cli import main

if __name__ == "__main__":
    sys.exit(main())
