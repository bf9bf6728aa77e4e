"""The error people see: bad input, described so that they can fix it."""

import sys

# No terminal obeys these, and some languages need them: joiners, and wide or fixed blanks.
_HARMLESS = "\u200c\u200d\u00a0\u3000"


class InputError(ValueError):
    """A parameter, file, image, model or request cannot be used; the message says what to do.

    Commands print it with `report`. Every other exception is a bug and keeps its traceback. Part
    of the device's bundle: standard library only.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(escaped, message.split("\n"))))


def escaped(text: str) -> str:
    r"""The text with what commands a terminal spelt out: `\x1b`, `\n`, changes of direction.

    Names in a file from elsewhere could otherwise hide or forge what is on the screen.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else ascii(c)[1:-1] for c in text)


def report(error: InputError) -> int:
    """Print the error as one line on standard error; returns a command's exit status, 1."""
    print(f"error: {error}", file=sys.stderr)
    return 1
