"""The queue: images wait for a segment, run in batches, and leave when an exit is sure.

Everything here runs in the event loop; only the segments run in a thread of their own. Images that
came first go first, so what has been accepted is never overtaken: a request is accepted only if the
work before it and its own, as measured, fit into what it asks for.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.classifier import Classifier
from edgeke.device.policy import OperatingPoint
from edgeke.device.scores import biased, vote
from edgeke.errors import InputError
from edgeke.serving.costs import SegmentCosts, measure

# No batch runs longer, so that an image that is nearly done waits for no long one.
_BATCH_SECONDS = 0.005
_MEASURE_SECONDS = 2.0
# How often the event loop's delay is looked at, in seconds. What waits in sockets waits for a turn
# of the loop to be read, one to be understood, and one to be answered.
_LOOK, _TURNS = 0.005, 3
# How many times its expected time a batch may have taken lately: known at most, and forgotten so.
_MOST_SLACK, _FORGET = 4.0, 0.97


class BusyError(InputError):
    """The request could be met, but not with what waits now; `seconds` until it may be."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Answers:
    """What a request gets: `exit` `[N]` in 0..E (E = voted), `probabilities` `[N, K]`.

    `promised`: what holds for the point, by the names of requirements. `late`: a deadline was
    missed all the same. `holds`: false after an alarm of shift, when nothing is promised.
    """

    exit: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    point: OperatingPoint
    promised: Mapping[str, float]
    seconds: float
    late: bool
    holds: bool = True

    @property
    def unsure(self) -> NDArray[np.bool_]:
        """Which images have no answer."""
        unsure: NDArray[np.bool_] = (self.exit == len(self.point.thresholds)) & self.point.unsure
        return unsure


@dataclass(eq=False)
class _Job:
    """An accepted request."""

    arrived: float
    deadline: float
    point: OperatingPoint
    promised: Mapping[str, float]
    left: NDArray[np.float64]  # seconds of work an image has before it, at each segment
    exit: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    unanswered: int
    done: asyncio.Future[Answers]
    weighed: bool  # towards shift; not where an answer is compared with


@dataclass(eq=False)
class _Part:
    """Some images of a job that wait for the same segment."""

    job: _Job
    places: NDArray[np.int64]
    features: NDArray[Any]
    earlier: NDArray[np.float32]  # probabilities `[k, n, K]` of the exits behind them

    def split(self, count: int) -> tuple["_Part", "_Part"]:
        cut = (slice(count), slice(count, None))
        one, other = (
            _Part(self.job, self.places[s], self.features[s], self.earlier[:, s]) for s in cut
        )
        return one, other


@dataclass
class _Slack:
    """How batches took longer than measured at the start, lately: on average, and at worst."""

    mean: float = 1.0
    worst: float = 1.0

    def see(self, ratio: float) -> None:
        self.mean = max(1.0, _FORGET * self.mean + (1 - _FORGET) * min(ratio, _MOST_SLACK))
        self.worst = max(1.0, min(ratio, _MOST_SLACK), _FORGET * self.worst)


@dataclass
class Batches:
    """Answers requests over one classifier's segments. Made in the event loop that uses it."""

    classifier: Classifier
    most: int = 32
    longest: float = 1.0  # seconds of work that may wait
    known: SegmentCosts | None = None  # costs that need no measuring: a cluster's plan
    costs: SegmentCosts = field(init=False)

    def __post_init__(self) -> None:
        segments = self.classifier.open_segments()
        assert segments is not None, "the server has checked that"
        self._segments = segments
        self.policy = self.classifier.policy
        measured = self.known or measure(self.classifier, segments, self.most, _MEASURE_SECONDS)
        self.costs = measured
        exits = range(len(self.policy.macs))
        self._largest = [self.costs.largest(k, _BATCH_SECONDS, self.most) for k in exits]
        per_image = [self.costs.batch(k, self._largest[k]) / self._largest[k] for k in exits]
        self._shared = np.array(per_image)
        self._waiting: list[deque[_Part]] = [deque() for _ in exits]
        self._backlog = 0.0  # expected seconds of all that was accepted
        self._slack = _Slack()
        self._lag = 0.0  # seconds that a turn of the event loop takes
        self._wake = asyncio.Event()
        self._closing = False
        self._pool = ThreadPoolExecutor(1, "segments")
        self._worker: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def backlog(self) -> float:
        """Seconds that a new image waits, as expected now: for other work, and to be read."""
        return max(0.0, self._backlog) * self._slack.mean + _TURNS * self._lag

    def check_load(self) -> None:
        """Errors: BusyError when more waits than `longest`, whatever a request says."""
        if self.backlog > self.longest:
            seconds = self.backlog - self.longest
            raise BusyError(f"{self.backlog:.3f} seconds of work wait; ask again later", seconds)

    @property
    def images(self) -> int:
        """Images that wait for a segment."""
        return sum(len(part.places) for queue in self._waiting for part in queue)

    def start(self) -> None:
        """Begin to answer."""
        self._worker = asyncio.create_task(self._work())
        self._watch = asyncio.create_task(self._look())

    async def close(self) -> None:
        """Answer all that was accepted, then stop."""
        self._closing = True
        self._wake.set()
        if self._watch is not None:
            self._watch.cancel()
        if self._worker is not None:
            await self._worker
        self._pool.shutdown()

    async def answer(
        self,
        images: NDArray[np.uint8],
        requirements: Mapping[str, Any],
        arrived: float,
        name: str | None = None,
    ) -> Answers:
        """Answer images `[N, H, W, C]` within requirements; `arrived` by `time.perf_counter`.

        `name`: of an operating point to use instead of requirements. Errors: UnmetError when no
        load would help, BusyError when less would; InputError for a requirement that makes no
        sense.
        """
        if not len(images):
            raise InputError("there are no images to answer")
        if name is None:
            point, promised = self._admit(len(images), requirements, arrived)
        else:
            point, promised = self._at(name, requirements)
        seconds = requirements.get("deadline_ms", math.inf) / 1e3
        return await self.enqueue(images, point, promised, arrived, seconds, weighed=name is None)

    async def enqueue(
        self,
        features: NDArray[Any],
        point: OperatingPoint,
        promised: Mapping[str, float],
        arrived: float,
        seconds: float,
        segment: int = 0,
        weighed: bool = True,
    ) -> Answers:
        """Answer at a point what waits for a segment: images for 0, features `[N, ...]` for others.

        `seconds` from `arrived` on are the deadline; `weighed`: towards shift. Errors: what the
        segments raise; BusyError while the model is being replaced.
        """
        if self._closing:
            raise BusyError("the model is being replaced; ask again", 1.0)
        reached = np.asarray(point.reached, float)
        after = np.cumsum((self._shared * reached)[::-1])[::-1]
        count, classes = len(features), len(self.classifier.classes)
        job = _Job(
            arrived,
            arrived + seconds,
            point,
            promised,
            after / np.maximum(reached, 1.0),
            np.empty(count, np.int64),
            np.empty((count, classes), np.float32),
            count,
            asyncio.get_running_loop().create_future(),
            weighed,
        )
        # Of exits that were passed elsewhere nothing is known.
        earlier = np.zeros((segment, count, classes), np.float32)
        self._waiting[segment].append(_Part(job, np.arange(count), features, earlier))
        self._backlog += count * job.left[segment]
        self._wake.set()
        return await job.done

    def features_shape(self, exit: int) -> tuple[int, int, int]:
        """What an exit gives to the next one, `(C, H, W)`."""
        return self._segments.features_shape(exit)

    def _admit(
        self, count: int, requirements: Mapping[str, Any], arrived: float
    ) -> tuple[OperatingPoint, dict[str, float]]:
        """The point that keeps the requirements with all that waits. Errors: as `answer`."""
        waits = self.backlog + time.perf_counter() - arrived
        try:
            point = self._choose(count, requirements, waits)
        except UnmetError as error:
            self._choose(count, requirements, 0.0)  # no load would help: its own error
            seconds = self.backlog
            raise BusyError(
                f"{seconds:.3f} seconds of work wait; without them this could be met ({error})",
                seconds,
            ) from None
        self.check_load()
        return point

    def _at(
        self, name: str, requirements: Mapping[str, Any]
    ) -> tuple[OperatingPoint, dict[str, float]]:
        if requirements:
            raise InputError(f"give point or {', '.join(requirements)}, not both")
        point = self.policy.point(name)
        self.check_load()
        return point, {"delta": self.policy.delta}

    def _choose(
        self, count: int, requirements: Mapping[str, Any], waits: float
    ) -> tuple[OperatingPoint, dict[str, float]]:
        slack, exits = self._slack, range(len(self.policy.macs))
        # A batch that runs is not stopped; its time is in the backlog, but it may take longer.
        before = waits * 1e3
        alone = [before + 1e3 * slack.mean * sum(self.costs.first[: k + 1]) for k in exits]
        worst = [before + 1e3 * slack.worst * self.costs.until(k, count) for k in exits]
        words = {"mean_latency_ms": "mean_cost", "deadline_ms": "deadline"}
        request = Request(**{words.get(name, name): v for name, v in requirements.items()})
        point = choose(self.policy, request, alone, worst)
        delta = self.policy.delta if request.delta is None else request.delta
        deepest = len(self.policy.macs) - 1
        if request.deadline is not None:
            deepest = max(k for k in exits if worst[k] <= request.deadline)
        cap = max((cap for cap in self.policy.caps if cap <= deepest), default=deepest)
        promised = {
            "max_degradation": point.promised("max_degradation", delta, cap),
            "min_accuracy": 1 - point.promised("max_error", delta, cap),
            "max_sure_error": point.promised("max_sure_error", delta, cap),
        }
        if (miss := request.max_miss) is not None:
            promised["max_miss"] = point.promised("max_miss", delta, cap, miss.class_name)
        if (recall := request.min_recall) is not None:
            missed = point.promised("min_recall", delta, cap, recall.class_name)
            promised["min_recall"] = 1 - missed
        kept = {name: value for name, value in promised.items() if math.isfinite(value)}
        return point, kept | {"delta": delta}

    async def _look(self) -> None:
        """How long others wait for their turn: as long as this does."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LOOK)
            lag = max(0.0, time.perf_counter() - before - _LOOK - 0.001)
            self._lag = max(lag, 0.7 * self._lag)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            segment = self._next()
            if segment is None:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            parts = self._take(segment)
            count = sum(len(part.places) for part in parts)
            started = time.perf_counter()
            try:
                ran = await loop.run_in_executor(self._pool, self._run, segment, parts)
                took = time.perf_counter() - started
                self._slack.see(took / self.costs.batch(segment, count))
                self._settle(segment, parts, *ran)
            except Exception as error:  # theirs alone: the queue goes on
                self._fail(parts, segment, error)

    def _next(self) -> int | None:
        """The segment for which the image that came first waits."""
        heads = [(q[0].job.arrived, -k) for k, q in enumerate(self._waiting) if q]
        return -min(heads)[1] if heads else None

    def _take(self, segment: int) -> list[_Part]:
        queue, parts, room = self._waiting[segment], [], self._largest[segment]
        while queue and room:
            part = queue.popleft()
            if len(part.places) > room:
                part, rest = part.split(room)
                queue.appendleft(rest)
            room -= len(part.places)
            parts.append(part)
        return parts

    def _run(
        self, segment: int, parts: list[_Part]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_]]:
        """In the thread: probabilities so far `[k + 1, n, K]`, features, and which are sure."""
        features = _joined([part.features for part in parts], 0)
        probabilities, features = self._segments.probabilities(segment, features)
        earlier = _joined([part.earlier for part in parts], 1)
        earlier = np.concatenate([earlier, probabilities[None]])
        sizes = [len(part.places) for part in parts]
        thresholds = np.repeat(
            np.asarray([part.job.point.thresholds[segment] for part in parts], np.float32), sizes
        )
        scores = self._segments.score.at(earlier, segment)
        if segment == 0:  # in the order in which images came, whatever they show
            weighed = np.repeat([part.job.weighed for part in parts], sizes)
            self.classifier.weigh(scores[weighed].tolist())
        return earlier, features, scores > thresholds

    def _settle(
        self,
        segment: int,
        parts: list[_Part],
        earlier: NDArray[np.float32],
        features: NDArray[Any],
        sure: NDArray[np.bool_],
    ) -> None:
        """Hand out the answers; images that no exit was sure of yet wait for the next segment."""
        start, last = 0, segment == len(self._waiting) - 1
        for part in parts:
            job, rows = part.job, slice(start, start + len(part.places))
            start = rows.stop
            leaves, known = sure[rows], earlier[:, rows]
            self._backlog -= len(leaves) * job.left[segment]
            job.exit[part.places[leaves]] = segment
            job.probabilities[part.places[leaves]] = known[-1, leaves]
            stays = part.places[~leaves]
            if last:
                job.exit[stays] = segment + 1
                job.probabilities[stays] = vote(known[:, ~leaves], job.point.votes)
            elif len(stays):
                waiting = _Part(job, stays, features[rows][~leaves], known[:, ~leaves])
                self._waiting[segment + 1].append(waiting)
                self._backlog += len(stays) * job.left[segment + 1]
            job.unanswered -= len(part.places) if last else int(leaves.sum())
            if not job.unanswered and not job.done.done():
                bias, now = job.point.bias, time.perf_counter()
                probabilities = biased(job.probabilities, bias) if bias else job.probabilities
                took, late = now - job.arrived, now > job.deadline
                holds = self.classifier.promised
                answers = Answers(
                    job.exit, probabilities, job.point, job.promised, took, late, holds
                )
                job.done.set_result(answers)

    def _fail(self, parts: list[_Part], segment: int, error: Exception) -> None:
        """Give up the jobs of a batch that could not run, wherever their images wait."""
        failed = {id(part.job): part.job for part in parts}
        for part in parts:
            self._backlog -= len(part.places) * part.job.left[segment]
        for k, queue in enumerate(self._waiting):
            for part in [part for part in queue if id(part.job) in failed]:
                queue.remove(part)
                self._backlog -= len(part.places) * part.job.left[k]
        for job in failed.values():
            if not job.done.done():
                job.done.set_exception(error)


def _joined(arrays: list[NDArray[Any]], axis: int) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
