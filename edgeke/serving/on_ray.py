"""The same application on Ray Serve: python -m edgeke.serving.on_ray models --replicas 1-4

A front takes requests and hands each to a replica of the server. It keeps them until they are
answered: what a replica had accepted when it died goes to another one. docs/serving.md has more.
"""

import argparse
import asyncio
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgeke.errors import InputError, report
from edgeke.serving.__main__ import read_token
from edgeke.serving.application import Server, Settings
from edgeke.serving.front import CAME

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
except ImportError as error:
    raise ImportError("Ray is missing: pip install -r requirements-ray.txt") from error

# More than our own admission ever lets wait, so that Ray's queue never decides.
_ONGOING = 10_000
# Autoscaling adds replicas where more than so many requests are in work at each.
_TARGET = 4
_TRIES = 5
# What the application reads of an ASGI scope; the rest cannot be sent to another process.
_SCOPE = ("type", "http_version", "method", "path", "query_string", "headers", "scheme")

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body


class Replica:
    """The server, in a process of its own."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self._application = Server(settings).application
        self._lifespan = self._application.router.lifespan_context(self._application)
        await self._lifespan.__aenter__()

    async def ask(self, scope: dict[str, Any], body: bytes) -> Answer:
        """What the application answers to one request."""
        messages: list[Any] = []
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if request:
                return request.pop()
            await asyncio.Event().wait()  # files are sent while somebody waits for a disconnect
            raise AssertionError("nobody sets the event")

        async def send(message: Any) -> None:
            messages.append(message)

        await self._application(scope, receive, send)
        start, *rest = messages
        return start["status"], start["headers"], b"".join(m.get("body", b"") for m in rest)


class Front:
    """Takes requests from HTTP, and asks another replica when one dies over them."""

    def __init__(self, replicas: Any, settings: Settings) -> None:
        self._replicas, self._limit = replicas, settings.body_limit

    async def __call__(self, request: Request) -> Response:
        """The answer of some replica."""
        scope = {name: request.scope[name] for name in _SCOPE} | {CAME: time.time()}
        body = bytearray()
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > self._limit:
                return JSONResponse({"error": f"the body is over {self._limit} bytes"}, 413)
        for _ in range(_TRIES):
            try:
                status, headers, content = await self._replicas.ask.remote(scope, bytes(body))
            except RayActorError:  # to answer changes nothing, so it may be done twice
                continue
            response = Response(content, status)
            response.raw_headers = list(headers)
            return response
        return JSONResponse({"error": "replicas end; ask again"}, 503, {"retry-after": "1"})


def application(settings: Settings, least: int, most: int) -> serve.Application:
    """What `serve.run` takes: from `least` to `most` replicas, as load demands."""
    # Links and the working directory of a replica may differ.
    settings = replace(settings, bundle=settings.bundle.resolve())
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": _TARGET}
        scaling = {"autoscaling_config": limits}
    scaling["max_ongoing_requests"] = _ONGOING
    deployment: Any = serve.deployment
    replica = deployment(Replica, ray_actor_options={"num_cpus": settings.threads}, **scaling)
    front = deployment(Front, ray_actor_options={"num_cpus": 0}, **scaling)
    made: serve.Application = front.bind(replica.bind(settings), settings)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it, in the cluster of RAY_ADDRESS or one started here."""
    parser = argparse.ArgumentParser(prog="edgeke.serving.on_ray", description=main.__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle folder, at the same place everywhere")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", default="1", help="a number, or the least and most: 1-4")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, in each replica")
    parser.add_argument("--token-file", type=Path, help="clients must send what is in it")
    options = parser.parse_args(arguments)
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", options.replicas)
    least, most = (int(n) for n in numbers.groups(numbers[1])) if numbers else (0, 0)
    try:
        if not 1 <= least <= most:
            raise InputError(f"--replicas {options.replicas} must be like 2, or 1-4")
        token = read_token(options.token_file)
        settings = Settings(options.bundle, threads=options.threads, token=token)
        Server(settings).check()
    except InputError as error:
        return report(error)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = os.environ.get("RAY_ADDRESS")
    dashboard = None if cluster else False
    ray.init(cluster or "local", logging_level=logging.WARNING, include_dashboard=dashboard)
    serve.start(http_options={"host": options.host, "port": options.port})
    ended = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: ended.set())
    serve.run(application(settings, least, most), name="edgeke")
    ended.wait()
    serve.shutdown()  # type: ignore[no-untyped-call]  # answers what was accepted
    return 0


if __name__ == "__main__":
    # By its own name: what `python -m` runs is called __main__, which a replica does not have.
    from edgeke.serving import on_ray

    sys.exit(on_ray.main())
