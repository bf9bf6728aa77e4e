"""Keeps images to be labelled: those that no exit was sure of, and those after an alarm of shift.

Each is a PNG (without Pillow a .npy array) with its answer as JSON beside it, named by the pixels'
hash. A thread writes them, so answering never waits; what comes too fast for the disk is dropped.
"""

import hashlib
import io
import json
import logging
import queue
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.files import replace_file
from edgeke.device.policy import OperatingPoint
from edgeke.errors import InputError

_LOG = logging.getLogger("edgeke.serving")
_OURS = re.compile(r"([0-9a-f]{32})\.(png|npy|json)")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}
_WAITING = 64  # images

_Image = NDArray[np.uint8]
_Answer = Callable[[], Mapping[str, Any]]


def parse_size(text: str) -> int:
    """Bytes of a text such as 500MB. Errors: InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB)", text)
    if match is None or not float(match[1]):
        raise InputError(f"{text!r:.40} is no size; write a number with kB, MB or GB, as 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def no_exit_was_sure(point: OperatingPoint, exit: int) -> bool:
    """Whether the exits that a point gives a threshold were all unsure of an image.

    `exit` is where it left (E = voted). A point without thresholds, such as `full`, says nothing.
    """
    real = [0 <= threshold <= 1 for threshold in point.thresholds]
    return any(real[:exit]) and not (exit < len(real) and real[exit])


class Keeper:
    """A folder of kept images of at most `limit` bytes: the oldest are removed first.

    `count` is called with what became of an image: `kept`, `dropped` (too many at once) or `failed`
    (the log says why). Files of other names in the folder are left alone.
    """

    def __init__(self, folder: Path, limit: int, count: Callable[[str], Any]) -> None:
        """Errors: InputError when the folder cannot be written to."""
        self._folder, self._limit, self._count = folder, limit, count
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / ".writable", b"")
            (folder / ".writable").unlink()
            self._sizes = _sizes(folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be written to ({error.strerror})") from None
        self._total = sum(self._sizes.values())
        self._queue: queue.Queue[tuple[_Image, _Answer] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True, name="keep")
        self._thread.start()

    def offer(self, image: _Image, answer: _Answer) -> None:
        """Keep an image uint8 `[H, W, C]` with what `answer` gives, soon. Never waits or raises."""
        try:
            self._queue.put_nowait((image.copy(), answer))  # a view would keep a whole request
        except queue.Full:
            self._count("dropped")

    def close(self) -> None:
        """Write what waits."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._keep(*item)
                self._count("kept")
            except Exception as error:  # a disk's or a picture's fault is nobody's who asks
                _LOG.error("an image was not kept", extra={"fields": {"error": str(error)}})
                self._count("failed")

    def _keep(self, pixels: _Image, answer: _Answer) -> None:
        name = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:32]
        content, ending = _encoded(pixels)
        text = json.dumps(answer()).encode() + b"\n"
        self._remove(name)  # if it is there, it becomes the newest
        size = len(content) + len(text)
        while self._sizes and self._total + size > self._limit:
            self._remove(next(iter(self._sizes)))
        if size > self._limit:
            raise InputError(f"an image takes {size} bytes, more than the limit of {self._limit}")
        self._sizes[name] = size
        self._total += size
        replace_file(self._folder / f"{name}.{ending}", content)
        replace_file(self._folder / f"{name}.json", text)

    def _remove(self, name: str) -> None:
        if name in self._sizes:
            for ending in ("json", "png", "npy"):
                (self._folder / f"{name}.{ending}").unlink(missing_ok=True)
            self._total -= self._sizes.pop(name)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every kept image and its answer by name, oldest first; half-written ones go."""
    times: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for file in folder.iterdir():
        if match := _OURS.fullmatch(file.name):
            state = file.stat()
            sizes[match[1]] = sizes.get(match[1], 0) + state.st_size
            times[match[1]] = max(times.get(match[1], 0.0), state.st_mtime)
        elif file.name.endswith(".tmp") and _OURS.match(file.name[1:]):
            file.unlink()
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: times[name])}


def _encoded(pixels: _Image) -> tuple[bytes, str]:
    """The image without loss, and how its file's name ends."""
    buffer = io.BytesIO()
    try:
        from PIL import Image
    except ImportError:
        np.save(buffer, pixels)
        return buffer.getvalue(), "npy"
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
    return buffer.getvalue(), "png"
