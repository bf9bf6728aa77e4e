"""The server under load.  python -m benchmarks.serving [--bundle models]

(1) Images a second of `edgeke.serving` at the default point, over those of the plain network behind
the same library and protocol, and accuracy of both, on test images. (2) Load that does not wait for
answers, from another process, at 0.5 to 20 times the capacity found in (1): of what was accepted,
the share that its client had within the deadline, counted from when it should have been sent;
exits, accuracy, refusals. (3) Median milliseconds that one client's request takes beyond
`Classifier.predict`. Loopback, one ONNX Runtime thread. The last line is JSON.

With --ray instead: images a second of 1 and of 2 replicas on Ray Serve, over those of the server
alone, in turn.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.classifier import Classifier
from edgeke.device.session import open_session
from edgeke.serving.protocol import parse_infer, write_infer

PORT = 18_473
PATH = "/v2/models/edgeke/infer"
_MOST_CONNECTIONS = 400


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


async def exchange(streams: Any, request: bytes) -> tuple[int, bytes]:
    """Status and body."""
    reader, writer = streams
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> int:
    """How many answers so many clients, each waiting for its own, got in so many seconds."""
    end, done = time.perf_counter() + seconds, 0

    async def one(number: int) -> None:
        nonlocal done
        streams = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while time.perf_counter() < end:
            status, _ = await exchange(streams, requests[turn % len(requests)])
            turn += clients
            done += status == 200
        streams[1].close()

    await asyncio.gather(*map(one, range(clients)))
    return done


async def open_loop(
    port: int, requests: list[bytes], rate: float, seconds: float
) -> list[tuple[int, float, int, bytes]]:
    """Requests at a steady rate, whatever is answered: status, seconds, which one, body.

    Seconds count from when a request was due. Status 0: there was no connection left to send it.
    """
    free: list[Any] = []
    made = 0
    results: list[tuple[int, float, int, bytes]] = []
    started = time.perf_counter()

    async def one(number: int, due: float) -> None:
        nonlocal made
        which = number % len(requests)
        if free:
            streams = free.pop()
        elif made < _MOST_CONNECTIONS:
            made += 1
            streams = await asyncio.open_connection("127.0.0.1", port)
        else:
            results.append((0, time.perf_counter() - due, which, b""))
            return
        status, body = await exchange(streams, requests[which])
        results.append((status, time.perf_counter() - due, which, body))
        free.append(streams)

    tasks = []
    for number in range(int(rate * seconds)):
        due = started + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        elif number % 20 == 0:
            await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(one(number, due)))
    await asyncio.gather(*tasks)
    for streams in free:
        streams[1].close()
    return results


def elsewhere(coroutine: Any, *arguments: Any) -> Any:
    """What a coroutine returns in another process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (coroutine, arguments))


def _run(coroutine: Any, arguments: tuple[Any, ...]) -> Any:
    return asyncio.run(coroutine(*arguments))


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
    uvicorn.run(Starlette(routes=routes), port=port, http="h11", access_log=False, log_config=None)


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
    results = elsewhere(open_loop, port, requests, rate, seconds)
    statuses = Counter(status for status, *_ in results)
    right, exits, total, within = 0, Counter[int](), 0, 0
    for status, took, which, body in results:
        if status == 200:
            answer = {each["name"]: each["data"] for each in json.loads(body)["outputs"]}
            right += int((np.asarray(answer["label"]) == labels[which]).sum())
            exits.update(answer["exit"])
            total += len(labels[which])
            within += took * 1e3 <= deadline
    accepted = statuses[200]
    return {
        "requests_per_second": rate,
        "accepted": accepted / len(results),
        "refused": statuses[503] / len(results),
        "not_sent": statuses[0] / len(results),
        "within_deadline": within / max(1, accepted),
        "accuracy": right / max(1, total),
        "exits": {str(exit): count / max(1, total) for exit, count in sorted(exits.items())},
    }


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
    parser.add_argument("--ray", action="store_true", help="throughput on Ray Serve")
    parser.add_argument("--static", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.static:
        model, shape, port = json.loads(options.static)
        serve_static(model, shape, port)
        return
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
    ours += ["--port", str(PORT), "--longest", "60"]
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
        }
        result["overload"] = {}
        for times in (0.5, 1, 2, 5, 20):
            rate = times * capacity / options.images
            row = overload(PORT, with_deadline, labels, rate, options.seconds, options.deadline_ms)
            result["overload"][f"{times:g}"] = row
            print(f"{times:g}x", json.dumps(row), flush=True)
        result["within_deadline_at_20x"] = result["overload"]["20"]["within_deadline"]
        result["overhead_ms"] = elsewhere(overhead, str(options.bundle), PORT, images[:50])
    print(json.dumps(result))


async def overhead(bundle: str, port: int, images: np.ndarray) -> float:
    """Median milliseconds of one image over HTTP less those of `Classifier.predict`, in turn."""
    classifier = Classifier(bundle)
    streams = await asyncio.open_connection("127.0.0.1", port)
    direct, served = [], []
    for turn in range(600):
        image = images[turn % len(images)]
        request = request_bytes(image[None], {})
        started = time.perf_counter()
        classifier.predict(image)
        between = time.perf_counter()
        await exchange(streams, request)
        direct.append(between - started)
        served.append(time.perf_counter() - between)
    streams[1].close()
    return 1e3 * (statistics.median(served) - statistics.median(direct))


if __name__ == "__main__":
    main()
