"""The HTTP application: routes, checks, and what is said to clients."""

import asyncio
import contextlib
import gzip
import hmac
import io
import json
import logging
import math
import signal
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from edgeke.device.choice import UnmetError
from edgeke.device.classifier import Classifier
from edgeke.device.decode import fit_picture, open_picture
from edgeke.errors import InputError
from edgeke.serving import page, partitions
from edgeke.serving.batches import Answers, Batches, BusyError
from edgeke.serving.front import arrived
from edgeke.serving.keep import Keeper, no_exit_was_sure
from edgeke.serving.metrics import Metrics
from edgeke.serving.protocol import (
    INPUT,
    REQUIREMENTS,
    check_requirements,
    parse_infer,
    write_infer,
)

MODEL = "edgeke"
VERSION = "1"
_LOG = logging.getLogger("edgeke.serving")
_MOST_PROBABLE = 5  # classes whose probability /classify gives
_CHALLENGE = {"www-authenticate": "Bearer"}
_FREE = ("/v2/health/live", "/v2/health/ready")  # no token: load balancers have none


@dataclass(frozen=True)
class Settings:
    """How a bundle is served.

    `body_limit` in bytes; `body_seconds`: a client must have sent its body by then; `batch`: most
    images of one batch; `longest`: seconds that an answer may take before requests are refused.
    `shift_state`: the file of `Classifier.shift`; `keep_unsure`: a folder for images that no exit
    was sure of and for those after an alarm, of at most `keep_limit` bytes.
    """

    bundle: Path
    precision: str | None = None
    threads: int = 1
    token: str | None = None
    body_limit: int = 32 * 2**20
    body_seconds: float = 10.0
    batch: int = 32
    longest: float = 1.0
    shift_state: Path | None = None
    keep_unsure: Path | None = None
    keep_limit: int = 500 * 10**6


@dataclass
class Server:
    """One bundle behind HTTP; `application` is for any ASGI server."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    batches: Batches | None = None
    keeper: Keeper | None = None
    _alarm: bool = False

    def __post_init__(self) -> None:
        folder, limit = self.settings.keep_unsure, self.settings.keep_limit
        if folder is not None:
            self.keeper = Keeper(folder, limit, lambda what: self.metrics.kept.labels(what).inc())

    @property
    def application(self) -> Starlette:
        """The ASGI application."""
        model, routes = f"/v2/models/{MODEL}", list[Route]()
        for prefix in (model, f"{model}/versions/{VERSION}"):
            routes += [
                Route(f"{prefix}/infer", self._infer, methods=["POST"]),  # what comes most: first
                Route(prefix, self._model_metadata),
                Route(f"{prefix}/ready", self._ready),
                *partitions.routes(self, prefix),
            ]
        routes += [
            Route("/classify", self._classify, methods=["POST"]),
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/page/model.json", self._page_model),
            Route("/page/model.onnx", self._page_file),
            Route("/page/samples/{name}", self._page_sample),
        ]
        for route in routes:
            route.app = self._guarded(route)
        return Starlette(
            routes=[*routes, *page.routes()],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: self._http_error},  # type: ignore[dict-item]
        )

    def check(self) -> Classifier:
        """The bundle, opened. Errors: InputError when it cannot be served."""
        made = self.settings
        classifier = Classifier(made.bundle, made.precision, made.threads)
        if classifier.open_segments() is None:
            raise InputError(
                f"there are no segments beside {classifier.bundle.model}; serve the bundle folder, "
                "with segments/ in it"
            )
        if made.shift_state is not None and classifier.shift is None:
            raise InputError(
                f"{classifier.bundle.model} has no histogram, so nothing can watch for shift; run "
                "the stage calibrate again, or leave --shift-state out"
            )
        return classifier

    def watch(self, classifier: Classifier) -> None:
        """Keep the state of shift in its file. Errors: InputError when that cannot be."""
        if self.settings.shift_state is not None:
            classifier.keep_shift(self.settings.shift_state)

    def _open(self) -> Batches:
        made, classifier = self.settings, self.check()
        return Batches(classifier, made.batch, made.longest)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.batches = await asyncio.to_thread(self._open)
        self.watch(self.batches.classifier)
        self.batches.start()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(self.reload()))
        _LOG.info("ready", extra={"fields": {"bundle": str(self.settings.bundle)}})
        yield
        await self.batches.close()
        self.batches.classifier.close()
        if self.keeper is not None:
            await asyncio.to_thread(self.keeper.close)

    async def reload(self) -> bool:
        """Serve what is in the folder now; what was accepted is answered by the old model.

        A folder that cannot be served changes nothing: the log says why, and False is returned.
        """
        try:
            fresh = await asyncio.to_thread(self._open)
        except InputError as error:
            _LOG.error("the old model stays", extra={"fields": {"error": str(error)}})
            return False
        old, self.batches = self.batches, fresh
        if old is not None:
            try:
                fresh.classifier.take_over_shift(old.classifier)
            except InputError as error:
                fields = {"error": str(error)}
                _LOG.error("the state of shift is kept in memory alone", extra={"fields": fields})
        fresh.start()
        if old is not None:
            await old.close()
        _LOG.info("reloaded", extra={"fields": {"bundle": str(self.settings.bundle)}})
        return True

    @property
    def open_batches(self) -> Batches:
        """The queue. Errors: HTTPException while the model is being loaded."""
        if self.batches is None:
            raise HTTPException(503, "the model is being loaded", {"retry-after": "1"})
        return self.batches

    def _guarded(self, route: Route) -> Callable[..., Awaitable[None]]:
        """A route's application that checks the token, turns errors into sentences, and counts."""
        endpoint: Callable[[Request], Awaitable[Response]] = route.endpoint

        async def run(scope: Any, receive: Any, send: Any) -> None:
            request, started = Request(scope, receive), time.perf_counter()
            response = await self._answered(endpoint, request)
            status = str(response.status_code)
            self.metrics.requests.labels(status).inc()
            if _LOG.isEnabledFor(logging.INFO) and request.scope["path"] not in _FREE:
                fields = {
                    "method": request.method,
                    "path": request.scope["path"],
                    "status": response.status_code,
                    "milliseconds": round((time.perf_counter() - started) * 1e3, 3),
                }
                _LOG.info("request", extra={"fields": fields})
            await response(scope, receive, send)

        return run

    async def _answered(
        self, endpoint: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        if request.scope["path"] not in _FREE and not self._admitted(request):
            return _refusal(401, "send the header Authorization: Bearer <token>", _CHALLENGE)
        try:
            return await endpoint(request)
        except BusyError as error:
            self.metrics.refused.labels("busy").inc()
            return _refusal(503, str(error), {"retry-after": str(max(1, math.ceil(error.seconds)))})
        except UnmetError as error:
            self.metrics.refused.labels("unmet").inc()
            return JSONResponse({"error": str(error), "nearest": error.nearest}, 422)
        except InputError as error:
            self.metrics.refused.labels("bad").inc()
            return _refusal(400, str(error))
        except HTTPException as error:
            return _refusal(error.status_code, error.detail)
        except ClientDisconnect:
            return _refusal(400, "the client left before its body had arrived")
        except Exception:
            _LOG.exception("failed")
            return _refusal(500, "this is a fault of the server; its log says more")

    def _admitted(self, request: Request) -> bool:
        token = self.settings.token
        given = request.headers.get("authorization", "")
        expected = f"Bearer {token}"
        return token is None or hmac.compare_digest(given.encode(), expected.encode())

    async def _http_error(self, _: Request, error: HTTPException) -> Response:
        self.metrics.requests.labels(str(error.status_code)).inc()
        known = "there is /, /v2, /v2/models/edgeke, /v2/models/edgeke/infer, /classify, /metrics"
        return _refusal(error.status_code, known if error.status_code == 404 else error.detail)

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _: Request) -> Response:
        ready = self.batches is not None
        return JSONResponse({"name": MODEL, "ready": ready}, 200 if ready else 503)

    async def _server_metadata(self, _: Request) -> Response:
        return JSONResponse(
            {"name": MODEL, "version": VERSION, "extensions": ["binary_tensor_data"]}
        )

    async def _model_metadata(self, _: Request) -> Response:
        classifier = self.open_batches.classifier
        height, width, channels = classifier.image_shape
        classes = len(classifier.classes)
        outputs = {
            "label": ("INT64", [-1]),
            "class_name": ("BYTES", [-1]),
            "probabilities": ("FP32", [-1, classes]),
            "exit": ("INT64", [-1]),
        }
        return JSONResponse(
            {
                "name": MODEL,
                "versions": [VERSION],
                "platform": "edgeke_onnx",
                "inputs": [
                    {"name": INPUT, "datatype": "UINT8", "shape": [-1, height, width, channels]}
                ],
                "outputs": [
                    {"name": name, "datatype": kind, "shape": shape}
                    for name, (kind, shape) in outputs.items()
                ],
                "parameters": {
                    "classes": list(classifier.classes),
                    "requirements": list(REQUIREMENTS),
                    "points": list(classifier.policy.named),
                },
            }
        )

    async def _metrics(self, _: Request) -> Response:
        batches = self.open_batches
        self.metrics.waiting.set(batches.images)
        self.metrics.backlog.set(batches.backlog)
        if (shift := batches.classifier.shift) is not None:
            self.metrics.shift_evidence.set(shift.evidence)
            self.metrics.shift_alarm.set(shift.alarm)
            self.metrics.shift_images.set(shift.images)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _infer(self, request: Request) -> Response:
        came = arrived(request.scope)
        head = _length(request, "inference-header-content-length")
        size = max(1, math.prod(self.open_batches.classifier.image_shape))
        images = 1 if head is None else ((_length(request, "content-length") or 0) - head) // size
        self.open_batches.check_load(came, max(1, images))
        body = await self.body(request)
        batches = self.open_batches  # the model may have been replaced meanwhile
        classifier = batches.classifier
        most = max(1, self.settings.body_limit // size)
        asked = parse_infer(body, head, classifier.image_shape, most)
        answers = await batches.answer(asked.images, asked.requirements, came)
        self.count(answers)
        self._keep(asked.images, answers, classifier)
        labels = np.where(answers.unsure, -1, answers.probabilities.argmax(-1))
        names = np.asarray([*classifier.classes, "unsure"], object)  # -1 is the last
        values = {
            "label": labels,
            "class_name": names[labels],
            "probabilities": answers.probabilities,
            "exit": answers.exit,
        }
        content, headers = write_infer(asked, MODEL, VERSION, values, _said(answers))
        return Response(content, headers=headers)

    async def _classify(self, request: Request) -> Response:
        came = arrived(request.scope)
        self.open_batches.check_load(came)
        query = dict(request.query_params)
        name = query.pop("point", None)
        requirements = check_requirements(query)
        body = await self.body(request)
        batches = self.open_batches
        classifier = batches.classifier
        pixels = await asyncio.to_thread(_decode, body, classifier)
        answers = await batches.answer(pixels[None], requirements, came, name)
        if name is None:  # what the page compares with does not count as an exit taken
            self.count(answers)
            self._keep(pixels[None], answers, classifier)
        return JSONResponse(_answer(answers, 0, classifier))

    def _keep(self, images: NDArray[np.uint8], answers: Answers, classifier: Classifier) -> None:
        """Hand the images that are to be labelled to the keeper."""
        if self.keeper is None:
            return
        for number, exit in enumerate(answers.exit.tolist()):
            if no_exit_was_sure(answers.point, exit) or not answers.holds:
                said = partial(_kept, time.time(), answers, number, classifier)
                self.keeper.offer(images[number], said)

    async def _page_model(self, _: Request) -> Response:
        samples = page.list_samples(self.settings.bundle)
        return JSONResponse(page.describe(self.open_batches.classifier, samples))

    async def _page_file(self, _: Request) -> Response:
        return FileResponse(self.open_batches.classifier.bundle.model)

    async def _page_sample(self, request: Request) -> Response:
        for file in page.list_samples(self.settings.bundle):
            if file.name == request.path_params["name"]:
                return FileResponse(file)
        raise HTTPException(404, "there is no such sample")

    def count(self, answers: Answers) -> None:
        """Count a request that was answered, and say when promises are void."""
        if self._alarm and answers.holds:
            self._alarm = False  # a model of another policy has taken over
        elif not self._alarm and not answers.holds:
            self._alarm = True
            _LOG.error("alarm of shift: images do not come as in calibration; promises are void")
        self.metrics.latency.observe(answers.seconds)
        self.metrics.late.inc(answers.late)
        for exit, count in zip(*np.unique(answers.exit, return_counts=True), strict=True):
            self.metrics.exits.labels(str(exit)).inc(int(count))

    async def body(self, request: Request) -> bytes:
        """The body, unpacked; refused when it is too large or comes too slowly."""
        limit = self.settings.body_limit
        sentence = f"the body is larger than {limit} bytes"
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > limit:
            raise HTTPException(413, sentence)
        body = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > limit:
                    raise HTTPException(413, sentence)

        try:
            async with asyncio.timeout(self.settings.body_seconds):
                await read()
        except TimeoutError:
            raise HTTPException(
                408, f"the body took over {self.settings.body_seconds:g} s"
            ) from None
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding == "identity":
            return bytes(body)
        if encoding not in ("gzip", "deflate"):
            raise HTTPException(415, "use Content-Encoding gzip or deflate, or none")
        return await asyncio.to_thread(_unpack, bytes(body), encoding, limit)


def _length(request: Request, name: str) -> int | None:
    """A number of bytes in the head of a request. Errors: InputError."""
    text = request.headers.get(name)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    raise InputError(f"{name.title()} = {text:.40} is no number of bytes")


def _said(answers: Answers) -> dict[str, Any]:
    """The parameters of a response: point, promises, time."""
    promised = {
        f"promised_{name}": round(v, 6)
        for name, v in answers.promised.items()
        if name != "delta" and answers.holds
    }
    return {
        "point": answers.point.name,
        "promised": answers.holds,
        **promised,
        "delta": answers.promised["delta"],
        "milliseconds": round(answers.seconds * 1e3, 3),
        "late": answers.late,
    }


def _answer(answers: Answers, number: int, classifier: Classifier) -> dict[str, Any]:
    """What is said about one image of a request."""
    probabilities = answers.probabilities[number]
    label, unsure = int(probabilities.argmax()), bool(answers.unsure[number])
    return {
        "class": "unsure" if unsure else classifier.classes[label],
        "label": -1 if unsure else label,
        "probability": round(float(probabilities[label]), 6),
        "probabilities": {
            classifier.classes[k]: round(float(probabilities[k]), 6)
            for k in np.argsort(-probabilities, kind="stable")[:_MOST_PROBABLE]
        },
        "exit": int(answers.exit[number]),
        **_said(answers),
    }


def _kept(now: float, answers: Answers, number: int, classifier: Classifier) -> dict[str, Any]:
    """What lies beside a kept image."""
    said = {"time": now, **_answer(answers, number, classifier)}
    return said | {"probabilities": answers.probabilities[number].tolist()}


class _Picture(io.BytesIO):
    """A body that error messages call by its name."""

    def __str__(self) -> str:
        return "the picture"


def _decode(body: bytes, classifier: Classifier) -> Any:
    shape = classifier.image_shape
    picture = open_picture(_Picture(body), shape, classifier.fit)  # type: ignore[arg-type]
    return fit_picture(picture, shape, classifier.bits, "the picture", classifier.fit)


def _unpack(body: bytes, encoding: str, limit: int) -> bytes:
    try:
        if encoding == "gzip":
            with gzip.open(io.BytesIO(body)) as file:
                unpacked = file.read(limit + 1)
        else:
            unpacked = zlib.decompressobj().decompress(body, limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the body is not {encoding} ({error})") from None
    if len(unpacked) > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes")
    return unpacked


def _refusal(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


class JsonLines(logging.Formatter):
    """A log line as JSON: time, level, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": record.created, "level": record.levelname, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
