"""The classifier of a device: requirements in, answers out. Safe to share between threads."""

import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.bundle import find_bundle, read_carried, read_segments
from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.images import check_image, check_images
from edgeke.device.policy import OperatingPoint, force_exit
from edgeke.device.profile import (
    Conditions,
    Profile,
    measure_costs,
    read_profile,
    write_profile,
)
from edgeke.device.segments import Segments
from edgeke.device.session import open_session
from edgeke.errors import InputError

__all__ = ["Classifier", "Prediction"]

_PROFILE = "profile.json"


@dataclass(frozen=True, eq=False)
class Prediction:
    """One answer.

    `label` indexes the classes, `class_name` is its name, `probabilities` float32 `[K]` are
    calibrated. `exit` is where the image left (0..E, E = voted). `latency_ms` is the time from the
    call until this answer was there (in a stream: from the first answer being asked for). `point`
    is the operating point used; None in a stream, which has none.
    """

    label: int
    class_name: str
    probabilities: NDArray[np.float32]
    exit: int
    latency_ms: float
    point: OperatingPoint | None


@dataclass(frozen=True)
class _Plan:
    """An operating point as the session takes it."""

    point: OperatingPoint
    thresholds: NDArray[np.float32]
    votes: NDArray[np.float32]


class Classifier:
    """Answers images within requirements given per call.

    Images are uint8 `[H, W, C]` of the model's size, or `[H, W]` where C is 1. Requirements are
    `mean_latency_ms` (the mean over many images), `deadline_ms` (each image: exits whose 95th
    percentile is later are left out), `min_accuracy` and `max_degradation` (as promised, see
    docs/promises.md); any of them together, or none for the policy's default point. Several
    threads may share one classifier.
    """

    def __init__(self, path: str | Path, precision: str | None = None, threads: int = 1) -> None:
        """Open a bundle folder, or the single `.onnx` file, on `threads` threads (0: all cores).

        In a folder int8 is preferred where present; `precision` (`int8`, `fp32`) decides.
        Errors: InputError when a file is missing, damaged or no model of EdgeKE.
        """
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 0:
            raise InputError(f"threads = {threads!r} must be 0 (all cores) or a positive integer")
        self.bundle = find_bundle(Path(path), precision)
        self.threads = threads
        self._session = open_session(self.bundle.model, threads)
        self._carried = read_carried(self._session, str(self.bundle.model))
        self.policy = self._carried.policy
        self.classes = self._carried.classes
        self.image_shape = self._carried.image_shape
        self.bits = self._carried.bits
        self._segments: Segments | None = None
        self._opening, self._profiling = threading.Lock(), threading.Lock()
        self._warned = False
        self._profile_path = self.bundle.model.parent / _PROFILE
        self._conditions = Conditions.here(self.bundle.model, self.policy.macs, threads)
        self._measured = read_profile(self._profile_path, self._conditions)
        # Choosing takes as long as answering a small image; requests repeat.
        self._chosen = functools.lru_cache(maxsize=64)(self._choose)

    @property
    def measured(self) -> Profile | None:
        """What this device's costs were measured to be; None before anything was."""
        return self._measured

    def profile(self, rounds: int = 200) -> Profile:
        """Measure what each exit costs here, keep it beside the model, and use it from now on.

        Every exit is forced in turn on noise, through the one file: warm-up, then up to `rounds`
        interleaved rounds (on a slow device fewer, at least 20), medians and 95th percentiles,
        made strictly increasing. `profile.json` holds one entry per file, threads, onnxruntime and
        machine; where it cannot be written, a warning says so and the costs stay in memory.
        Errors: InputError for fewer than one round.
        """
        with self._profiling:
            return self._measure(rounds)

    def predict(
        self,
        image: Any,
        mean_latency_ms: float | None = None,
        deadline_ms: float | None = None,
        min_accuracy: float | None = None,
        max_degradation: float | None = None,
    ) -> Prediction:
        """Answer one image within the requirements.

        The first call that asks for a latency measures the device (see `profile`), where nothing
        was measured yet. Errors: UnmetError naming the nearest attainable value; InputError for an
        image or a requirement that makes no sense.
        """
        pixels = check_image(image, self.image_shape)
        plan = self._plan(Request(mean_latency_ms, deadline_ms, min_accuracy, max_degradation))
        started = time.perf_counter()
        probabilities, exit = self._run(pixels, plan.thresholds, plan.votes)
        return self._prediction(probabilities, exit, time.perf_counter() - started, plan.point)

    def predict_batch(
        self,
        images: Any,
        mean_latency_ms: float | None = None,
        deadline_ms: float | None = None,
        min_accuracy: float | None = None,
        max_degradation: float | None = None,
    ) -> list[Prediction]:
        """Answer images `[N, H, W, C]`, or a list of images, as `predict` answers each.

        Only images that an exit was not sure of go on to the next, so a batch costs the sum of
        what its images need; memory grows with N. Requirements are those of an image alone:
        `latency_ms` counts from the call until an answer was there, and a deadline is not promised
        for a batch. Without segments the images are answered one by one, and a warning says so
        once. Errors: as `predict`.
        """
        pixels = check_images(images, self.image_shape)
        plan = self._plan(Request(mean_latency_ms, deadline_ms, min_accuracy, max_degradation))
        segments = self.open_segments() if len(pixels) else None
        started = time.perf_counter()
        if segments is not None:
            found = segments.answer(pixels, plan.point.thresholds, plan.point.votes)
            rows = zip(found.probabilities, found.exit.tolist(), found.seconds, strict=True)
            return [self._prediction(p, e, float(s), plan.point) for p, e, s in rows]
        self._warn_once(len(pixels))
        answers = []
        for image in pixels:
            probabilities, exit = self._run(image, plan.thresholds, plan.votes)
            seconds = time.perf_counter() - started
            answers.append(self._prediction(probabilities, exit, seconds, plan.point))
        return answers

    def stream(self, image: Any) -> Iterator[Prediction]:
        """Each exit's answer for one image as soon as it is ready, shallow to deep.

        The next exit runs only when the next answer is asked for: stop at your own deadline, or
        when an answer is sure enough. Errors: InputError without segments, or for an image that
        does not fit, before anything runs.
        """
        pixels = check_image(image, self.image_shape)
        segments = self.open_segments()
        if segments is None:
            raise InputError(
                f"a stream needs the segments, and there are none beside {self.bundle.model}; give "
                "the bundle folder, with segments/ in it"
            )
        return self._streamed(segments.stream(pixels))

    def _streamed(self, answers: Iterator[NDArray[np.float32]]) -> Iterator[Prediction]:
        started = time.perf_counter()
        for exit, probabilities in enumerate(answers):
            yield self._prediction(probabilities, exit, time.perf_counter() - started, None)

    def forced(self, exit: int) -> Callable[[Any], Prediction]:
        """A function that answers an image as `predict` does, but always leaves at `exit`.

        For measuring; E itself means the vote.
        """
        thresholds = np.asarray(force_exit(exit, len(self.policy.macs)), np.float32)
        votes = np.asarray(self.policy.points[0].votes, np.float32)

        def run(image: Any) -> Prediction:
            pixels = check_image(image, self.image_shape)
            started = time.perf_counter()
            probabilities, left = self._run(pixels, thresholds, votes)
            return self._prediction(probabilities, left, time.perf_counter() - started, None)

        return run

    def open_segments(self) -> Segments | None:
        """The segments, opened once, when first needed; None where there are none.

        Batches and streams call this; call it yourself to pay for loading before the first of them.
        Errors: InputError when they are damaged or another model's.
        """
        folder = self.bundle.segments
        if self._segments is None and folder is not None:
            with self._opening:
                if self._segments is None:
                    files = read_segments(folder, self._carried, self.bundle.model)
                    self._segments = Segments(files, self.policy, self.threads)
        return self._segments

    def _run(
        self, image: NDArray[np.uint8], thresholds: NDArray[np.float32], votes: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], int]:
        feeds = {"image": image[None], "thresholds": thresholds, "votes": votes}
        probabilities, exit = self._session.run(None, feeds)
        return probabilities[0], int(exit[0])

    def _prediction(
        self,
        probabilities: NDArray[np.float32],
        exit: int,
        seconds: float,
        point: OperatingPoint | None,
    ) -> Prediction:
        label = int(probabilities.argmax())
        return Prediction(label, self.classes[label], probabilities, exit, seconds * 1e3, point)

    def _measure(self, rounds: int = 200) -> Profile:
        noise = np.random.default_rng(0).integers(0, 256, self.image_shape, np.uint8)
        exits = len(self.policy.macs)
        runs = [self.forced(exit) for exit in range(exits)]
        measured = measure_costs(lambda exit: runs[exit](noise), exits, rounds)
        self._measured = measured
        write_profile(self._profile_path, self._conditions, measured)
        return measured

    def _plan(self, request: Request) -> _Plan:
        if _timed(request) and self._measured is None:
            with self._profiling:
                if self._measured is None:  # another thread may have been here
                    self._measure()
        return self._chosen(request, self._measured)

    def _choose(self, request: Request, measured: Profile | None) -> _Plan:
        costs = measured.median_ms if measured else self.policy.macs
        words = (
            " (cost and deadline are milliseconds on this device: mean_latency_ms, deadline_ms)"
            if _timed(request)
            else ""
        )
        try:
            point = choose(self.policy, request, costs, measured.p95_ms if measured else None)
        except UnmetError as error:
            raise UnmetError(f"{error}{words}", error.nearest) from None
        except InputError as error:
            raise InputError(f"{error}{words}") from None
        limits, votes = (
            np.asarray(point.thresholds, np.float32),
            np.asarray(point.votes, np.float32),
        )
        return _Plan(point, limits, votes)

    def _warn_once(self, images: int) -> None:
        with self._opening:
            if self._warned or images < 2:
                return
            self._warned = True
        warnings.warn(
            f"there are no segments beside {self.bundle.model}: a batch is answered image by "
            "image; give the bundle folder, with segments/ in it, for faster batches",
            stacklevel=3,
        )


def _timed(request: Request) -> bool:
    return request.mean_cost is not None or request.deadline is not None
