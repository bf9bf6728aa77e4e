"""What must be installed, checked before anything is imported that would fail without it.

Runs on any Python from 3.8 on, to say that it is too old.
"""

import sys

PYTHON = (3, 11)
ONNXRUNTIME = (1, 15)
# The first release that was built for numpy 2.
_FOR_NUMPY_2 = (1, 19)


def unmet() -> str:
    """What is needed, in one line; nothing where all is there.

    Versions are those that were installed with pip: of a build without them nothing is said.
    """
    if sys.version_info < PYTHON:
        wanted, present = ".".join(map(str, PYTHON)), ".".join(map(str, sys.version_info[:3]))
        return (
            f"EdgeKE needs Python {wanted} or newer, and this is {present}; install a newer one "
            f"and make an environment with it: python{wanted} -m venv venv"
        )
    from importlib.util import find_spec

    missing = [name for name in ("numpy", "onnxruntime") if find_spec(name) is None]
    if missing == ["onnxruntime"] and find_spec("torch") is not None:
        missing = []  # a machine that trains reads pictures as a device does, and runs no model
    if missing:
        names = " and ".join(missing)
        return f"EdgeKE needs {names} on a device; run: pip install {' '.join(missing)}"
    numpy, onnxruntime = _version("numpy"), _version("onnxruntime")
    shown = ".".join(map(str, onnxruntime))
    if onnxruntime and onnxruntime < ONNXRUNTIME:
        return (
            f"EdgeKE needs ONNX Runtime {'.'.join(map(str, ONNXRUNTIME))} or newer, and this is "
            f"{shown}; run: pip install --upgrade onnxruntime"
        )
    if onnxruntime and onnxruntime < _FOR_NUMPY_2 and numpy >= (2,):
        return (
            f"ONNX Runtime {shown} needs numpy below 2, and numpy {'.'.join(map(str, numpy))} is "
            "installed; run: pip install 'numpy<2', or: pip install --upgrade onnxruntime"
        )
    return ""


def check() -> None:
    """End a command (`python -m`) with one line, and an import elsewhere with an ImportError."""
    message = unmet()
    if message and sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module
        sys.exit("error: " + message)
    if message:
        raise ImportError(message)


def _version(package: str) -> "tuple[int, ...]":
    """The first three numbers of an installed package's version; none where it has none."""
    import re
    from importlib.metadata import PackageNotFoundError, version

    try:
        return tuple(map(int, re.findall(r"\d+", version(package))[:3]))
    except PackageNotFoundError:
        return ()
