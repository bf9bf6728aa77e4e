"""Whether images still come as they did in calibration: a test that weighs every image.

A conformal test martingale (Vovk, Gammerman & Shafer 2005) on exit 0's score. The calibration
images and all images so far lie in one histogram. If they are exchangeable, an image's rank among
all of them is uniform once ties are broken at random, and independent of the ranks before it, at
any length and for any histogram. Bets on low and on high ranks multiply; a bet whose mean is 1 has
no expected gain. So evidence ever exceeds 1/alpha with probability at most alpha (Ville 1939).

A bet that has lost for long needs long to recover. So each is also started anew at every image t,
with the share 1/(t(t+1)) of the stake. All starts of a bet are one number: one addition an image.
"""

import hashlib
import json
import math
import random
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeke.device.files import replace_file
from edgeke.errors import InputError

BINS = 256
ALPHA = 0.001  # of a false alarm, in the whole life of a device
# Bins are equally wide on the scale of log(s / (1 - s)), from -12 to 12: scores crowd near 1.
_PER_UNIT = BINS / 24
_BETS = 4  # of each kind
_SMALLEST, _LARGEST = 1e-12, 1e100  # cut-offs that only make bets smaller
_KIND = "edgeke shift 1"
_SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Shift:
    """What the images so far say about whether they come as in calibration.

    `evidence` is 1 at the start; the more, the less they do. `alarm`: it has exceeded 1,000 at some
    time, which happens to images as in calibration with a probability of at most 0.001. `images`
    were weighed since the start.
    """

    evidence: float
    alarm: bool
    images: int


def bin_of(score: float) -> int:
    """The bin, 0 to 255, of a score; of one that is no number: 0."""
    if not 0 < score < 1:
        return BINS - 1 if score >= 1 else 0
    return min(BINS - 1, max(0, int(BINS / 2 + _PER_UNIT * math.log(score / (1 - score)))))


def histogram(scores: Iterable[float]) -> tuple[int, ...]:
    """How many scores are in each bin, `[256]`."""
    bins = [bin_of(float(score)) for score in scores]
    return tuple(np.bincount(np.asarray(bins, np.int64), minlength=BINS).tolist())


class Monitor:
    """Weighs images by exit 0's score against a histogram `[256]` of the calibration images.

    Safe to share between threads. `seed` is for tests: ties are broken at random.
    """

    def __init__(
        self,
        histogram: Sequence[int],
        policy: str = "",
        alpha: float = ALPHA,
        seed: int | None = None,
    ) -> None:
        """`policy` is the hash of the policy that the histogram belongs to."""
        self._calibration = tuple(histogram)
        self._policy = policy
        self._needed = 1 / alpha
        self._counts = list(histogram)
        self._total = sum(histogram)
        self._low, self._high = [0.0] * _BETS, [0.0] * _BETS
        self._evidence, self._images, self.alarm = 1.0, 0, False
        self._random = random.Random(seed).random
        self._path: Path | None = None
        self._next_save, self._saved = 0.0, 0
        self.after_fork()

    def after_fork(self) -> None:
        """Make what a forked process cannot share; the file stays its parent's."""
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._path = None

    @property
    def shift(self) -> Shift:
        """What was weighed so far."""
        with self._lock:
            return Shift(self._evidence, self.alarm, self._images)

    def see(self, *scores: float) -> None:
        """Weigh images by exit 0's scores, in the order in which they came.

        Takes microseconds an image, and never waits for a disk.
        """
        with self._lock:
            counts, total, images = self._counts, self._total, self._images
            low, high, evidence, alarm = self._low, self._high, self._evidence, self.alarm
            for score in scores:
                place = bin_of(score)
                counts[place] += 1
                total += 1
                images += 1
                upper = place >= BINS // 2  # then the sum from above is shorter
                below = total - sum(counts[place:]) if upper else sum(counts[:place])
                rank = (below + self._random() * counts[place]) / total
                stake = 1 / (images * (images + 1))
                low = _bet(low, stake, max(rank, _SMALLEST))
                high = _bet(high, stake, max(1 - rank, _SMALLEST))
                # 1 / (images + 1) is the stake of all bets that have not started yet.
                evidence = (sum(low) + sum(high)) / (2 * _BETS) + 1 / (images + 1)
                alarm = alarm or evidence >= self._needed
            now, due = time.monotonic(), False
            if self._path is not None and (alarm > self.alarm or now > self._next_save):
                self._next_save, due = now + _SAVE_SECONDS, True
            self._total, self._images = total, images
            self._low, self._high, self._evidence, self.alarm = low, high, evidence, alarm
        if due:
            threading.Thread(target=self.save, daemon=True).start()

    def keep(self, path: Path) -> None:
        """Go on from a file's state, and keep it there from now on.

        The state of another policy is begun anew, with a warning. Errors: InputError when the file
        is damaged or no such state, and is left as it is; when it cannot be written.
        """
        path = path.absolute()
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            text = None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from None
        if text is not None:
            self._load(text, path)
        self._path = path
        try:
            replace_file(path, self._content())
        except OSError as error:
            self._path = None
            raise InputError(
                f"{path} cannot be written ({error.strerror}); name a file in a folder that can"
            ) from None
        self._saved, self._next_save = self._images, time.monotonic() + _SAVE_SECONDS

    def release(self) -> Path | None:
        """Save, and leave the file to others; its path, if there is one."""
        self.save()
        with self._saving:
            path, self._path = self._path, None
        return path

    def save(self) -> None:
        """Write the state to its file, if there is one and it lacks something.

        Where that fails a warning says so, and it is tried again later.
        """
        with self._saving:
            path, images = self._path, self._images
            if path is None or images == self._saved:
                return
            try:
                replace_file(path, self._content())
                self._saved = images
            except OSError as error:
                warnings.warn(
                    f"the state of shift is kept in memory alone, since {path} cannot be written "
                    f"({error})",
                    stacklevel=2,
                )

    def _content(self) -> bytes:
        with self._lock:
            content = {
                "kind": _KIND,
                "policy": self._policy,
                "images": self._images,
                "alarm": self.alarm,
                "evidence": self._evidence,
                "low": self._low,
                "high": self._high,
                "counts": self._counts,
            }
            text = json.dumps(content)
        return json.dumps({**content, "sha256": _hash(text)}).encode() + b"\n"

    def _load(self, text: bytes, path: Path) -> None:
        try:
            content = json.loads(text)
            said = content.pop("sha256")
            if content["kind"] != _KIND or said != _hash(json.dumps(content)):
                raise ValueError("its checksum is another")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is no state of shift, or damaged ({error}); whether there was an alarm is "
                "unknown: delete the file to begin anew, or name another"
            ) from None
        if content["policy"] != self._policy:
            warnings.warn(
                f"{path} belongs to another policy; watching for shift begins anew", stacklevel=4
            )
            return
        self._restore(content)

    def _restore(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._images, self.alarm = content["images"], content["alarm"]
            self._low, self._high = content["low"], content["high"]
            self._evidence, self._counts = content["evidence"], content["counts"]
            self._total = sum(self._counts)


def _bet(bets: Sequence[float], stake: float, rank: float) -> list[float]:
    """Bets e p^(e-1) on low ranks p; on high ones with 1 - p in its place.

    e < 1 wins much on few images, e > 1 little on many (and of low ranks bets on high ones).
    """
    a, b, c, d = bets  # e is 0.5, 0.8, 1.5 and 2; written out, since this is most of the time
    root = math.sqrt(rank)
    after = [
        (a + stake) * 0.5 / root,
        (b + stake) * 0.8 * rank**-0.2,
        (c + stake) * 1.5 * root,
        (d + stake) * 2.0 * rank,
    ]
    return after if max(after) < _LARGEST else [min(bet, _LARGEST) for bet in after]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
