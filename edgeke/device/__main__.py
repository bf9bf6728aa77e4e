"""python -m edgeke.device: see `edgeke.device.cli`."""

import signal
import sys

from edgeke.device.cli import main

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `info . | head -1`: end quietly, as other commands do
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
