"""The Open Inference Protocol (v2) with its binary tensor extension: bytes in, bytes out.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.md.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

INPUT = "image"
OUTPUTS = ("label", "class_name", "probabilities", "exit")
NUMBERS = (
    "deadline_ms", "mean_latency_ms", "max_degradation", "min_accuracy", "delta", "max_sure_error",
)  # fmt: skip
# Of a class: "crack=0.99".
SHARES = ("max_miss", "min_recall")
REQUIREMENTS = (*NUMBERS, *SHARES)

_DATATYPES = {"i8": "INT64", "f4": "FP32", "O": "BYTES"}
_OTHER_PARAMETERS = {"binary_data_output"}


@dataclass(frozen=True)
class InferRequest:
    """Images uint8 `[N, H, W, C]`, requirements by name, and how outputs are wanted.

    `outputs`: whether each wanted output is binary.
    """

    id: str | None
    images: NDArray[np.uint8]
    requirements: Mapping[str, Any]
    outputs: Mapping[str, bool]


def parse_infer(
    body: bytes, json_length: int | None, shape: tuple[int, int, int], most: int
) -> InferRequest:
    """Read the body of an `infer` request of at most `most` images of `shape`.

    `json_length`: bytes of JSON before the binary tensors (the header
    `Inference-Header-Content-Length`); None where all is JSON.
    Errors: InputError saying what is wrong with which part.
    """
    length = len(body) if json_length is None else json_length
    if not 0 < length <= len(body):
        raise InputError(
            f"Inference-Header-Content-Length = {length}, but the body has {len(body)} bytes"
        )
    content = parse_json(body[:length])
    name = content.get("id")
    if name is not None and not isinstance(name, str):
        raise InputError(f"id = {name!r:.40} must be text")
    parameters = _parameters(content.get("parameters"), {*REQUIREMENTS, *_OTHER_PARAMETERS})
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise InputError(f"inputs must be a list of one tensor, {INPUT!r}")
    images = _images(inputs[0], body[length:], shape, most)
    requirements = {name: parameters[name] for name in REQUIREMENTS if name in parameters}
    outputs = _outputs(content.get("outputs"), parameters.get("binary_data_output") is True)
    return InferRequest(name, images, requirements, outputs)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object without NaN and infinities. Errors: InputError."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        content = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError("the body must be a JSON object")
    return content


def check_requirements(given: Mapping[str, str]) -> dict[str, Any]:
    """Requirements from a query's text. Errors: InputError for an unknown one, or no number."""
    parameters = _parameters(dict(given), set(REQUIREMENTS))
    try:
        return {
            name: value if name in SHARES else float(value) for name, value in parameters.items()
        }
    except ValueError as error:
        raise InputError(f"a requirement is no number ({error})") from None


def write_infer(
    request: InferRequest,
    model: str,
    version: str,
    values: Mapping[str, NDArray[Any]],
    parameters: Mapping[str, Any],
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the response; `values` are the outputs by name."""
    described, tail = [], []
    for name, binary in request.outputs.items():
        array = values[name]
        kind = array.dtype.kind if array.dtype.kind == "O" else array.dtype.str[1:]
        entry: dict[str, Any] = {
            "name": name,
            "datatype": _DATATYPES[kind],
            "shape": list(array.shape),
        }
        if binary:
            raw = _bytes(array)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    content: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        content["id"] = request.id
    content |= {"parameters": dict(parameters), "outputs": described}
    head = json.dumps(content, allow_nan=False).encode()
    if not tail:
        return head, {"content-type": "application/json"}
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
    return b"".join([head, *tail]), headers


def _parameters(given: Any, known: set[str]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InputError("parameters must be a JSON object")
    if unknown := sorted(set(given) - known):
        raise InputError(f"unknown parameter {unknown[0]!r:.60}; known: {', '.join(sorted(known))}")
    return given


def _images(
    tensor: dict[str, Any], binary: bytes, shape: tuple[int, int, int], most: int
) -> NDArray[np.uint8]:
    if tensor.get("name") != INPUT:
        raise InputError(f"the input is called {tensor.get('name')!r:.40}, the model's {INPUT!r}")
    if tensor.get("datatype") != "UINT8":
        raise InputError(f"datatype of {INPUT!r} must be UINT8: pixels from 0 to 255")
    sides = tensor.get("shape")
    whole = isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides)
    if not whole or len(sides or ()) != 4 or tuple(sides[1:]) != shape:  # type: ignore[index]
        raise InputError(
            f"{INPUT!r} has shape {sides!r:.60}, the model takes [N, {', '.join(map(str, shape))}] "
            "(number, height, width, channels)"
        )
    count = sides[0]  # type: ignore[index]
    if count > most:
        raise InputError(f"{count} images at once; send at most {most}")
    size = count * math.prod(shape)
    parameters = _parameters(tensor.get("parameters"), {"binary_data_size"})
    if "binary_data_size" not in parameters:
        return _from_json(tensor.get("data"), size).reshape(count, *shape)
    if "data" in tensor:
        raise InputError(f"{INPUT!r} has both data and binary_data_size; send one of them")
    if parameters["binary_data_size"] != size or len(binary) != size:
        raise InputError(
            f"binary_data_size = {parameters['binary_data_size']!r:.40} and {len(binary)} bytes "
            f"after the JSON; {count} images take {size}"
        )
    return np.frombuffer(binary, np.uint8).reshape(count, *shape)


def _from_json(data: Any, size: int) -> NDArray[np.uint8]:
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise InputError(f"data of {INPUT!r} is uneven ({error})") from None
    fits = values.size == size and values.dtype.kind in "iu"
    if not fits or values.min() < 0 or values.max() > 255:
        raise InputError(f"data of {INPUT!r} must be {size} whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _outputs(wanted: Any, binary: bool) -> dict[str, bool]:
    if wanted in (None, []):
        return dict.fromkeys(OUTPUTS, binary)
    outputs = {}
    if not isinstance(wanted, list):
        raise InputError("outputs must be a list")
    for each in wanted:
        name = each.get("name") if isinstance(each, dict) else None
        if name not in OUTPUTS:
            raise InputError(f"unknown output {name!r:.40}; known: {', '.join(OUTPUTS)}")
        parameters = _parameters(each.get("parameters"), {"binary_data"})
        outputs[name] = parameters.get("binary_data", binary) is True
    return outputs


def _bytes(array: NDArray[Any]) -> bytes:
    """A tensor's binary form: row by row, little endian; texts with their length before them."""
    if array.dtype.kind != "O":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [str(text).encode() for text in array.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
