"""The tail of a partition: packed features in, probabilities of the last exit out.

`infer` on `edgeke/after/<k>` takes one tensor `features`, UINT8 `[bytes]` (a message of
`edgeke.device.codec`, or a PNG after `raw`), and gives `probabilities`. The server needs no points:
the device decides. What is sent to `edgeke/after` itself is thrown away, and the answer says which
segments are served and how long they take: devices measure their link with it.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgeke.device.codec import RAW, decode, decode_picture
from edgeke.device.policy import force_exit
from edgeke.errors import InputError
from edgeke.serving.batches import Answers, Batches, BusyError
from edgeke.serving.front import arrived
from edgeke.serving.protocol import InferRequest, parse_json, write_infer

if TYPE_CHECKING:
    from edgeke.serving.application import Server

INPUT = "features"
_MOST = 64  # images of one message
_PARAMETERS = {"deadline_ms"}


def routes(server: "Server", prefix: str) -> list[Route]:
    """The routes below `prefix`, such as `/v2/models/edgeke`."""

    async def about(request: Request) -> Response:
        await server.body(request)
        batches = server.open_batches
        return JSONResponse({**_segments(batches), "milliseconds": _milliseconds(batches)})

    async def infer(request: Request) -> Response:
        came = arrived(request.scope)
        server.open_batches.check_load(came)
        body = await server.body(request)
        batches = server.open_batches
        after = _after(request.path_params["after"], batches)
        name, message, deadline = _parse(body, request.headers)
        features = _features(message, after, batches)
        answers = await finish(batches, after, features, came, deadline)
        server.count(answers)
        asked = InferRequest(name, features, {}, {"probabilities": True})
        said = {**_segments(batches), "milliseconds": round(answers.seconds * 1e3, 3)}
        model = f"edgeke/after/{request.path_params['after']}"
        values = {"probabilities": answers.probabilities}
        content, headers = write_infer(asked, model, "1", values, said)
        return Response(content, headers=headers)

    return [
        Route(f"{prefix}/after", about, methods=["GET", "POST"]),
        Route(f"{prefix}/after/{{after}}/infer", infer, methods=["POST"]),
    ]


async def finish(
    batches: Batches, after: int, features: NDArray[Any], came: float, deadline_ms: float
) -> Answers:
    """The last exit's answers to features after an exit (-1: to images).

    Errors: BusyError when the work that waits leaves no time for it.
    """
    exits = len(batches.policy.macs)
    work = batches.costs.between(after + 1, exits - 1, len(features))
    if batches.at_worst(came, work) * 1e3 > deadline_ms:
        waits = batches.backlog
        raise BusyError(f"{waits:.3f} seconds of work wait; ask again later", waits)
    batches.check_load(came)
    point = dataclasses.replace(
        batches.policy.points[0],
        thresholds=force_exit(exits - 1, exits),
        reached=(batches.policy.samples,) * exits,
        bias=(),
        unsure=False,
    )
    return await batches.enqueue(features, point, {}, came, deadline_ms / 1e3, after + 1)


def _segments(batches: Batches) -> dict[str, Any]:
    return {"segments": batches.classifier.segments_sha256}


def _milliseconds(batches: Batches) -> dict[str, float]:
    """How long one image takes now, by where it comes from."""
    first = [*batches.costs.first]
    waits = batches.backlog
    rest = {str(k): sum(first[k + 1 :]) for k in range(-1, len(first) - 1)}
    return {RAW if k == "-1" else k: round(1e3 * (waits + s), 3) for k, s in rest.items()}


def _after(text: str, batches: Batches) -> int:
    last = len(batches.policy.macs) - 2
    if text == RAW:
        return -1
    if text.isascii() and text.isdigit() and len(text) < 5 and int(text) <= last:
        return int(text)
    raise HTTPException(404, f"there is edgeke/after/raw, and /0 to /{last}")


def _parse(body: bytes, headers: Any) -> tuple[str | None, memoryview, float]:
    """Id, message and deadline. Errors: InputError saying what is wrong."""
    length = headers.get("inference-header-content-length", "")
    if not (length.isascii() and length.isdigit()) or not 0 < int(length) <= len(body):
        raise InputError("Inference-Header-Content-Length must be the bytes of JSON in the body")
    content, message = parse_json(body[: int(length)]), memoryview(body)[int(length) :]
    name, inputs = content.get("id"), content.get("inputs")
    if name is not None and not isinstance(name, str):
        raise InputError(f"id = {name!r:.40} must be text")
    tensor = {
        "name": INPUT,
        "datatype": "UINT8",
        "shape": [len(message)],
        "parameters": {"binary_data_size": len(message)},
    }
    if inputs != [tensor]:
        raise InputError(f"inputs must be the tensor {tensor}, and nothing else")
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict) or set(parameters) - _PARAMETERS:
        raise InputError(f"parameters may be {', '.join(_PARAMETERS)}")
    deadline = parameters.get("deadline_ms", math.inf)
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not deadline > 0:
        raise InputError(f"deadline_ms = {deadline!r:.40} must be a positive number")
    return name, message, float(deadline)


def _features(message: memoryview, after: int, batches: Batches) -> NDArray[Any]:
    if after < 0:
        return decode_picture(message, batches.classifier.image_shape)[None]
    return decode(message, batches.features_shape(after), _MOST)
