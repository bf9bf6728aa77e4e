"""What is wrong with a model's file: its cause in words, from its first bytes and its structure.

Read without the package onnx, which a device does not have: only what leads to tensors is followed.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeke.errors import InputError

_Bytes = bytes | mmap.mmap

# Numbers of the fields in ONNX's messages that lead to tensors, and what they hold.
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA = 13  # of a tensor
_FIRST = b"\x08"  # of every ONNX model that an exporter writes: the version of its format

# What else is copied in a model's place, by its first bytes.
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it (a checkpoint of PyTorch is one too: export it)",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS; run git lfs pull where it was copied from",
    b"<": "a web page or another text; download the file itself",
    b"{": "JSON; give the .onnx file",
    b"\x89HDF": "an HDF5 file; export the model to ONNX",
}
_OTHERS_AT_4 = {
    b"TFL3": "a TensorFlow Lite model; export it to ONNX",
    b"ORTM": "a model in ONNX Runtime's own format; give the .onnx file",
}


def check_file(path: Path) -> None:
    """See that a file can be read, is no other format and keeps all its data within itself.

    Errors: InputError naming the cause.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise InputError(f"{path} is empty; copy it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                check_content(data, str(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the model to the device") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the .onnx file") from None
    except PermissionError:
        raise InputError(
            f"{path} may not be read by this user (permission denied); change its owner or mode"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the disk") from error


def check_content(data: _Bytes, name: str) -> None:
    """The same for a file's content. What else is damaged is for ONNX Runtime to find."""
    start = data[:32]
    others = [words for begin, words in _OTHERS.items() if start.startswith(begin)]
    others += [words for begin, words in _OTHERS_AT_4.items() if start[4:].startswith(begin)]
    if others:
        raise InputError(f"{name} is {others[0]}")
    # External data is named by a `location`. Most files have none, and need no search.
    if data.find(b"location") >= 0:
        try:
            external = _has_external(data)
        except (EOFError, ValueError):
            raise InputError(f"{name} {damage(data)}") from None
        if external:
            raise InputError(
                f"{name} keeps data in a file outside of it, which is not read; save the model "
                "with all of its data inside"
            )


def damage(data: _Bytes) -> str:
    """What to say of content that ONNX Runtime cannot read as a model."""
    try:
        for _ in _fields(data, 0, len(data)):
            pass
    except EOFError:
        if data[:1] == _FIRST:
            return f"is truncated: it ends after {len(data):,} bytes, in the middle; copy it again"
    except ValueError:
        pass
    return "is not an ONNX model, or damaged; copy or export it again"


def _has_external(data: _Bytes) -> bool:
    todo = [("model", 0, len(data))]
    while todo:
        message, start, end = todo.pop()
        for number, first, last in _fields(data, start, end):
            if message == "tensor" and number == _EXTERNAL_DATA:
                return True
            if number in _FIELDS[message]:
                todo.append((_FIELDS[message][number], first, last))
    return False


def _fields(data: _Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The numbers of a message's fields, and where the content of each begins and ends.

    Errors: EOFError where it would end beyond `end`; ValueError for what is no message.
    """
    while start < end:
        key, start = _number(data, start, end)
        kind = key & 7
        if kind == 2:
            size, start = _number(data, start, end)
        elif kind == 0:
            size = _number(data, start, end)[1] - start
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("no such type")
        if start + size > end:
            raise EOFError
        yield key >> 3, start, start + size
        start += size


def _number(data: _Bytes, start: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for place in range(start, min(end, start + 10)):
        value |= (data[place] & 127) << 7 * (place - start)
        if data[place] < 128:
            return value, place + 1
    if end - start < 10:
        raise EOFError
    raise ValueError("no number")
