"""``python -m bitwright``, where the command is not on the path, and under ``torchrun``."""

import sys

from bitwright.cli import main

if __name__ == "__main__":
    sys.exit(main())
