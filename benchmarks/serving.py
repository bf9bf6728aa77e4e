"""The server under load.  python -m benchmarks.serving [--bundle models]

(1) Images a second of `edgeke.serving` at the default point, over those of the plain network behind
the same library and protocol, and accuracy of both, on test images. (2) Load that does not wait for
answers, from another process, at 0.5 to 20 times the capacity found in (1), at random times: of
what was accepted, the share that its client had within the deadline, counted from when it was
sent; goodput (images a second answered in time), refusals, exits, accuracy; how late the client
itself was, and what it could not send. `--longest` of the server is the deadline. (3) Median
milliseconds that one client's request takes beyond `Classifier.predict`. Loopback, one ONNX Runtime
thread. The last line is JSON.

With --ray instead: images a second of 1 and of 2 replicas on Ray Serve, over those of the server
alone, in turn.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.classifier import Classifier
from edgeke.device.session import open_session
from edgeke.serving.front import UVICORN
from edgeke.serving.protocol import parse_infer, write_infer

PORT = 18_473
PATH = "/v2/models/edgeke/infer"
_CONNECTIONS = 400
_LOADS = (0.5, 1, 2, 5, 20)  # times the capacity


def request_bytes(images: np.ndarray, parameters: dict[str, Any]) -> bytes:
    """One whole HTTP request with a binary tensor; probabilities are not asked for."""
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": list(images.shape),
        "parameters": {"binary_data_size": images.size},
    }
    outputs = [{"name": "label"}, {"name": "exit"}]
    content = {"inputs": [tensor], "outputs": outputs, "parameters": parameters}
    head = json.dumps(content).encode()
    lines = [
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(head) + images.size}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + head + images.tobytes()


class Connection(asyncio.Protocol):
    """One client: sends a request, and hands its answer to `done`."""

    def __init__(self, done: Callable[["Connection", "Answer"], None]) -> None:
        self._done = done

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self, requests: list[bytes], number: int, due: float) -> None:
        self._which, self._due, self._answer, self._length = number % len(requests), due, b"", 0
        self._sent = time.perf_counter()
        self.transport.write(requests[self._which])

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self._length and (end := self._answer.find(b"\r\n\r\n")) > 0:
            length = self._answer[:end].lower().partition(b"content-length: ")[2]
            self._body = end + 4
            self._length = self._body + int(length.split(b"\r", 1)[0])
        if self._length and len(self._answer) >= self._length:
            now, status = time.perf_counter(), int(self._answer[9:12])
            late, took, body = self._sent - self._due, now - self._sent, self._answer[self._body :]
            self._done(self, Answer(status, late, took, self._which, body))


class Answer(NamedTuple):
    """`late`: seconds after it was due that a request was sent; `took`: from then to its answer."""

    status: int
    late: float
    took: float
    which: int
    body: bytes


async def connect(port: int, count: int, done: Any) -> list[Connection]:
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(done), "127.0.0.1", port)
        for _ in range(count)
    ]
    gc.collect()
    gc.disable()
    return [connection for _, connection in made]


async def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> int:
    """How many answers so many clients, each waiting for its own, got in so many seconds."""
    count = answered = 0

    def done(connection: Connection, answer: Answer) -> None:
        nonlocal count, answered
        count, answered = count + 1, answered + (answer.status == 200)
        connection.ask(requests, count + clients, 0.0)

    for number, connection in enumerate(await connect(port, clients, done)):
        connection.ask(requests, number, 0.0)
    await asyncio.sleep(seconds)
    return answered


async def open_loop(
    port: int, requests: list[bytes], rate: float, seconds: float
) -> tuple[int, int, list[Answer]]:
    """Requests that come at random times, whatever is answered: how many were due, sent; answers.

    What is due while all connections wait for an answer is not sent.
    """
    answers: list[Answer] = []

    def done(connection: Connection, answer: Answer) -> None:
        answers.append(answer)
        free.append(connection)

    free = await connect(port, _CONNECTIONS, done)
    draw, started, number, sent = random.Random(0), time.perf_counter(), 0, 0
    due = started + draw.expovariate(rate)
    while due < started + seconds:
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        elif number % 16 == 0:
            await asyncio.sleep(0)  # to read what has come
        if free:
            free.pop().ask(requests, number, due)
            sent += 1
        due, number = due + draw.expovariate(rate), number + 1
    end = time.perf_counter() + 10
    while len(free) < _CONNECTIONS and time.perf_counter() < end:
        await asyncio.sleep(0.01)
    return number, sent, answers


def elsewhere(function: Any, *arguments: Any) -> Any:
    """What a function, or a coroutine, returns in another process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(_run, (function, arguments))
        pool.close()
        pool.join()
    return result


def _run(function: Any, arguments: tuple[Any, ...]) -> Any:
    result = function(*arguments)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def serve_static(model: str, shape: list[int], port: int) -> None:
    """The plain network behind Starlette and uvicorn, same protocol, one request after another."""
    session = open_session(Path(model), 1)
    turn = asyncio.Lock()

    async def infer(request: Request) -> Response:
        body = await request.body()
        length = int(request.headers["inference-header-content-length"])
        asked = parse_infer(body, length, (shape[0], shape[1], shape[2]), 4096)
        async with turn:
            logits = (await asyncio.to_thread(session.run, None, {"image": asked.images}))[0]
        values = {"label": logits.argmax(-1), "exit": np.zeros(len(logits), np.int64)}
        content, headers = write_infer(asked, "edgeke", "1", values, {})
        return Response(content, headers=headers)

    async def ready(_: Request) -> Response:
        return Response(b"")

    routes = [Route(PATH, infer, methods=["POST"]), Route("/v2/health/ready", ready)]
    uvicorn.run(Starlette(routes=routes), port=port, **UVICORN)


class Running:
    """A server process, ready to answer."""

    def __init__(self, command: list[str], port: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        self.port = port
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready").close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)} did not become ready") from None
                time.sleep(0.1)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def overload(
    port: int,
    requests: list[bytes],
    labels: list[np.ndarray],
    rate: float,
    seconds: float,
    deadline: float,
) -> dict[str, Any]:
    """One row: what became of requests at a rate."""
    number, sent, answers = elsewhere(open_loop, port, requests, rate, seconds)
    statuses = Counter(each.status for each in answers)
    right, exits, total, within = 0, Counter[int](), 0, 0
    for each in answers:
        if each.status == 200:
            said = {out["name"]: out["data"] for out in json.loads(each.body)["outputs"]}
            right += int((np.asarray(said["label"]) == labels[each.which]).sum())
            exits.update(said["exit"])
            total += len(labels[each.which])
            within += each.took * 1e3 <= deadline
    refusals = [each.took for each in answers if each.status == 503]
    accepted = [each.took for each in answers if each.status == 200]
    return {
        "requests_per_second": rate,
        "not_sent": 1 - sent / number,
        "lost": sent - len(answers),
        "sent_late_ms": percentiles([each.late for each in answers]),
        "accepted": statuses[200] / len(answers),
        "refused": statuses[503] / len(answers),
        "other": {str(k): n for k, n in statuses.items() if k not in (200, 503)},
        "within_deadline": within / max(1, statuses[200]),
        "answer_ms": percentiles(accepted),
        "refusal_ms": percentiles(refusals),
        "goodput_images_per_second": within * len(labels[0]) / seconds,
        "accuracy": right / max(1, total),
        "exits": {str(exit): count / max(1, total) for exit, count in sorted(exits.items())},
    }


def percentiles(seconds: list[float]) -> list[float]:
    """Median and 99th percentile, in milliseconds."""
    return [round(1e3 * float(each), 2) for each in np.percentile(seconds or [0.0], [50, 99])]


def busy() -> np.ndarray:
    """Seconds: now, of all processors' work, and of ours and of our children that have ended."""
    times = psutil.cpu_times()
    return np.array([time.monotonic(), sum(times) - times.idle - times.iowait, sum(os.times()[:4])])


def draw(result: dict[str, Any], file: Path) -> None:
    """Promises, goodput and exits over the load."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "edgeke"
    from matplotlib import pyplot

    loads, rows = [*result["overload"]], [*result["overload"].values()]
    figure, (kept, speed, exits) = pyplot.subplots(1, 3, figsize=(12, 3.2))
    kept.plot(loads, [100 * row["within_deadline"] for row in rows], "o-", label="in time")
    kept.plot(loads, [100 * row["refused"] for row in rows], "s:", color="grey", label="refused")
    kept.set_ylim(0, 103)
    kept.legend(fontsize=7)
    kept.set_title(f"% of accepted within {result['deadline_ms']:g} ms; of all refused")
    speed.plot(loads, [row["goodput_images_per_second"] for row in rows], "o-")
    speed.axhline(result["images_per_second"], color="grey", linewidth=1, linestyle="--")
    speed.set_ylim(0)
    speed.set_title("images/s in time (dashed: capacity)")
    below = np.zeros(len(rows))
    for exit in sorted({exit for row in rows for exit in row["exits"]}):
        shares = np.array([100 * row["exits"].get(exit, 0.0) for row in rows])
        exits.bar(loads, shares, bottom=below, label=f"exit {exit}")
        below += shares
    exits.legend(fontsize=7)
    exits.set_title("% of answers by exit")
    for plot in (kept, speed, exits):
        plot.set_xlabel("load, times the capacity")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def on_ray(
    ours: list[str], bundle: Path, requests: list[bytes], seconds: float
) -> dict[str, list[float]]:
    """Of 1 and 2 replicas: the median, least and most of three ratios to the server alone."""
    result = {}
    for replicas in (1, 2):
        command = [sys.executable, "-m", "edgeke.serving.on_ray", str(bundle)]
        command += ["--port", str(PORT + 1), "--replicas", str(replicas)]
        with Running(ours, PORT), Running(command, PORT + 1):
            ratios = []
            for _ in range(3):  # interleaved
                alone, ray = (
                    elsewhere(closed_loop, port, requests, 8, seconds) for port in (PORT, PORT + 1)
                )
                ratios.append(ray / alone)
        result[f"{replicas}_over_alone"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data/dataset.safetensors"))
    parser.add_argument("--images", type=int, default=16, help="in each request")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--deadline-ms", type=float, default=100.0)
    parser.add_argument("--loads", type=float, nargs="+", default=_LOADS, help="times the capacity")
    parser.add_argument("--draw", type=Path, metavar="SVG", help="a picture of the loads")
    parser.add_argument("--ray", action="store_true", help="throughput on Ray Serve")
    parser.add_argument("--static", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.static:
        model, shape, port = json.loads(options.static)
        serve_static(model, shape, port)
        return
    before = busy()
    classifier = Classifier(options.bundle)
    suffix = ".int8" if classifier.bundle.precision == "int8" else ""
    plain = options.bundle / "static" / f"plain{suffix}.onnx"
    split = load_dataset(options.data, ("test",))["test"]
    images = channels_last(split.images)
    starts = range(0, len(images) - options.images + 1, options.images)
    parts = [slice(start, start + options.images) for start in starts]
    labels = [split.labels[part] for part in parts]
    requests = [request_bytes(images[part], {}) for part in parts]
    with_deadline = [
        request_bytes(images[part], {"deadline_ms": options.deadline_ms}) for part in parts
    ]
    static = json.dumps([str(plain), list(images.shape[1:]), PORT + 1])
    ours = [sys.executable, "-m", "edgeke.serving", str(options.bundle), "--log-level", "error"]
    ours += ["--port", str(PORT), "--longest", str(options.deadline_ms / 1e3)]
    if options.ray:
        print(json.dumps(on_ray(ours, options.bundle, requests, options.seconds / 2)))
        return
    theirs = [sys.executable, "-m", "benchmarks.serving", "--static", static]
    result: dict[str, Any] = {"bundle": str(plain), "images_per_request": options.images}
    with Running(ours, PORT), Running(theirs, PORT + 1):
        rates: dict[int, list[float]] = {PORT: [], PORT + 1: []}
        for _ in range(3):  # interleaved
            for port, found in rates.items():
                count = elsewhere(closed_loop, port, requests, 8, options.seconds / 2)
                found.append(count * options.images / (options.seconds / 2))
        capacity, plainly = (statistics.median(found) for found in rates.values())
        session = open_session(plain, 1)
        answers = session.run(None, {"image": images})[0].argmax(-1)
        result |= {
            "images_per_second": capacity,
            "static_images_per_second": plainly,
            "throughput_over_static": capacity / plainly,
            "static_accuracy": float((answers == split.labels).mean()),
            "deadline_ms": options.deadline_ms,
        }
        result["overload"] = {}
        for times in options.loads:
            rate = times * capacity / options.images
            row = overload(PORT, with_deadline, labels, rate, options.seconds, options.deadline_ms)
            result["overload"][f"{times:g}"] = row
            print(f"{times:g}x", json.dumps(row), flush=True)
        result["within_deadline_at_20x"] = result["overload"].get("20", row)["within_deadline"]
        result["overhead_ms"] = elsewhere(overhead, str(options.bundle), PORT, images[:50])
    wall, everything, ours_took = busy() - before
    result["cores_taken_by_others"] = (everything - ours_took) / wall
    if options.draw is not None:
        draw(result, options.draw)
    print(json.dumps(result))


def overhead(bundle: str, port: int, images: np.ndarray) -> float:
    """Median milliseconds of one image over HTTP less those of `Classifier.predict`, in turn."""
    classifier = Classifier(bundle)
    direct, served = [], []
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(600):
            image = images[turn % len(images)]
            request = request_bytes(image[None], {})
            started = time.perf_counter()
            classifier.predict(image)
            between = time.perf_counter()
            client.sendall(request)
            answer = client.recv(65536)
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            direct.append(between - started)
            served.append(time.perf_counter() - between)
    return 1e3 * (statistics.median(served) - statistics.median(direct))


if __name__ == "__main__":
    main()
