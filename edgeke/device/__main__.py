"""python -m edgeke.device: see `edgeke.device.cli`."""

import sys

from edgeke.device.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
