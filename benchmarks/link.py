"""A link to test with: a TCP proxy in a process of its own, with a rate, a delay, and faults.

    with Link("127.0.0.1", port) as link:     # link.port is where clients connect
        link.set(rate_mbit=1.0, delay_ms=10.0, faults={"stall": 0.2})

`delay_ms` is that of one direction. Faults are drawn per request, and change what comes back:
`stall` (0.2 to 2 s), `silence` (10 s), `garbage`, `half` (of the reply, then the end), `swap` (the
id of another request), `reset`, `refuse` (a new connection). The seed makes them repeatable.

`python -m benchmarks.link` (as root, with iproute2) compares it with the kernel: milliseconds of an
exchange, of so many bytes and a byte back, between network namespaces whose link has `tc tbf`'s
rate, and through the proxy at the same rate. The last line is JSON.
"""

import asyncio
import contextlib
import json
import multiprocessing
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
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


# A server that answers each message, a length and so many bytes, with one byte.
_ECHO = """
import socket, struct
server = socket.create_server(("0.0.0.0", 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while head := connection.recv(4, socket.MSG_WAITALL):
        connection.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)
        connection.sendall(b"!")
"""


def _exchanges(host: str, port: int, size: int, count: int = 15) -> list[float]:
    """Milliseconds of exchanges, one after the other, the first left out."""
    message = size.to_bytes(4, "big") + bytes(size)
    times = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            started = time.perf_counter()
            connection.sendall(message)
            connection.recv(1)
            times.append(1e3 * (time.perf_counter() - started))
    return times[1:]


def _namespaces(rate_mbit: float) -> str:
    """Two connected network namespaces; what ek-a sends is shaped."""
    return f"""
        ip netns add ek-a; ip netns add ek-b
        ip link add ek-va netns ek-a type veth peer name ek-vb netns ek-b
        ip -n ek-a addr add 10.99.0.1/24 dev ek-va; ip -n ek-b addr add 10.99.0.2/24 dev ek-vb
        ip -n ek-a link set ek-va up; ip -n ek-b link set ek-vb up
        ip netns exec ek-a tc qdisc add dev ek-va root tbf rate {rate_mbit}mbit burst 3kb latency 2s
        ip netns exec ek-a ethtool -K ek-va tso off gso off 2>/dev/null || true
    """


def main() -> None:
    if len(sys.argv) > 1:  # in ek-a
        host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        print(json.dumps(_exchanges(host, port, size)))
        return
    rows = []
    for rate in (0.5, 1.0, 10.0, 100.0):
        subprocess.run(["bash", "-ec", _namespaces(rate)], check=True)
        inside = [sys.executable, "-c", _ECHO]
        pipe = subprocess.PIPE
        try:
            with (
                subprocess.Popen(
                    ["ip", "netns", "exec", "ek-b", *inside], stdout=pipe, text=True
                ) as far,
                subprocess.Popen(inside, stdout=pipe, text=True) as near,
            ):
                far_port, near_port = far.stdout.readline(), near.stdout.readline()
                with Link("127.0.0.1", int(near_port)) as link:
                    link.set(rate_mbit=rate)
                    for size in (1_000, 5_000, 20_000):
                        command = ["ip", "netns", "exec", "ek-a", sys.executable, "-m"]
                        command += ["benchmarks.link", "10.99.0.2", far_port.strip(), str(size)]
                        done = subprocess.run(command, stdout=pipe, text=True, check=True)
                        kernel = statistics.median(json.loads(done.stdout))
                        proxy = statistics.median(_exchanges("127.0.0.1", link.port, size))
                        row = {"mbit": rate, "bytes": size, "tbf_ms": kernel, "proxy_ms": proxy}
                        row["nominal_ms"] = 8e-3 * size / rate
                        rows.append({key: round(value, 3) for key, value in row.items()})
                        print(rows[-1], flush=True)
                far.kill()
                near.kill()
        finally:
            subprocess.run(["bash", "-c", "ip netns del ek-a; ip netns del ek-b"], check=False)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
