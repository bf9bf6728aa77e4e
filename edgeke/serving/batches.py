"""The queue: images wait for a segment, run in batches, and leave when an exit is sure.

Everything here runs in the event loop; only the segments run in a thread of their own. Images that
came first go first, so what has been accepted is never overtaken: a request is accepted only if the
work before it and its own, as measured, fit into what it asks for.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.classifier import Classifier
from edgeke.device.policy import OperatingPoint, Policy
from edgeke.device.scores import biased, vote
from edgeke.errors import InputError
from edgeke.serving.costs import SegmentCosts, measure

# No batch runs longer, so that an image that is nearly done waits for no long one.
_BATCH_SECONDS = 0.005
_MEASURE_SECONDS = 2.0
# How many times its expected time a batch may have taken lately: known at most, and forgotten so.
_MOST_SLACK, _FORGET = 4.0, 0.9
_HALVE = 2.0  # seconds after which a late answer counts half
_LONGER = 1.25  # how many times longer than expected the wait may be
_CHOICES = 1024  # that are remembered
_STEPS = 10  # from the most accurate point to the cheapest, while waiting uses up a deadline
_WORDS = {"mean_latency_ms": "mean_cost", "deadline_ms": "deadline"}


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


@dataclass(frozen=True)
class _Ran:
    """A batch: probabilities so far `[k + 1, n, K]`, features, and which are sure."""

    earlier: NDArray[np.float32]
    features: NDArray[Any]
    sure: NDArray[np.bool_]


class _Lateness:
    """How much later than expected answers left, lately: on average, and at worst."""

    def __init__(self) -> None:
        self._mean, self._worst, self._seen = 0.0, 0.0, 0.0

    def see(self, seconds: float) -> None:
        """One answer left so much later than expected."""
        self._mean += (1 - _FORGET) * (max(0.0, seconds) - self._mean)
        self._worst, self._seen = max(self.worst, seconds), time.perf_counter()

    @property
    def mean(self) -> float:
        """Seconds."""
        return min(self._mean, self.worst)

    @property
    def worst(self) -> float:
        """Seconds; half as many after every `_HALVE` without a later answer."""
        halved: float = 0.5 ** ((time.perf_counter() - self._seen) / _HALVE)
        return self._worst * halved


@dataclass
class Batches:
    """Answers requests over one classifier's segments. Made in the event loop that uses it."""

    classifier: Classifier
    most: int = 32
    longest: float = 1.0  # seconds that an answer may take when no deadline is given
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
        self._slowed = 1.0  # how many times longer than measured at the start batches took lately
        self._lateness = _Lateness()
        self._choice = lru_cache(_CHOICES)(self._choose_alone)
        self._closing = False
        self._pool = ThreadPoolExecutor(1, "segments")
        self._running, self._ended = 0, 0.0  # batches that the thread has; when it ended the last
        self._idle = asyncio.Event()

    @property
    def backlog(self) -> float:
        """Seconds that a new image waits, as expected now."""
        return self._work_left * self._slower + self._lateness.mean

    @property
    def _slower(self) -> float:
        """How many times longer batches take now; an idle server forgets it."""
        forgotten: float = 0.5 ** ((time.perf_counter() - self._ended) / _HALVE)
        return 1 + (self._slowed - 1) * forgotten

    @property
    def _work_left(self) -> float:
        return max(0.0, self._backlog)  # sums of floats may end below 0

    def check_load(self, arrived: float, images: int = 1) -> None:
        """Errors: BusyError when an answer may take longer than `longest`, whatever is asked.

        A request that takes longer alone has only to wait for less.
        """
        work = self.costs.between(0, 0, images)
        seconds = self.at_worst(arrived, work if work < self.longest else 0.0)
        if seconds > self.longest:
            raise BusyError(f"{seconds:.3f} seconds of work wait; ask again later", seconds)

    @property
    def images(self) -> int:
        """Images that wait for a segment."""
        return sum(len(part.places) for queue in self._waiting for part in queue)

    def start(self) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        self._feed()

    async def close(self) -> None:
        """Answer all that was accepted, then stop."""
        self._closing = True
        self._feed()
        await self._idle.wait()
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
            point, promised = self._at(name, requirements, arrived)
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
        own = self.costs.between(segment, point.deepest, len(features)) * self._slower
        expected = time.perf_counter() + self._work_left * self._slower + own
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
        self._feed()
        answers = await job.done
        self._lateness.see(time.perf_counter() - expected)
        return answers

    def features_shape(self, exit: int) -> tuple[int, int, int]:
        """What an exit gives to the next one, `(C, H, W)`."""
        return self._segments.features_shape(exit)

    def at_worst(self, arrived: float, work: float) -> float:
        """Seconds from `arrived` to an answer that takes so much work, as late as others were."""
        waits = (self._work_left * _LONGER + work) * self._slower
        return time.perf_counter() - arrived + waits + self._lateness.worst

    def _admit(
        self, count: int, requirements: Mapping[str, Any], arrived: float
    ) -> tuple[OperatingPoint, dict[str, float]]:
        """The point that keeps the requirements with all that waits. Errors: as `answer`."""
        request = Request(**{_WORDS.get(name, name): v for name, v in requirements.items()})
        waits = time.perf_counter() - arrived + self.backlog
        try:
            at_worst = self.at_worst(arrived, 0.0)
            point = self._choose(count, request, waits, at_worst, self._slower)
        except UnmetError as error:
            self._choose(count, request, 0.0, 0.0, 1.0)  # no load would help: its own error
            raise BusyError(
                f"{waits:.3f} seconds of work wait; without them this could be met ({error})", waits
            ) from None
        self.check_load(arrived)
        return point

    def _at(
        self, name: str, requirements: Mapping[str, Any], arrived: float
    ) -> tuple[OperatingPoint, dict[str, float]]:
        if requirements:
            raise InputError(f"give point or {', '.join(requirements)}, not both")
        point = self.policy.point(name)
        self.check_load(arrived)
        return point, {"delta": self.policy.delta}

    def _choose(
        self, count: int, request: Request, waits: float, at_worst: float, slower: float
    ) -> tuple[OperatingPoint, dict[str, float]]:
        """The point for a request, and what it promises, if so many seconds pass before its work.

        `waits`: as expected; `at_worst`: as for a deadline; `slower`: times what was measured.
        """
        exits = range(len(self.policy.macs))
        worst = [1e3 * (at_worst + slower * self.costs.between(0, k, count)) for k in exits]
        if request.mean_cost is None and (request.deadline is None or worst[0] <= request.deadline):
            step = 0
            if request.deadline is not None:  # which of them fit is all that matters
                if request == Request(deadline=request.deadline, delta=request.delta):
                    step = int(_STEPS * 1e3 * at_worst / request.deadline)
                deepest = max(k for k in exits if worst[k] <= request.deadline)
                request = replace(request, deadline=deepest + 1.0)
            return self._choice(request, step)
        first = self.costs.first
        alone = [1e3 * (waits + slower * sum(first[: k + 1])) for k in exits]
        return self._choose_at(self.policy, request, alone, worst)

    def _choose_alone(self, request: Request, step: int) -> tuple[OperatingPoint, dict[str, float]]:
        """The choice where nothing waits; a deadline is a number of exits.

        Each step away from the first choice, towards what exit 0 costs, must cost less.
        """
        alone = np.cumsum(self._shared).tolist()
        worst = [float(k + 1) for k in range(len(alone))]
        chosen = self._choose_at(self.policy, request, alone, worst)
        if step == 0:
            return chosen
        times = chosen[0].expected_cost(alone) / alone[0]
        most = alone[0] * times ** (1 - step / _STEPS)
        points = tuple(p for p in self.policy.points if p.expected_cost(alone) <= most)
        try:
            return self._choose_at(replace(self.policy, points=points), request, alone, worst)
        except ValueError:  # there is no such point
            return chosen

    def _choose_at(
        self, policy: Policy, request: Request, alone: list[float], worst: list[float]
    ) -> tuple[OperatingPoint, dict[str, float]]:
        point = choose(policy, request, alone, worst)
        delta = self.policy.delta if request.delta is None else request.delta
        deepest = len(worst) - 1
        if request.deadline is not None:
            deepest = max(k for k, cost in enumerate(worst) if cost <= request.deadline)
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

    def _feed(self) -> None:
        """Give the thread a batch, and a full one more, so that it never waits for this loop."""
        while (segment := self._next()) is not None:
            if self._running and (self._running > 1 or not self._full(segment)):
                return
            parts = self._take(segment)
            self._running += 1
            self._pool.submit(self._run, segment, parts, time.perf_counter())
        if self._closing and not self._running:
            self._idle.set()

    def _full(self, segment: int) -> bool:
        return sum(len(p.places) for p in self._waiting[segment]) >= self._largest[segment]

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

    def _run(self, segment: int, parts: list[_Part], submitted: float) -> None:
        """In the thread."""
        try:
            ran = self._compute(segment, parts)
            # What the thread waited for the processor, or Python's lock, is part of the cost.
            started, self._ended = max(submitted, self._ended), time.perf_counter()
            done = partial(self._settle, segment, parts, ran, self._ended - started)
        except Exception as error:  # theirs alone: the queue goes on
            done = partial(self._fail, segment, parts, error)
        self._loop.call_soon_threadsafe(self._ran, done)

    def _compute(self, segment: int, parts: list[_Part]) -> _Ran:
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
        return _Ran(earlier, features, scores > thresholds)

    def _ran(self, done: Callable[[], None]) -> None:
        """Back in the event loop."""
        self._running -= 1
        done()
        self._feed()

    def _settle(self, segment: int, parts: list[_Part], ran: _Ran, seconds: float) -> None:
        """Hand out the answers; images that no exit was sure of yet wait for the next segment."""
        ratio = min(seconds / self.costs.batch(segment, len(ran.sure)), _MOST_SLACK)
        self._slowed = max(1.0, _FORGET * self._slowed + (1 - _FORGET) * ratio)
        start, last = 0, segment == len(self._waiting) - 1
        for part in parts:
            job, rows = part.job, slice(start, start + len(part.places))
            start = rows.stop
            leaves, known = ran.sure[rows], ran.earlier[:, rows]
            self._backlog -= len(leaves) * job.left[segment]
            job.exit[part.places[leaves]] = segment
            job.probabilities[part.places[leaves]] = known[-1, leaves]
            stays = part.places[~leaves]
            if last:
                job.exit[stays] = segment + 1
                job.probabilities[stays] = vote(known[:, ~leaves], job.point.votes)
            elif len(stays):
                waiting = _Part(job, stays, ran.features[rows][~leaves], known[:, ~leaves])
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

    def _fail(self, segment: int, parts: list[_Part], error: Exception) -> None:
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
