"""Compare the runs of this repository: python -m edgeke.compare."""

import sys

from edgeke.compare.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
