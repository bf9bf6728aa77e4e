"""The rest of an image's way on a server: the choice per request, and the way back."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.codec import RAW, Codec, encode, encode_picture, parse_codec
from edgeke.device.link import Link, LinkError, Reply
from edgeke.device.partitions import Partition, as_logits
from edgeke.device.policy import OperatingPoint, Policy
from edgeke.device.profile import Profile, increasing
from edgeke.device.scores import Score, biased, calibrated_probabilities, vote
from edgeke.device.segments import Segments
from edgeke.device.timing import time_interleaved
from edgeke.errors import InputError

if TYPE_CHECKING:
    from edgeke.device.classifier import Classifier

Floats = NDArray[np.float32]

_ROUNDS, _SECONDS = 20, 1.0  # of measuring
# A better link is looked for where it could save a tenth.
_WORTH = 0.9
# Plans of so many requests are kept, each for requests of so many times the time it took to make.
_PLANS, _KEPT = 64, 100
# How much a request counts for the device's pace, how much slower one may be than expected, and for
# how many seconds a way's own pace is known.
_PACE, _SLOWEST, _KNOWN = 0.1, 250.0, 60.0
_NOTHING = (1.0, 1.0, -math.inf)
# The device's own rest may take so many times its 95th percentile; and of a deadline so much is
# kept back, 2 ms at least, since a process is not always woken at once.
_SPARE, _KEPT_BACK = 1.1, 0.05


@dataclass(frozen=True)
class Answer:
    """What came of an image; `exit` in 0..E (E = voted), `place` is `device` or `server`.

    `void`: the answer is of another exit than the point's promises are about.
    """

    probabilities: Floats
    exit: int
    point: OperatingPoint
    place: str
    sent_bytes: int
    void: bool


@dataclass(frozen=True)
class _Way:
    """A partition with or without zlib, and the mean bytes of an exchange.

    `ms` of a processor until each of the device's exits has answered, and at last until the message
    is made.
    """

    partition: Partition
    codec: Codec | None
    pack: bool
    ms: tuple[float, ...]
    size: float

    @property
    def name(self) -> str:
        return f"{self.partition.name}{' zlib' if self.pack else ''}"

    @property
    def after(self) -> str:
        return RAW if self.codec is None else str(self.partition.after)

    def message(self, image: NDArray[np.uint8], features: Floats) -> bytes:
        if self.codec is None:
            return encode_picture(image)
        return encode(features, self.codec, self.pack)


@dataclass(frozen=True)
class _Plan:
    """The way (None: all on the device) and the point of a request.

    `until` so many milliseconds have gone into requests, unless the link or the device changes.

    `open`: whether a better link could change that; else there is no need to measure it.
    """

    way: _Way | None
    point: OperatingPoint
    measured: Profile
    version: int
    until: float
    open: bool


class RemoteRest:
    """Answers images on the device or on a server, whichever is expected to be better now."""

    def __init__(
        self, classifier: "Classifier", url: str, token: str | None, patience_ms: float
    ) -> None:
        """Errors: InputError for an address, or a model that has no partitions."""
        partitions, sha256 = classifier.partitions, classifier.segments_sha256
        if not partitions or sha256 is None:
            raise InputError(
                f"{classifier.bundle.model} has no partitions, so nothing can be sent to a server; "
                "set calibrate.partitions and run the stage calibrate again"
            )
        segments = classifier.open_segments()
        if segments is None:
            raise InputError(
                f"a server needs the segments, and there are none beside {classifier.bundle.model};"
                " give the bundle folder, with segments/ in it"
            )
        if not 1 <= patience_ms <= 1e6:
            raise InputError(f"patience_ms = {patience_ms!r:.40} must be 1 to 1,000,000")
        self.link = Link(url, sha256, token)
        self._classifier, self._patience = classifier, patience_ms / 1e3
        self._local, self._ways = _measure_ways(classifier, partitions, segments, self.link)
        # A default point is for these requests alone, where it keeps what the device's own keeps.
        own = _kept(classifier.policy)
        self._usual = {p.name for p in partitions if not own & _unmet(p.policy)}
        # By way: milliseconds that the device took of late, those of its processor that were
        # expected, and when. It may be throttled or busy, and pictures are not noise. A new profile
        # begins this anew.
        self._paces: dict[str, tuple[float, float, float]] = {}
        self._profile: Profile | None = None
        self._worked = 0.0  # milliseconds that all requests took
        # The choice depends on calibration: every policy gets a share of the risk.
        self._policies = 1 + len(partitions)
        self._plans: dict[Request, _Plan] = {}
        self.link.probe()

    def answer(self, image: NDArray[np.uint8], request: Request, started: float) -> Answer:
        """Answer an image uint8 `[H, W, C]`; `started` by `time.monotonic`.

        Errors: UnmetError, as `choose`.
        """
        try:
            return self._answer(image, request, started)
        finally:
            self._worked += 1e3 * (time.monotonic() - started)

    def _answer(self, image: NDArray[np.uint8], request: Request, started: float) -> Answer:
        measured = self._classifier.measured
        assert measured is not None
        way, point = self._plan(request, measured)
        if way is None:
            began = time.perf_counter()
            probabilities, exit = self._classifier.run_at(image, point)
            self._keep_pace(None, began, self._local[min(exit, len(self._local) - 1)])
            return Answer(probabilities, exit, point, "device", 0, False)
        return self._partly(way, point, image, request, measured, started)

    def _plan(self, request: Request, measured: Profile) -> tuple[_Way | None, OperatingPoint]:
        """The way and the point for a request now; None: all of it on the device.

        Planning takes time, too, so a plan stays for a while, unless the link has changed.
        """
        link, now = self.link, time.monotonic()
        if measured is not self._profile:
            self._profile = measured
            self._paces = {"": (sum(measured.median_ms), sum(self._local), 0.0)}
        plan, version = self._plans.get(request), link.version
        if (
            plan is None
            or self._worked >= plan.until
            or (plan.measured, plan.version) != (measured, version)
        ):
            ways = self._ways if link.usable else []
            ways = [way for way in ways if link.seconds(way.size) < self._patience]
            way, point, cost = self._best(request, measured, ways)
            open = not _asks_nothing(request) or self._hope(measured, _WORTH * cost)
            until = self._worked + 1e3 * _KEPT * (time.monotonic() - now)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[request] = _Plan(way, point, measured, version, until, open)
        if plan.open:
            link.keep_measured()
        return plan.way, plan.point

    def _hope(self, measured: Profile, limit: float) -> bool:
        """Whether some way would cost less than a limit if its link cost nothing."""
        for way in self._ways:
            if way.partition.name not in self._usual:
                continue
            policy, costs = way.partition.policy, self._costs(way, measured, link=False)
            if policy.point(policy.default).expected_cost(costs) < limit:
                return True
        return False

    def _best(
        self,
        request: Request,
        measured: Profile,
        ways: Sequence[_Way],
    ) -> tuple[_Way | None, OperatingPoint, float]:
        shared = self._shared(request)
        if _asks_nothing(request):
            ways = [way for way in ways if way.partition.name in self._usual]
        best: dict[str, tuple[_Way, list[float]]] = {}  # of those with and without zlib
        for each in ways:
            costs = self._costs(each, measured)
            other = best.get(each.partition.name)
            if other is None or costs[-1] < other[1][-1]:
                best[each.partition.name] = each, costs
        pace = self._pace(None)
        local = [pace * ms for ms in self._local]
        options: list[tuple[_Way | None, Policy, list[float]]] = [
            (None, self._classifier.policy, local)
        ]
        options += [(way, way.partition.policy, costs) for way, costs in best.values()]
        found, unmet = [], None
        for way, policy, costs in options:
            worst = measured.p95_ms if way is None else self._worst(way, measured)
            try:
                point = choose(policy, shared, costs, worst)
            except UnmetError as error:
                unmet = unmet or error
            except InputError:
                if way is None:
                    raise  # what no model could answer; a partition may lack points for it
            else:
                found.append((way, point, point.expected_cost(costs)))
        if not found:
            assert unmet is not None
            raise unmet
        if shared.mean_cost is None and shared.deadline is None:
            chosen = min(found, key=lambda each: each[2])
        else:
            chosen = max(found, key=lambda each: (each[1].validation_accuracy, -each[2]))
        return chosen

    def _shared(self, request: Request) -> Request:
        """The request at a policy's share of the risk.

        Without a requirement every policy has its default point, which keeps its promise by itself.
        """
        if _asks_nothing(request):
            return request
        delta = self._classifier.policy.delta if request.delta is None else request.delta
        return replace(request, delta=delta / self._policies)

    def _costs(self, way: _Way, measured: Profile, link: bool = True) -> list[float]:
        """Expected milliseconds until each exit of the partition's policy has answered.

        Without `link`, what an exchange costs beside the server's work is left out.
        """
        pace = self._pace(way)
        costs = [pace * ms for ms in way.ms]
        costs[-1] += self._server_ms(way, measured)
        if link:
            costs[-1] += 1e3 * self.link.seconds(way.size)
        return costs

    def _worst(self, way: _Way, measured: Profile) -> list[float]:
        """Milliseconds that these exits rarely exceed."""
        known = list(measured.p95_ms[: way.partition.after + 1])
        last = max([self._pace(way) * way.ms[-1], *known])
        last += 1e3 * self.link.worst_seconds(way.size) + self._server_ms(way, measured)
        return [*known, last]

    def _server_ms(self, way: _Way, measured: Profile) -> float:
        link = self.link
        return link.server_pace * link.server_ms.get(way.after, measured.median_ms[-1])

    def _pace(self, way: _Way | None) -> float:
        """How many times longer than its processor's the device's work for a way takes of late.

        What is known of a way is its own, and else that of the device alone (None).
        """
        took, expected, when = self._paces.get("" if way is None else way.name, _NOTHING)
        if way is not None and time.monotonic() > when + _KNOWN:
            return self._pace(None)
        return took / expected

    def _keep_pace(self, way: _Way | None, began: float, expected: float) -> None:
        """Count a way's work of so many expected milliseconds that began at a moment."""
        took = min(1e3 * (time.perf_counter() - began), _SLOWEST * expected)
        name = "" if way is None else way.name
        old_took, old, when = self._paces.get(name, _NOTHING)
        now = time.monotonic()
        if way is not None and now > when + _KNOWN:
            mean = sum(way.ms) / len(way.ms)
            old_took, old = self._pace(None) * mean, mean
        old_took += _PACE * (took - old_took)
        old += _PACE * (expected - old)
        self._paces[name] = old_took, old, now

    def _partly(
        self,
        way: _Way,
        point: OperatingPoint,
        image: NDArray[np.uint8],
        request: Request,
        measured: Profile,
        started: float,
    ) -> Answer:
        """Exits on the device first, then the server, or in its place the device."""
        segments = self._classifier.open_segments()
        assert segments is not None
        policy, after = way.partition.policy, way.partition.after
        began = time.perf_counter()
        score = Score(policy.score, policy.score_weights)
        features: NDArray[Any] = image[None]
        earlier = np.empty((0, 1, len(self._classifier.classes)), np.float32)
        for exit in range(after + 1):
            logits, features = segments.logits(exit, features)
            if exit == 0:
                self._weigh(logits)
            earlier = _with(earlier, logits, policy.temperatures[exit])
            if score.at(earlier, exit)[0] > np.float32(point.thresholds[exit]):
                self._keep_pace(way, began, way.ms[exit])
                return self._as_answer(earlier[-1], exit, point, "device", 0, False)
        deepest = self._deepest(request, measured, after)
        until = self._until(request, measured, after, deepest, started)
        sent, place, void = 0, "server", False
        try:
            message = way.message(image, features)
            self._keep_pace(way, began, way.ms[-1])
            sent = len(message) + self.link.head_bytes(way.after)
            reply = self._ask(way, message, until, request.deadline is not None)
            last = reply.probabilities
            if last.shape[1] != earlier.shape[2]:
                raise LinkError("an answer of another number of classes")
        except LinkError:
            place = "device"
            exit, last = after, earlier[-1] if len(earlier) else np.empty((0, 0), np.float32)
            for exit in range(after + 1, deepest + 1):
                last, features = segments.probabilities(exit, features)
            void = deepest < len(measured.p95_ms) - 1
            if void:
                return self._as_answer(last, exit, point, place, sent, void)
        exits = after + 2
        every = _with(earlier, as_logits(last), policy.temperatures[-1])
        sure = score.at(every, exits - 1)[0] > np.float32(point.thresholds[-1])
        answer = every[-1] if sure else vote(every, point.votes)
        last_exit = len(self._classifier.policy.macs) - 1 + (not sure)
        return self._as_answer(answer, last_exit, point, place, sent, void)

    def _weigh(self, logits: Floats) -> None:
        """Count the image towards shift, by the score of the policy that has the histogram."""
        own = self._classifier.policy
        first = calibrated_probabilities(logits[None], own.temperatures[:1])
        self._classifier.weigh(Score(own.score, own.score_weights).at(first, 0).tolist())

    def _ask(self, way: _Way, message: bytes, until: float, deadline: bool) -> Reply:
        if time.monotonic() >= until:
            raise LinkError("there is no time left to ask")
        return self.link.exchange(way.after, message, until, deadline)

    def _as_answer(
        self, answers: Floats, exit: int, point: OperatingPoint, place: str, sent: int, void: bool
    ) -> Answer:
        answers = biased(answers, point.bias) if point.bias else answers
        return Answer(answers[0], exit, point, place, sent, void)

    def _deepest(self, request: Request, measured: Profile, after: int) -> int:
        """The exit at which the device would answer itself: the last that fits into a deadline."""
        deadline = math.inf if request.deadline is None else request.deadline
        fitting = [exit for exit, cost in enumerate(measured.p95_ms) if cost <= deadline]
        return max(after, 0, *fitting)

    def _until(
        self, request: Request, measured: Profile, after: int, deepest: int, started: float
    ) -> float:
        """How long to wait for the server: until only the device's own rest meets the deadline."""
        patience = time.monotonic() + self._patience
        if request.deadline is None:
            return patience
        before = measured.p95_ms[after] if after >= 0 else 0.0
        rest = (measured.p95_ms[deepest] - before) / 1e3
        deadline = request.deadline / 1e3
        return min(patience, started + deadline - _SPARE * rest - max(2e-3, _KEPT_BACK * deadline))


def _asks_nothing(request: Request) -> bool:
    return request == Request(delta=request.delta)


def _kept(policy: Policy) -> set[str]:
    """The requirements that a policy's default point keeps, as far as they can be kept."""
    kinds = ("max_degradation", "min_accuracy", "max_miss")
    return {r.name for r in policy.requirements if r.kind in kinds} - _unmet(policy)


def _unmet(policy: Policy) -> set[str]:
    return {result.name for result in policy.unmet}


def _with(earlier: Floats, logits: Floats, temperature: float) -> Floats:
    more = calibrated_probabilities(logits[None], (temperature,))
    return np.concatenate([earlier, more])


def _measure_ways(
    classifier: "Classifier", partitions: Sequence[Partition], segments: Segments, link: Link
) -> tuple[list[float], list[_Way]]:
    """The processor's milliseconds until each exit of the one file, and the ways of all partitions.

    All on noise. How long a processor is at work is not changed by what else it does.
    """
    image = np.random.default_rng(0).integers(0, 256, classifier.image_shape, np.uint8)
    exits, deepest = len(classifier.policy.macs), max(each.after for each in partitions)
    features: dict[int, NDArray[Any]] = {-1: image[None]}
    calls: dict[str, Callable[[], Any]] = {}
    for exit in range(exits):
        calls[f"file {exit}"] = partial(classifier.forced(exit), image)
    for exit in range(deepest + 1):
        features[exit] = segments.logits(exit, features[exit - 1])[1]
        calls[f"segments {exit}"] = partial(_first_exits, segments, classifier.policy, exit, image)
    ways = []
    for each in partitions:
        codec = None if each.codec == RAW else parse_codec(each.codec)
        head = link.head_bytes(RAW if codec is None else str(each.after))
        ways.append(_Way(each, codec, False, (), head + each.sent_bytes))
        if codec is not None:
            ways.append(_Way(each, codec, True, (), head + each.packed_bytes))
    for n, way in enumerate(ways):
        calls[str(n)] = partial(way.message, image, features[way.partition.after])
    timed = time_interleaved(calls, _ROUNDS, _SECONDS, clock=time.thread_time)
    ms = {name: float(np.median(times)) for name, times in timed.items()}
    local = increasing([ms[f"file {k}"] for k in range(exits)])
    parts = [ms[f"segments {k}"] for k in range(deepest + 1)]
    timed_ways = []
    for n, way in enumerate(ways):
        known = parts[: way.partition.after + 1]
        every = increasing([*known, max([0.0, *known]) + ms[str(n)]])
        timed_ways.append(replace(way, ms=every))
    return list(local), timed_ways


def _first_exits(segments: Segments, policy: Policy, last: int, image: NDArray[np.uint8]) -> None:
    """What the device does before a message, for its time."""
    score, features = Score(policy.score, policy.score_weights), image[None]
    earlier = np.empty((0, 1, 0), np.float32)
    for exit in range(last + 1):
        logits, features = segments.logits(exit, features)
        row = calibrated_probabilities(logits[None], policy.temperatures[exit : exit + 1])
        earlier = np.concatenate([earlier, row]) if exit else row
        score.at(earlier, exit)
