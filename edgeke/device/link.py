"""The link to a server: exchanges that end in time, what they cost, and when it is left alone."""

import contextlib
import http.client
import io
import itertools
import json
import socket
import ssl
import threading
import time
import urllib.parse
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

_MODEL = "/v2/models/edgeke/after"
_MOST = 2**22  # bytes of an answer
_IDLE_CONNECTIONS = 8
# Of what is learnt from an exchange, as shares: the error of one measurement, how far one may be
# from what was expected, how much round trip and rate may change meanwhile, and round trip while
# idle.
_NOISE, _FURTHEST = 0.3, 16.0
_DRIFT, _IDLE_DRIFT = {"round_trip": 0.1, "per_byte": 0.03}, 0.3
_GAIN = 0.3  # how much one counts for milliseconds of the server, and for the deviation
_SURPRISE = 2.0
# Seconds: of a probe at most; without traffic before the next; between two after a surprise.
_PROBE_SECONDS, _IDLE, _SOON = 2.0, 2.0, 0.5
_LONGEST_IDLE = 16.0  # what is as expected is measured half as often, down to this
_PROBE_BYTES = (2**10, 2**14)  # of a probe for the rate, least and most
_PROBE_SHARE = 0.02  # seconds that it should take
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_FAILURES = 2  # in a row, then the server is left alone for a while


class LinkError(Exception):
    """There is no answer that can be used; the message says why."""


@dataclass(frozen=True)
class Reply:
    """Probabilities `[N, K]` of the last exit, and what they cost in milliseconds and bytes."""

    probabilities: NDArray[np.float32]
    server_ms: float
    sent_bytes: int


class _Stream(io.RawIOBase):
    """Reads from a socket until a moment, however slowly the bytes come."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until = connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._until))
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` reads from."""
        return io.BufferedReader(self)


class Link:
    """A server's address, its connections, and estimates of what a message to it costs.

    Safe to share between threads. `segments` is the hash that the server's must have.
    """

    def __init__(self, url: str, segments: str, token: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        try:
            port = parts.port
        except ValueError:
            sound = False
        if not sound:
            raise InputError(f"server = {url!r:.80} must be an address such as http://host:8000")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InputError("a token must be printable ASCII")
        self.url, self.segments = url, segments
        self._token, self._host = token, str(parts.hostname)
        self._port = port or {"http": 80, "https": 443}[parts.scheme]
        self._path, self._netloc = parts.path.rstrip("/"), parts.netloc.rpartition("@")[2]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address: tuple[Any, ...] | None = None
        self._ids = itertools.count()
        self.trouble: str | None = None  # what failed last, until something works
        self.round_trip, self.per_byte, self.deviation = 0.05, 1e-6, 0.02  # until measured
        self._doubt = {"round_trip": 1.0, "per_byte": 1.0}  # variances, as shares
        self._measured = False  # whether a probe has come back
        self.server_ms: dict[str, float] = {}  # as it says when it is probed
        self.server_pace = 1.0  # how many times longer it has taken since
        self._failures, self._pause = 0, _FIRST_PAUSE
        self._retry: float | None = 0.0  # when an unreachable server is tried again
        self._seen = self._probed = -_IDLE
        self._surprised, self._wait = False, _IDLE
        self.version = 0  # grows when there is news: of a probe, a surprise, a failure
        self.after_fork()

    def after_fork(self) -> None:
        """Forget connections and threads of another process."""
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close, self._idle)
        self._lock, self._probing = threading.Lock(), threading.Lock()

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            _close(self._idle)

    @property
    def usable(self) -> bool:
        """Whether the server answered lately, with the same segments."""
        return self._retry is None

    def seconds(self, size: int | float) -> float:
        """Expected seconds of an exchange that sends so many bytes, the server's time left out."""
        return self.round_trip + self.per_byte * size

    def worst_seconds(self, size: int | float) -> float:
        """Seconds that an exchange rarely exceeds."""
        return self.seconds(size) + 4 * self.deviation

    def head_bytes(self, after: str) -> int:
        """Bytes that an exchange sends besides the message."""
        return len(self._request(after, b"", "00000", None))

    def exchange(self, after: str, message: bytes, until: float, deadline: bool = False) -> Reply:
        """Send a message and wait for the answer, until a moment of `time.monotonic`.

        With `deadline` the server is told how long that is, and refuses what it cannot do by then.
        Errors: LinkError; the server is left alone after several in a row.
        """
        name = f"{next(self._ids):05x}"
        left = max(1.0, 1e3 * (until - time.monotonic())) if deadline else None
        request = self._request(after, message, name, left)
        started = time.monotonic()
        try:
            content, tail = self._send(request, until)
            reply = self._reply(content, tail, name, len(request))
        except (LinkError, OSError, http.client.HTTPException, ValueError) as error:
            waited = time.monotonic() - started
            if waited > self.seconds(len(request)):
                self._observe(len(request), waited)
            words = f"{self.url}: {error or type(error).__name__}"
            self._fail(words, isinstance(error, ConnectionRefusedError))
            raise LinkError(words) from error
        took = time.monotonic() - started
        self._observe(len(request), took - reply.server_ms / 1e3)
        known = self.server_ms.setdefault(after, reply.server_ms)
        ratio = min(max(reply.server_ms / max(known, 1e-3), 1 / _FURTHEST), _FURTHEST)
        self.server_pace += _GAIN * (ratio - self.server_pace)
        self._succeed(True)
        return reply

    def probe(self) -> None:
        """Measure round trip and rate with two messages that the server throws away.

        A server that does not answer is left alone for a while; a warning says why.
        """
        with self._probing:
            self._probe()
        if self.trouble is not None:
            warnings.warn(f"answers stay on this device: {self.trouble}", stacklevel=4)

    def keep_measured(self) -> None:
        """Probe in a thread of its own, where that is due; returns at once."""
        now = time.monotonic()
        if self._retry is not None:
            due = now >= self._retry
        elif self._surprised:
            due = now >= self._probed + _SOON
        else:
            due = now >= max(self._seen, self._probed) + self._wait
        if due and self._probing.acquire(blocking=False):

            def run() -> None:
                try:
                    self._probe()
                finally:
                    self._probing.release()

            threading.Thread(target=run, name="edgeke-probe", daemon=True).start()

    def _probe(self) -> None:
        self._probed, surprised = time.monotonic(), self._surprised
        self._surprised = False
        until = self._probed + _PROBE_SECONDS
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            )[0]
            self._address = (family, kind, protocol, address)
            self._send(self._head("", 0, ""), until)  # opens the connection
            size, most = _PROBE_BYTES
            if not surprised:  # else the rate is in doubt, and little is sent
                size = int(min(max(_PROBE_SHARE / self.per_byte, size), most))
            short, long = [], []
            for _ in range(2):
                content, seconds = self._measure(0, until)
                short.append(seconds)
                long.append(self._measure(size, until)[1])
        except (LinkError, OSError, http.client.HTTPException, ValueError) as error:
            self._surprised = True  # so that the next is small
            self._fail(f"{self.url}: {error or type(error).__name__}", True)
            return
        costs = content.get("milliseconds")
        if content.get("segments") != self.segments or not isinstance(costs, dict):
            self._fail(f"{self.url} serves another model", True)
            return
        self.server_ms |= {str(k): float(v) for k, v in costs.items()}
        # Of the rate the lesser of two: a busy device is late, which is no matter of bytes. What is
        # less than the noise of a round trip says no more than that.
        per_byte = max(min(long) - min(short), min(short) / 16) / size
        if self._measured and self._retry is None:
            known = self.round_trip
            moved = min(short) > _SURPRISE * known or max(short) < known / _SURPRISE
            for seconds in short:
                self._observe(0, seconds, probe=True)
            with self._lock:
                if moved:
                    self.round_trip = sum(short) / 2
                noise = self.deviation / (size * max(per_byte, self.per_byte))
                self.per_byte += (per_byte - self.per_byte) / (1 + noise**2)
            self._wait = _IDLE if self._surprised else min(2 * self._wait, _LONGEST_IDLE)
        else:
            with self._lock:
                self.round_trip, self.per_byte = max(sum(short) / 2, 1e-5), per_byte
                self.deviation = max(self.deviation / 2, self.round_trip / 8)
                self._doubt = dict.fromkeys(self._doubt, 1.0)
                self._measured = True
        with self._lock:
            self.version += 1
        self._succeed(False)

    def _measure(self, size: int, until: float) -> tuple[dict[str, Any], float]:
        request = self._head("", size, "") + bytes(size)
        started = time.monotonic()
        content, _ = self._send(request, until)
        return content, time.monotonic() - started

    def _request(self, after: str, message: bytes, name: str, left: float | None) -> bytes:
        size = len(message)
        tensor = {
            "name": "features",
            "datatype": "UINT8",
            "shape": [size],
            "parameters": {"binary_data_size": size},
        }
        content: dict[str, Any] = {"id": name, "inputs": [tensor]}
        if left is not None:
            content["parameters"] = {"deadline_ms": round(left, 1)}
        text = json.dumps(content, separators=(",", ":")).encode()
        length = f"Inference-Header-Content-Length: {len(text)}\r\n"
        return self._head(f"/{after}/infer", len(text) + size, length) + text + message

    def _head(self, path: str, length: int, more: str) -> bytes:
        token = f"Authorization: Bearer {self._token}\r\n" if self._token else ""
        return (
            f"POST {self._path}{_MODEL}{path} HTTP/1.1\r\nHost: {self._netloc}\r\n"
            f"Content-Length: {length}\r\n{more}{token}\r\n"
        ).encode()

    def _send(self, request: bytes, until: float) -> tuple[dict[str, Any], bytes]:
        """JSON and binary tail of the answer; a connection that the server closed is replaced."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            with contextlib.suppress(ConnectionError, http.client.RemoteDisconnected):
                return self._over(connection, request, until)
        return self._over(self._connect(until), request, until)

    def _connect(self, until: float) -> socket.socket:
        if self._address is None:
            raise LinkError("was not found yet")
        *kind, address = self._address
        connection = socket.socket(*kind)
        try:
            connection.settimeout(_left(until))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection.settimeout(_left(until))
                connection = self._tls.wrap_socket(connection, server_hostname=self._host)
        except BaseException:
            connection.close()
            raise
        return connection

    def _over(
        self, connection: socket.socket, request: bytes, until: float
    ) -> tuple[dict[str, Any], bytes]:
        """One exchange; unless all of it went well the connection is not used again."""
        keep = False
        try:
            connection.settimeout(_left(until))
            connection.sendall(request)
            response = http.client.HTTPResponse(_Stream(connection, until), method="POST")  # type: ignore[arg-type]
            response.begin()
            if response.length is None or response.length > _MOST:
                raise LinkError("an answer without a length, or one that is too long")
            body = response.read()
            if response.status != 200:
                raise LinkError(f"status {response.status}: {body[:200].decode(errors='replace')}")
            split = response.getheader("inference-header-content-length", str(len(body)))
            content = json.loads(body[: int(split)])
            if not isinstance(content, dict):
                raise LinkError("an answer that is no JSON object")
            keep = not response.will_close
            return content, body[int(split) :]
        finally:
            with self._lock:
                keep = keep and len(self._idle) < _IDLE_CONNECTIONS
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    def _reply(self, content: Mapping[str, Any], tail: bytes, name: str, sent: int) -> Reply:
        """The checked answer. Errors: LinkError for one to another request or of another model."""
        parameters = content.get("parameters")
        if content.get("id") != name or not isinstance(parameters, dict):
            raise LinkError("an answer to another request")
        if parameters.get("segments") != self.segments:
            raise LinkError("an answer of another model")
        values = np.frombuffer(tail, "<f4").astype(np.float32)
        if not len(values) or not (values >= 0).all() or abs(values.sum() - 1) > 1e-3:
            raise LinkError("an answer that is no probabilities")
        return Reply(values[None], float(parameters["milliseconds"]), sent)

    def _observe(self, size: int, seconds: float, probe: bool = False) -> None:
        """Learn from an exchange: a Kalman filter on round trip and rate, in shares of them.

        What is not as expected is put down to the two by what they have in it, and by their doubt.
        """
        with self._lock:
            expected = self.seconds(size)
            ratio = min(max(seconds / expected, 1 / _FURTHEST), _FURTHEST)
            shares = {"round_trip": self.round_trip / expected}
            shares["per_byte"] = 1 - shares["round_trip"]
            drifts = _DRIFT | ({"round_trip": _IDLE_DRIFT} if probe else {})
            doubt = {name: min(1.0, self._doubt[name] + d**2) for name, d in drifts.items()}
            total = sum(shares[name] ** 2 * each for name, each in doubt.items()) + _NOISE**2
            error = abs(seconds - expected)
            surprised = error > 3 * self.deviation and not 1 / _SURPRISE < ratio < _SURPRISE
            for name, share in shares.items():
                gain = share * doubt[name] / total
                setattr(self, name, getattr(self, name) * (1 + gain * (ratio - 1)))
                left = doubt[name] * (1 - gain * share)
                self._doubt[name] = max(left, _NOISE**2) if surprised else left
            self.deviation += _GAIN * (error - self.deviation)
            self._surprised |= surprised
            self.version += surprised
            if not probe:
                self._seen = time.monotonic()

    def _succeed(self, answered: bool) -> None:
        """Use the server; after a probe alone the next failure leaves it alone again, longer."""
        with self._lock:
            if answered:
                self._failures, self._pause = 0, _FIRST_PAUSE
            elif self._retry is not None:
                self._failures = _FAILURES - 1
            self.version += self._retry is not None
            self._retry = self.trouble = None

    def _fail(self, words: str, at_once: bool) -> None:
        with self._lock:
            self.trouble = words
            self._failures += 1
            if at_once or self._failures >= _FAILURES:
                self._retry = time.monotonic() + self._pause
                self.version += 1
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def _close(connections: list[socket.socket]) -> None:
    while connections:
        connections.pop().close()


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left
