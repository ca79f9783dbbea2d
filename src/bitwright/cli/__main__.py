"""``python -m bitwright.cli``."""

import sys

from bitwright.cli import main

if __name__ == "__main__":
    sys.exit(main())
