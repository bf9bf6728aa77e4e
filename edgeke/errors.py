"""The error people see: bad input, described so that they can fix it."""

__all__ = ["InputError"]


class InputError(ValueError):
    """A parameter, file, image, model or request cannot be used; the message says what to do.

    Commands print it as one line without a traceback. Every other exception is a bug and keeps its
    traceback. Part of the device's bundle: standard library only.
    """
