"""A link to test with: a TCP proxy in a process of its own, with a rate, a delay, and faults.

    with Link("127.0.0.1", port) as link:     # link.port is where clients connect
        link.set(rate_mbit=1.0, delay_ms=10.0, faults={"stall": 0.2})

`delay_ms` is that of one direction. Faults are drawn per request, and change what comes back:
`stall` (0.2 to 2 s), `silence` (10 s), `garbage`, `half` (of the reply, then the end), `swap` (the
id of another request), `reset`, `refuse` (a new connection). The seed makes them repeatable.
"""

import asyncio
import contextlib
import multiprocessing
import random
import re
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

_CHUNK = 1460  # bytes that share a time of arrival
_RUN_AHEAD = 2**16  # bytes that a sender may have on the way


@dataclass
class Settings:
    """How the link is now."""

    rate_mbit: float | None = None
    delay_ms: float = 0.0
    faults: dict[str, float] = field(default_factory=dict)


class Link:
    """The proxy's process."""

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        arguments = (host, port, seed, theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self.port: int = self._control.recv()

    def set(self, **settings: Any) -> None:
        """Change the link at once, also for what is sent on open connections."""
        self._control.send(settings)
        self._control.recv()

    @property
    def sent(self) -> int:
        """Bytes that clients have sent so far."""
        self._control.send(None)
        return int(self._control.recv())

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


class _Proxy:
    def __init__(self, host: str, port: int, seed: int) -> None:
        self.target, self.dice, self.settings = (host, port), random.Random(seed), Settings()
        self.free = {"up": 0.0, "down": 0.0}  # when a direction has sent all it was given
        self.sent = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = {"name": ""}
        if self.dice.random() < self.settings.faults.get("refuse", 0.0):
            writer.transport.abort()
            return
        try:
            there, out = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        directions = [self.pump(reader, out, "up", fault), self.pump(there, writer, "down", fault)]
        tasks = [asyncio.ensure_future(each) for each in directions]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for each in (out, writer):
            with contextlib.suppress(OSError):
                each.close()

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str, fault: Any
    ) -> None:
        """One direction of a connection: what is read arrives when the link has carried it."""
        loop = asyncio.get_running_loop()
        arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_RUN_AHEAD // _CHUNK)

        async def deliver() -> None:
            while True:
                due, data = await arrivals.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        delivery = asyncio.ensure_future(deliver())
        try:
            while True:
                data = await reader.read(_CHUNK)
                late = 0.0
                if way == "up":
                    self.sent += len(data)
                    if data.startswith(b"POST"):
                        fault["name"] = self.draw()
                elif fault["name"] and data:
                    data, late = self.spoil(fault["name"], data, writer)
                settings, now = self.settings, loop.time()
                start = max(now, self.free[way])
                if settings.rate_mbit is not None:
                    start += 8 * len(data) / settings.rate_mbit / 1e6
                    self.free[way] = start
                await arrivals.put((start + settings.delay_ms / 1e3 + late, data))
                if not data or fault["name"] == "half" and way == "down":
                    await arrivals.put((start, b""))
                    await delivery
                    return
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            delivery.cancel()

    def draw(self) -> str:
        dice = self.dice.random()
        for name, probability in self.settings.faults.items():
            if name != "refuse":
                if dice < probability:
                    return name
                dice -= probability
        return ""

    def spoil(self, name: str, data: bytes, writer: asyncio.StreamWriter) -> tuple[bytes, float]:
        """What comes back instead, and how many seconds later."""
        if name == "stall":
            return data, self.dice.uniform(0.2, 2.0)
        if name == "silence":
            return data, 10.0
        if name == "garbage":
            return self.dice.randbytes(len(data)), 0.0
        if name == "half":
            return data[: len(data) // 2], 0.0
        if name == "swap":
            return re.sub(rb'"id": "\w{5}', b'"id": "fffff', data), 0.0
        writer.transport.abort()
        raise ConnectionResetError


def _serve(host: str, port: int, seed: int, control: Connection) -> None:
    async def run() -> None:
        proxy = _Proxy(host, port, seed)
        server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0)
        control.send(server.sockets[0].getsockname()[1])

        def listen() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    change = control.recv()
                    if change is None:
                        control.send(proxy.sent)
                    else:
                        proxy.settings = Settings(**change)
                        proxy.free = {"up": 0.0, "down": 0.0}
                        control.send(None)

        threading.Thread(target=listen, daemon=True).start()
        await asyncio.Event().wait()

    asyncio.run(run())
