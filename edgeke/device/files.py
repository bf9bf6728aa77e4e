"""Files that a device writes: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole, on the disk when this returns; an older one stays until then.

    Errors: OSError, after which nothing is left behind.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C leaves nothing behind either
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
