"""The error people see: bad input, described so that they can mend it."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something given to EdgeKE cannot be used; the message says what, where and what to do.

    Stages print it as one line without a traceback. Every other exception is a bug and keeps its
    traceback.
    """
