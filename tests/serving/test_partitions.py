"""The tail of a partition over HTTP, against the same segments run here."""

import http.client
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgeke.device.classifier import Classifier
from edgeke.device.codec import Codec, decode, encode, encode_picture


def ask(server, after, message, **parameters):
    tensor = {
        "name": "features",
        "datatype": "UINT8",
        "shape": [len(message)],
        "parameters": {"binary_data_size": len(message)},
    }
    head = json.dumps({"id": "x", "inputs": [tensor], "parameters": parameters}).encode()
    return post(server, f"/v2/models/edgeke/after/{after}/infer", head + message, len(head))


def post(server, path, body, length=None):
    """Status, JSON, and the binary tail."""
    connection = http.client.HTTPConnection(server.address, timeout=30)
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    split = int(response.getheader("inference-header-content-length", len(content)))
    connection.close()
    return response.status, json.loads(content[:split]), content[split:]


@pytest.fixture(scope="module")
def segments(toy):
    return Classifier(toy).open_segments()


def tail(segments, features, after):
    for exit in range(after + 1, 3):
        probabilities, features = segments.probabilities(exit, features)
    return probabilities


@pytest.mark.parametrize("after", [0, 1])
def test_features_are_answered_by_the_segments_after_them(server, segments, toy, images, after):
    features = images[:3]
    for exit in range(after + 1):
        _, features = segments.probabilities(exit, features)
    message = encode(features, Codec(6, 0.5), True)
    status, content, tail_bytes = ask(server, after, message, deadline_ms=10_000)
    assert status == 200, content
    arrived = decode(message, features.shape[1:], 3)
    expected = tail(segments, arrived, after)
    assert np.allclose(np.frombuffer(tail_bytes, "<f4").reshape(3, -1), expected, atol=1e-5)
    assert content["id"] == "x"
    assert content["model_name"] == f"edgeke/after/{after}"
    assert content["parameters"]["segments"] == Classifier(toy).segments_sha256
    assert content["parameters"]["milliseconds"] > 0


def test_a_picture_is_answered_by_all_segments(server, segments, images):
    status, content, answer = ask(server, "raw", encode_picture(images[0]))
    assert status == 200, content
    expected = tail(segments, images[:1], -1)[0]
    assert np.allclose(np.frombuffer(answer, "<f4"), expected, atol=1e-5)


def test_answers_of_many_devices_are_not_mixed_up(server, segments, images):
    _, features = segments.probabilities(0, images[:40])
    expected = tail(segments, features, 0)

    def one(number):
        return np.frombuffer(ask(server, 0, encode(features[[number]], Codec(32)))[2], "<f4")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(40)))
    assert np.allclose(answers, expected, atol=1e-5)


def test_what_is_malformed_is_refused(server, segments, images):
    _, features = segments.probabilities(0, images[:2])
    good = encode(features, Codec(8))
    for after, message, words in (
        (0, good[:-1], "bytes instead of"),
        (0, b"", "are no features"),
        (1, encode(features[:, :, :1], Codec(8)), "are not those of this model"),
        (0, encode(features.repeat(40, 0), Codec(8)), "are not those of this model"),
        ("raw", good, "no PNG"),
    ):
        status, content, _ = ask(server, after, message)
        assert status == 400
        assert words in content["error"]
    assert ask(server, 2, good)[0] == 404
    assert ask(server, "x", good)[0] == 404
    for parameters in ({"deadline_ms": -1}, {"max_error": 0.1}, {"deadline_ms": True}):
        assert ask(server, 0, good, **parameters)[0] == 400
    assert ask(server, 0, good, deadline_ms=1e-6)[0] == 503
    path = "/v2/models/edgeke/after/0/infer"
    for body, length in ((good, None), (b"{}" + good, 2), (good, 10**9), (b"[]", 2)):
        assert post(server, path, body, length)[0] == 400
    assert ask(server, 0, good)[0] == 200


def test_probes_are_told_what_is_served(server, toy):
    status, content, _ = post(server, "/v2/models/edgeke/after", struct.pack("9000x"))
    assert status == 200
    assert content["segments"] == Classifier(toy).segments_sha256
    costs = content["milliseconds"]
    assert set(costs) == {"raw", "0", "1"}
    assert costs["raw"] > costs["0"] > costs["1"] > 0
