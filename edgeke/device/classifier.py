"""The classifier of a device: requirements in, answers out. Safe to share between threads."""

import collections
import ctypes
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.device.blocks import BlockProfile, profile_blocks
from edgeke.device.bundle import find_bundle, read_metadata, read_segments
from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.images import ORDERS, check_image, check_images
from edgeke.device.partitions import Partition
from edgeke.device.policy import OperatingPoint, force_exit
from edgeke.device.profile import (
    Profile,
    conditions,
    measure_costs,
    read_profile,
    write_profile,
)
from edgeke.device.remote_rest import RemoteRest
from edgeke.device.segments import Segments
from edgeke.device.session import open_session
from edgeke.device.shift import Monitor, Shift
from edgeke.errors import InputError

_PROFILE = "profile.json"
# The first request for a latency waits this long at most; `profile` may be given more time.
_FIRST_SECONDS = 5.0
_ROUNDS = 200
_PLANS = 64
# Images of a batch that are in work at once: 64, fewer where they are large. More take memory,
# and more time (digits: 64 are as fast as any, 16 take 1.1 and 1,024 1.1 times as long).
_CHUNK, _LEAST, _PIXELS = 64, 8, 2**20


@dataclass(frozen=True, eq=False)
class Prediction:
    """One answer.

    `label` indexes the classes, `class_name` is its name, `probabilities` float32 `[K]` are
    calibrated. `exit` is where the image left (0..E, E = voted). `latency_ms` is the time from the
    call until this answer was ready, checks and a first profile included (in a stream: from the
    first answer being requested). `point` is the operating point used; None in a stream.
    `promised` is false after an alarm of `Classifier.shift`: the point's promises are void then.
    Under `max_sure_error`, what no exit is sure of is `unsure`: its `label` is -1, `class_name` is
    "unsure", and `probabilities` are the vote's, as a hint.
    With a server: `place` is `device` or `server`, `sent_bytes` what was sent for this image, and
    `promise_void` says that neither server nor device finished in time, so that an earlier exit
    answered than the point's promises are about.
    """

    label: int
    class_name: str
    probabilities: NDArray[np.float32]
    exit: int
    latency_ms: float
    point: OperatingPoint | None
    promised: bool = True
    place: str = "device"
    sent_bytes: int = 0
    promise_void: bool = False

    @property
    def unsure(self) -> bool:
        """Whether a person must look at the image: no exit was sure, and a vote is no answer."""
        return self.label < 0


@dataclass(frozen=True)
class _Plan:
    """An operating point as the session takes it."""

    point: OperatingPoint
    thresholds: NDArray[np.float32]
    votes: NDArray[np.float32]
    bias: NDArray[np.float32]


class Classifier:
    """Answers images within requirements given per call.

    Images are uint8 `[H, W, C]` of the model's size, RGB or grey, or `[H, W]` where C is 1; with
    `order` `bgr`, arrays of colours are blue first, as OpenCV gives them (Pillow pictures are what
    they are).
    Requirements are `mean_latency_ms` (the mean over many images), `deadline_ms` (each image:
    exits whose 95th percentile is later are left out), `min_accuracy` and `max_degradation` (as
    promised, see docs/promises.md) with `delta`, the risk that a promise fails; any of them
    together, or none for the policy's default point. `max_miss` and `min_recall` are of a class, as
    {"class": "crack", "share": 0.99} or "crack=0.99"; under `max_sure_error` an answer may be
    unsure. These three need points of their own in the model. Several threads may share one
    classifier. A forked process, and one that it is sent to, open the files again for themselves.
    It can be used in `with`, which closes it.
    """

    def __init__(
        self,
        path: str | Path,
        precision: str | None = None,
        threads: int = 1,
        order: str = "rgb",
        shift_state: str | Path | None = None,
        server: str | None = None,
        token: str | None = None,
        patience_ms: float = 1000.0,
    ) -> None:
        """Open a bundle folder, or the single `.onnx` file, on `threads` threads (0: all cores).

        In a folder int8 is preferred where present; `precision` (`int8`, `fp32`) decides. The
        longest path is run once, so that the first image takes no longer than others.
        `shift_state` is a file in which `shift` outlives this process: one process a file.
        With `server`, such as "http://host:8000", what the device is not sure of may be finished
        there (docs/partition.md): `token` is sent with every request, and a request without a
        deadline waits for the server for `patience_ms` at most.
        Errors: InputError when a file is missing, damaged or no model of EdgeKE.
        """
        if type(threads) is not int or not 0 <= threads <= 1024:
            raise InputError(f"threads = {threads!r} must be 0 (all cores), or 1 to 1024")
        if order not in ORDERS:
            raise InputError(f"order = {order!r:.40} must be {' or '.join(ORDERS)}")
        self._path = Path(path).absolute()  # segments may be opened in another working folder
        self.bundle = find_bundle(self._path, precision)
        self.threads = threads
        self.order = order
        self._closed = False
        self._session: onnxruntime.InferenceSession | None = open_session(
            self.bundle.model, threads
        )
        self._metadata = read_metadata(self._session, str(self.bundle.model))
        self.policy = self._metadata.policy
        self.classes = self._metadata.classes
        self.image_shape = self._metadata.image_shape
        self.bits = self._metadata.bits
        self.fit = self._metadata.fit
        self._segments: Segments | None = None
        self._opening, self._profiling = threading.Lock(), threading.Lock()
        self._profile_path = self.bundle.model.parent / _PROFILE
        macs = self.policy.macs
        self._conditions = conditions(self.bundle.model, macs, threads)
        self._measured = read_profile(self._profile_path, self._conditions, len(macs))
        # Choosing takes as long as answering a small image; requests repeat.
        self._plans: dict[tuple[Request, Profile | None], _Plan] = {}
        self._points: dict[str, _Plan] = {}
        self._remote = (server, token, patience_ms)
        self._rest: RemoteRest | None = None
        self._outputs = ["probabilities", "exit"]
        self._monitor: Monitor | None = None
        self._warm_up(self._session)
        self.predict(self._noise())  # choosing a point is slower the first time, too
        if self.policy.histogram:
            self._outputs.append("first_score")
            self._monitor = Monitor(self.policy.histogram, self._metadata.policy_sha256)
            weakref.finalize(self, self._monitor.save)
        if shift_state is not None:
            self.keep_shift(Path(shift_state))
        if server is not None:
            if self._measured is None:
                self.profile(_ROUNDS, _FIRST_SECONDS)
            self._rest = RemoteRest(self, server, token, patience_ms)
        _classifiers.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """What a worker process is sent: where the files are, and how they were opened."""
        precision = self.bundle.precision
        return type(self), (self._path, precision, self.threads, self.order, None, *self._remote)

    def close(self) -> None:
        """Free the model's memory now, and save `shift`. Every later answer is an InputError."""
        if self._monitor is not None:
            self._monitor.save()
        if self._rest is not None:
            self._rest.link.close()
        with self._opening:
            self._closed, self._session, self._segments = True, None, None

    @property
    def lists_blocks(self) -> bool:
        """Whether the model can be profiled block by block: those of older versions cannot."""
        return bool(self._metadata.blocks)

    @property
    def segments_sha256(self) -> str | None:
        """Which segments the model was composed of; None in files of older versions."""
        return self._metadata.segments_sha256

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """After which exits, and how, an image may go on to a server (docs/partition.md)."""
        return self._metadata.partitions

    @property
    def shift(self) -> Shift | None:
        """Whether images still come as in calibration; None for a model of an older version.

        Each image that is answered counts, but not noise of a profile, and not `forced` ones.
        """
        return None if self._monitor is None else self._monitor.shift

    @property
    def promised(self) -> bool:
        """Whether promises hold as far as `shift` can tell: false after its alarm."""
        return self._monitor is None or not self._monitor.alarm

    def weigh(self, scores: Iterable[float]) -> None:
        """Count images towards `shift` by exit 0's scores, for a server that runs the segments.

        In the order in which they came: that of their answers depends on what they show.
        """
        if self._monitor is not None:
            self._monitor.see(*scores)

    def keep_shift(self, path: Path) -> None:
        """Go on from the state of `shift` in a file, and keep it there.

        Errors: InputError when it is damaged or cannot be written, and for a model of an older
        version. The state of another policy is begun anew, with a warning.
        """
        if self._monitor is None:
            raise InputError(
                f"{self.bundle.model} has no histogram, so nothing can watch for shift; run the "
                "stage calibrate again (dvc repro)"
            )
        self._monitor.keep(path)

    def take_over_shift(self, other: "Classifier") -> None:
        """Watch in another one's place: go on from its evidence where the policy is the same."""
        if other._monitor is None:
            return
        if self._metadata.policy_sha256 == other._metadata.policy_sha256:
            self._monitor = other._monitor
            weakref.finalize(self, self._monitor.save)
        elif (path := other._monitor.release()) is not None:
            self.keep_shift(path)

    @property
    def measured(self) -> Profile | None:
        """What this device's costs were measured to be; None before anything was."""
        return self._measured

    def profile(self, rounds: int = _ROUNDS, seconds: float = 30.0) -> Profile:
        """Measure what each exit costs here, keep it beside the model, and use it from now on.

        Every exit is forced in turn on noise, through the one file: warm-up, then up to `rounds`
        interleaved rounds in about `seconds` in all (at least one), medians and 95th percentiles,
        made strictly increasing. `profile.json` has one entry per file, threads, onnxruntime and
        machine; where it cannot be written, a warning says so and the costs stay in memory.
        Errors: InputError for fewer than one round.
        """
        with self._profiling:
            return self._measure(rounds, seconds)

    def profile_blocks(self, rounds: int = _ROUNDS, seconds: float = 30.0) -> BlockProfile:
        """Measure every block, exit and decision here, on noise; nothing is kept.

        Errors: InputError for a model of an older version, and for fewer than one round.
        """
        if not self._metadata.blocks:
            raise InputError(
                f"{self.bundle.model} does not list its blocks, as it was exported by an older "
                "version of EdgeKE; export the model again"
            )
        exits = len(self.policy.macs)
        feeds: dict[str, NDArray[Any]] = {
            "image": self._noise()[None],
            "thresholds": np.asarray(force_exit(exits - 1, exits), np.float32),
            "votes": np.asarray(self.policy.points[0].votes, np.float32),
            "bias": np.zeros(len(self.classes), np.float32),
        }
        blocks, model = self._metadata.blocks, self.bundle.model
        return profile_blocks(model, blocks, feeds, self.threads, rounds, seconds)

    def predict(
        self,
        image: Any,
        mean_latency_ms: float | None = None,
        deadline_ms: float | None = None,
        min_accuracy: float | None = None,
        max_degradation: float | None = None,
        delta: float | None = None,
        max_miss: Any = None,
        min_recall: Any = None,
        max_sure_error: float | None = None,
    ) -> Prediction:
        """Answer one image within the requirements.

        The first call that asks for a latency measures the device for up to five seconds, where
        nothing was measured yet (see `profile`). Errors: UnmetError naming the nearest attainable
        value; InputError for an image or a requirement that makes no sense.
        """
        started = time.perf_counter()
        pixels = check_image(image, self.image_shape, order=self.order)
        if self._rest is not None:
            self._check_open()
            request = Request(
                mean_latency_ms, deadline_ms, min_accuracy, max_degradation, delta,
                max_miss, min_recall, max_sure_error,
            )  # fmt: skip
            return self._split(self._rest, pixels, request, started)
        plan = self._plan(
            mean_latency_ms, deadline_ms, min_accuracy, max_degradation, delta,
            max_miss, min_recall, max_sure_error,
        )  # fmt: skip
        probabilities, exit = self._run(pixels, plan)
        return self._prediction(probabilities, exit, time.perf_counter() - started, plan.point)

    def predict_batch(
        self,
        images: Any,
        mean_latency_ms: float | None = None,
        deadline_ms: float | None = None,
        min_accuracy: float | None = None,
        max_degradation: float | None = None,
        delta: float | None = None,
        max_miss: Any = None,
        min_recall: Any = None,
        max_sure_error: float | None = None,
    ) -> list[Prediction]:
        """Answer images `[N, H, W, C]`, or a list of images, as `predict` answers each.

        Only images that an exit was not sure of go on to the next, so a batch costs the sum of
        what its images need; up to 64 are in work at once, so memory hardly grows with N.
        Requirements are those of an image alone: a deadline is not promised for a batch. Without
        segments the images are answered one by one, and a warning says so. Errors: as `predict`.
        """
        started = time.perf_counter()
        pixels = check_images(images, self.image_shape, self.order)
        if self._rest is not None:
            requirements = (
                mean_latency_ms, deadline_ms, min_accuracy, max_degradation, delta,
                max_miss, min_recall, max_sure_error,
            )  # fmt: skip
            request = Request(*requirements)
            return [
                self._split(self._rest, np.ascontiguousarray(image), request, time.perf_counter())
                for image in pixels
            ]
        plan = self._plan(
            mean_latency_ms, deadline_ms, min_accuracy, max_degradation, delta,
            max_miss, min_recall, max_sure_error,
        )  # fmt: skip
        segments = self.open_segments() if len(pixels) else None
        if segments is not None:
            answers = []
            size = min(_CHUNK, max(_LEAST, _PIXELS // math.prod(self.image_shape)))
            for start in range(0, len(pixels), size):
                before = time.perf_counter() - started
                chunk = np.ascontiguousarray(pixels[start : start + size])
                point = plan.point
                answered = segments.answer(chunk, point.thresholds, point.votes, point.bias)
                self.weigh(answered.first_score.tolist())
                seconds = before + answered.seconds
                rows = zip(answered.probabilities, answered.exit.tolist(), seconds, strict=True)
                answers += [self._prediction(p, e, float(s), plan.point) for p, e, s in rows]
            return answers
        if len(pixels) > 1:  # Python shows it once for each line that calls
            warnings.warn(
                f"there are no segments beside {self.bundle.model}: a batch is answered image by "
                "image; give the bundle folder, with segments/ in it, for faster batches",
                stacklevel=2,
            )
        answers = []
        for image in pixels:
            probabilities, exit = self._run(np.ascontiguousarray(image), plan)
            answers.append(
                self._prediction(probabilities, exit, time.perf_counter() - started, plan.point)
            )
        return answers

    def stream(self, image: Any) -> Iterator[Prediction]:
        """Each exit's answer for one image as soon as it is ready, shallow to deep.

        The next exit runs only when the next answer is requested: stop at your own deadline, or
        when an answer is sure enough. Errors: InputError without segments, or for an image that
        does not fit, before anything runs.
        """
        pixels = check_image(image, self.image_shape, order=self.order)
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
            if exit == 0 and self._monitor is not None and self._segments is not None:
                first = self._segments.score.at(probabilities[None, None], 0)
                self._monitor.see(float(first[0]))
            yield self._prediction(probabilities, exit, time.perf_counter() - started, None)

    def forced(self, exit: int) -> Callable[[Any], Prediction]:
        """A function that answers an image as `predict` does, but always leaves at `exit`.

        For measuring; E itself means the vote. Errors: InputError for another number.
        """
        exits = len(self.policy.macs)
        if exit not in range(exits + 1):
            raise InputError(f"exit = {exit!r} must be 0 to {exits - 1}, or {exits} for the vote")
        forced = replace(self.policy.points[0], thresholds=force_exit(exit, exits), bias=())
        plan = self._arrays(forced)

        def run(image: Any) -> Prediction:
            started = time.perf_counter()
            pixels = check_image(image, self.image_shape, order=self.order)
            probabilities, left = self._run(pixels, plan, weighed=False)
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
                self._check_open()
                if self._segments is None:
                    files = read_segments(folder, self._metadata, self.bundle.model)
                    segments = Segments(files, self.policy, self.threads)
                    collections.deque(segments.stream(self._noise()), maxlen=0)  # warmed up
                    self._segments = segments
        return self._segments

    def run_at(
        self, image: NDArray[np.uint8], point: OperatingPoint
    ) -> tuple[NDArray[np.float32], int]:
        """Probabilities `[K]` and exit of one checked image, here, at a point of the policy."""
        plan = self._points.get(point.name)
        if plan is None:
            plan = self._points[point.name] = self._arrays(point)
        return self._run(image, plan)

    def _split(
        self, rest: RemoteRest, image: NDArray[np.uint8], request: Request, started: float
    ) -> Prediction:
        """An answer with the server's help."""
        passed = time.perf_counter() - started
        answer = rest.answer(image, request, time.monotonic() - passed)
        seconds = time.perf_counter() - started
        where = (answer.place, answer.sent_bytes, answer.void)
        return self._prediction(answer.probabilities, answer.exit, seconds, answer.point, *where)

    def _run(
        self, image: NDArray[np.uint8], plan: _Plan, weighed: bool = True
    ) -> tuple[NDArray[np.float32], int]:
        feeds = {"image": image[None], "thresholds": plan.thresholds, "votes": plan.votes}
        feeds["bias"] = plan.bias
        session = self._session or self._open_again()
        probabilities, exit, *first = session.run(self._outputs, feeds)
        if weighed and self._monitor is not None:
            self._monitor.see(float(first[0][0]))
        return probabilities[0], int(exit[0])

    def _warm_up(self, session: onnxruntime.InferenceSession) -> None:
        exits = len(self._metadata.policy.macs)
        feeds: dict[str, NDArray[Any]] = {
            "image": self._noise()[None],
            "thresholds": np.asarray(force_exit(exits, exits), np.float32),
            "votes": np.ones(exits, np.float32),
            "bias": np.zeros(len(self._metadata.classes), np.float32),
        }
        session.run(None, feeds)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"the classifier of {self._path} was closed; open another")

    def _open_again(self) -> onnxruntime.InferenceSession:
        """The session of a forked process. Errors: InputError when the model was replaced since."""
        with self._opening:
            self._check_open()
            if self._session is None:
                session = open_session(self.bundle.model, self.threads)
                if read_metadata(session, str(self.bundle.model)) != self._metadata:
                    raise InputError(
                        f"{self.bundle.model} was replaced after this process was forked; open "
                        "another Classifier here"
                    )
                self._warm_up(session)
                self._session = session
            return self._session

    def _after_fork(self) -> None:
        """Forget what a forked process cannot use: locks of others, and sessions, whose threads
        it lacks. To free these would wait for the threads, so they are kept until it ends.
        """
        for native in (self._session, self._segments):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
        self._session = self._segments = None
        self._opening, self._profiling = threading.Lock(), threading.Lock()
        if self._monitor is not None:
            self._monitor.after_fork()
        if self._rest is not None:
            self._rest.link.after_fork()

    def _prediction(
        self,
        probabilities: NDArray[np.float32],
        exit: int,
        seconds: float,
        point: OperatingPoint | None,
        place: str = "device",
        sent: int = 0,
        void: bool = False,
    ) -> Prediction:
        label, name = int(probabilities.argmax()), ""
        if point is not None and point.unsure and exit == len(self.policy.macs):
            label, name = -1, "unsure"
        name = name or self.classes[label]
        milliseconds, promised = seconds * 1e3, self.promised
        return Prediction(
            label, name, probabilities, exit, milliseconds, point, promised, place, sent, void
        )

    def _arrays(self, point: OperatingPoint) -> _Plan:
        bias = point.bias or [0.0] * len(self.classes)
        arrays = [np.asarray(v, np.float32) for v in (point.thresholds, point.votes, bias)]
        return _Plan(point, *arrays)

    def _measure(self, rounds: int, seconds: float) -> Profile:
        noise, exits = self._noise(), len(self.policy.macs)
        runs = [self.forced(exit) for exit in range(exits)]
        measured = measure_costs(lambda exit: runs[exit](noise), exits, rounds, seconds)
        self._measured = measured
        write_profile(self._profile_path, self._conditions, measured)
        return measured

    def _noise(self) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, self.image_shape, np.uint8)

    def _plan(
        self, mean_latency_ms: float | None, deadline_ms: float | None, *promised: Any
    ) -> _Plan:
        timed = mean_latency_ms is not None or deadline_ms is not None
        words = " (costs are milliseconds here: mean_latency_ms, deadline_ms)" if timed else ""
        try:
            request = Request(mean_latency_ms, deadline_ms, *promised)
            if timed and self._measured is None:
                with self._profiling:
                    if self._measured is None:  # another thread may have been here
                        self._measure(_ROUNDS, _FIRST_SECONDS)
            return self._planned(request, self._measured)
        except UnmetError as error:
            raise UnmetError(f"{error}{words}", error.nearest) from None
        except InputError as error:
            raise InputError(f"{error}{words}") from None

    def _planned(self, request: Request, measured: Profile | None) -> _Plan:
        plan = self._plans.get((request, measured))
        if plan is None:
            costs, worst = (measured.median_ms, measured.p95_ms) if measured else (None, None)
            point = choose(self.policy, request, costs or self.policy.macs, worst)
            plan = self._arrays(point)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._plans[request, measured] = plan
        return plan


_classifiers: "weakref.WeakSet[Classifier]" = weakref.WeakSet()


def _after_fork() -> None:
    for classifier in list(_classifiers):
        classifier._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
