"""What lies under the application: an event loop with short turns, and a parser with a limit.

asyncio reads every socket that is ready before anything else gets a turn. With 400 clients that
were refused, a turn took 0.4 seconds here, and the segments' thread waited for it after each batch.
"""

import asyncio
import selectors
import time
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# In an ASGI scope: when a request came at the earliest, by `time.perf_counter`; and when it came to
# another process that has handed it on, by the wall clock.
ARRIVED, CAME = "edgeke.arrived", "edgeke.came"
_SOCKETS = 8  # are read in one turn of the loop
_HEADERS = 64 * 2**10  # bytes of a request's head

_Ready = list[tuple[selectors.SelectorKey, int]]


class _Sockets(selectors.DefaultSelector):
    """Hands out in parts what is ready, and remembers since when it may have waited."""

    def __init__(self) -> None:
        super().__init__()
        self._ready: _Ready = []
        self._looked = time.perf_counter()
        self.since = self._looked  # nothing that is handed out had come before

    def select(self, timeout: float | None = None) -> _Ready:
        """As the base's, but few at a time."""
        if not self._ready:
            self.since, self._ready = self._looked, super().select(0)
            if not self._ready and (timeout is None or timeout > 0):
                self._ready = super().select(timeout)
                self.since = time.perf_counter()  # nothing had waited
            self._looked = time.perf_counter()
        part, self._ready = self._ready[:_SOCKETS], self._ready[_SOCKETS:]
        # What has changed since the look is left out; if it is still ready, the next look says so.
        now = self.get_map()
        return [(key, events) for key, events in part if now.get(key.fd) == key]


class Loop(asyncio.SelectorEventLoop):
    """An event loop that reads few sockets in a turn."""

    def __init__(self) -> None:
        self._sockets = _Sockets()
        super().__init__(self._sockets)

    @property
    def since(self) -> float:
        """The earliest time, by `time.perf_counter`, at which what is read now can have come."""
        return self._sockets.since


def arrived(scope: MutableMapping[str, Any]) -> float:
    """When a request came, by `time.perf_counter`."""
    now = time.perf_counter()
    if CAME in scope:
        return now - max(0.0, time.time() - float(scope[CAME]))
    return float(scope.get(ARRIVED, now))


class Protocol(HttpToolsProtocol):
    """uvicorn's on httptools, which would take headers of any length."""

    _unread = 0  # bytes since a part of a request was complete
    _headers = 0

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._unread += len(data)
        super().data_received(data)
        if self._unread > _HEADERS and not self.transport.is_closing():
            self.send_400_response(f"The headers are larger than {_HEADERS} bytes.")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._headers = 0
        super().on_message_begin()
        since = self.loop.since if isinstance(self.loop, Loop) else time.perf_counter()
        self.scope[ARRIVED] = since  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        """A part of the address."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header is complete."""
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._unread = 0
        super().on_body(body)

    def _count(self, part: bytes) -> None:
        self._headers += len(part)
        if self._headers > _HEADERS:
            raise ValueError("too large")  # the parser gives up, and 400 is answered


# How uvicorn serves an application of ours.
UVICORN: dict[str, Any] = {
    "http": Protocol,
    "loop": "edgeke.serving.front:Loop",
    "proxy_headers": False,
    "server_header": False,
    "access_log": False,
    "log_config": None,
}
