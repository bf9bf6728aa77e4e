"""python -m edgeke.device: see `edgeke.device.cli`."""

import signal
import sys

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `info . | head -1`: end quietly, as other commands do
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        from edgeke.device.cli import main  # takes a slow device seconds

        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    sys.exit(status)
