"""The error people see: bad input, described so that they can fix it."""

import sys


class InputError(ValueError):
    """A parameter, file, image, model or request cannot be used; the message says what to do.

    Commands print it with `report`. Every other exception is a bug and keeps its traceback. Part
    of the device's bundle: standard library only.
    """


def report(error: InputError) -> int:
    """Print the error as one line on standard error; returns a command's exit status, 1."""
    print(f"error: {error}", file=sys.stderr)
    return 1
