import json

import numpy as np
import pytest

from edgeke.errors import InputError
from edgeke.serving.protocol import check_requirements, parse_infer, write_infer

SHAPE = (4, 4, 1)


def request(**changes) -> dict:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [2, *SHAPE], "data": list(range(32))}
    tensor |= changes.pop("tensor", {})
    return {"inputs": [tensor], **changes}


def parse(content: dict, binary: bytes = b"", most: int = 8):
    text = json.dumps(content).encode()
    return parse_infer(text + binary, len(text) if binary else None, SHAPE, most)


def test_json_and_binary_tensors_are_the_same_images():
    pixels = np.arange(32, dtype=np.uint8)
    content = request(tensor={"parameters": {"binary_data_size": 32}})
    del content["inputs"][0]["data"]
    binary = parse(content, pixels.tobytes()).images
    nested = parse(request(tensor={"data": pixels.reshape(2, *SHAPE).tolist()})).images
    for images in (binary, nested, parse(request()).images):
        assert images.dtype == np.uint8
        assert np.array_equal(images, pixels.reshape(2, *SHAPE))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": []}, "one tensor"),
        ({"inputs": "image"}, "one tensor"),
        ({"id": 3}, "must be text"),
        ({"parameters": {"deadlin_ms": 3}}, "unknown parameter 'deadlin_ms'"),
        ({"parameters": [1]}, "must be a JSON object"),
        ({"outputs": [{"name": "logits"}]}, "unknown output 'logits'"),
        ({"outputs": ["label"]}, "unknown output"),
        ({"outputs": "label"}, "outputs must be a list"),
        ({"tensor": {"name": "input"}}, "called 'input'"),
        ({"tensor": {"datatype": "FP32"}}, "must be UINT8"),
        ({"tensor": {"shape": [2, 4, 4]}}, "the model takes"),
        ({"tensor": {"shape": [-1, 4, 4, 1]}}, "the model takes"),
        ({"tensor": {"shape": [True, 4, 4, 1]}}, "the model takes"),
        ({"tensor": {"shape": None}}, "the model takes"),
        ({"tensor": {"shape": [9, 4, 4, 1]}}, "at most 8"),
        ({"tensor": {"data": [1, 2]}}, "32 whole numbers"),
        ({"tensor": {"data": [0.5] * 32}}, "32 whole numbers"),
        ({"tensor": {"data": [-1] * 32}}, "from 0 to 255"),
        ({"tensor": {"data": [[1], [1, 2]]}}, "uneven"),
        ({"tensor": {"data": None}}, "32 whole numbers"),
        ({"tensor": {"parameters": {"binary_data_size": 32}}}, "send one of them"),
        ({"tensor": {"parameters": {"shared_memory_region": "a"}}}, "unknown parameter"),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(InputError, match=said):
        parse(request(**changes))


@pytest.mark.parametrize("size", [31, 33, 2**40, -1, "32", None, 1e400])
def test_a_binary_tensor_of_another_size_is_refused(size):
    content = request(tensor={"parameters": {"binary_data_size": size}})
    del content["inputs"][0]["data"]
    with pytest.raises(InputError, match=r"take 32|NaN|Infinity"):
        parse(content, bytes(32 if size != 33 else 33))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"inputs": NaN}', b"[" * 100_000, b"null"]
)
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(InputError):
        parse_infer(body, None, SHAPE, 8)
    with pytest.raises(InputError, match="Inference-Header-Content-Length"):
        parse_infer(body, len(body) + 1, SHAPE, 8)


def test_outputs_are_as_wanted():
    wanted = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "class_name"}]
    asked = parse(request(id="7", outputs=wanted))
    values = {"label": np.array([3, -1]), "class_name": np.array(["scratch", "Öl"], object)}
    body, headers = write_infer(asked, "m", "1", values, {"late": False})
    length = int(headers["inference-header-content-length"])
    content = json.loads(body[:length])
    assert (content["id"], content["parameters"]) == ("7", {"late": False})
    assert np.frombuffer(body[length:], "<i8").tolist() == [3, -1]
    assert content["outputs"][1]["data"] == ["scratch", "Öl"]
    everything = parse(request(parameters={"binary_data_output": True}))
    assert everything.outputs == dict.fromkeys(everything.outputs, True)


def test_a_query_gives_numbers():
    assert check_requirements({"deadline_ms": "5"}) == {"deadline_ms": 5.0}
    with pytest.raises(InputError, match="no number"):
        check_requirements({"deadline_ms": "soon"})
    with pytest.raises(InputError, match="unknown parameter"):
        check_requirements({"deadline": "5"})
