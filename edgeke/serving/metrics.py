"""What a server counts, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def made(kind: type, name: str, text: str, labels: Iterable[str] = (), **more: object):  # type: ignore[no-untyped-def]
            return kind(name, text, labels, registry=self._registry, **more)

        self.requests = made(Counter, "edgeke_requests", "Requests by status", ("status",))
        self.exits = made(Counter, "edgeke_answers", "Images answered, by exit", ("exit",))
        self.late = made(Counter, "edgeke_missed_deadlines", "Requests answered late")
        self.refused = made(Counter, "edgeke_refusals", "Requests refused", ("reason",))
        self.waiting = made(Gauge, "edgeke_waiting_images", "Images that wait for a segment")
        self.backlog = made(Gauge, "edgeke_backlog_seconds", "Expected seconds of work that wait")
        self.shift_evidence = made(
            Gauge,
            "edgeke_shift_evidence",
            "That images no longer come as in calibration: 1 is none",
        )
        self.shift_alarm = made(Gauge, "edgeke_shift_alarm", "1 after an alarm: promises are void")
        self.shift_images = made(Gauge, "edgeke_shift_images", "Images weighed for shift")
        self.kept = made(Counter, "edgeke_kept", "Images to be kept, by outcome", ("outcome",))
        self.latency = made(
            Histogram,
            "edgeke_latency_seconds",
            "From a request's arrival to its answer",
            buckets=_BUCKETS,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
