"""A real server in its own process, and the clients people use."""

import gzip
import http.client
import io
import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeke.device.classifier import Classifier

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
OUTPUTS = ("label", "class_name", "probabilities", "exit")


def infer(client, images, binary=True, **parameters):
    tensor = triton.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
    return client.infer("edgeke", [tensor], outputs=wanted, parameters=parameters or None)


def post(server, path, body, **headers) -> tuple[int, dict]:
    """Status and JSON of an answer, errors included."""
    request = urllib.request.Request(server.url + path, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(server, path, **headers) -> bytes:
    request = urllib.request.Request(server.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read())


def as_json(images) -> bytes:
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape, "data": images.tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize("binary", [True, False])
def test_triton_s_client_gets_the_classifier_s_answers(server, toy, images, binary):
    client, classifier = triton.InferenceServerClient(server.address), Classifier(toy)
    answered = infer(client, images[:20], binary, max_degradation=0.5)
    expected = classifier.predict_batch(images[:20], max_degradation=0.5)
    assert answered.as_numpy("label").tolist() == [each.label for each in expected]
    assert answered.as_numpy("exit").tolist() == [each.exit for each in expected]
    names = [n.decode() if binary else n for n in answered.as_numpy("class_name")]
    assert names == [each.class_name for each in expected]
    probabilities = np.stack([each.probabilities for each in expected])
    assert np.allclose(answered.as_numpy("probabilities"), probabilities, atol=1e-5)
    said = answered.get_response()["parameters"]
    assert said["point"] == expected[0].point.name
    assert 0 < said["promised_max_degradation"] <= 0.5
    assert said["milliseconds"] > 0
    assert said["late"] is False


def test_triton_s_client_reads_metadata_and_health(server):
    client = triton.InferenceServerClient(server.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("edgeke")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("edgeke", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert [each["name"] for each in metadata["outputs"]] == list(OUTPUTS)


@pytest.mark.parametrize("compressed", ["gzip", "deflate"])
def test_compressed_requests_are_unpacked(server, images, compressed):
    client = triton.InferenceServerClient(server.address)
    tensor = triton.InferInput("image", images[:2].shape, "UINT8")
    tensor.set_data_from_numpy(images[:2])
    answer = client.infer("edgeke", [tensor], request_compression_algorithm=compressed)
    assert len(answer.as_numpy("label")) == 2


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_curl_posts_a_picture(server, toy, images, tmp_path, kind):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    file = tmp_path / f"part.{kind}"
    Image.fromarray(images[0, ..., 0]).resize((64, 64)).save(file)
    address = f"{server.url}/classify?max_degradation=0.9"
    command = ["curl", "-sS", "--data-binary", f"@{file}", address]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    from edgeke.device.decode import read_image

    pixels = read_image(file, (8, 8, 1))
    expected = Classifier(toy).predict(pixels, max_degradation=0.9)
    assert answer["class"] == expected.class_name
    assert answer["exit"] == expected.exit
    assert answer["probability"] == pytest.approx(float(expected.probabilities.max()), abs=1e-5)


def test_a_named_point_answers_and_does_not_count_as_an_exit_taken(server, toy, images):
    file = io.BytesIO()
    Image.fromarray(images[0, ..., 0]).save(file, "png")
    before = counted(server)
    status, answer = post(server, "/classify?point=full", file.getvalue())
    assert (status, answer["point"], answer["exit"]) == (200, "full", 2)
    expected = Classifier(toy).forced(2)(images[0]).probabilities
    assert list(answer["probabilities"].values()) == pytest.approx(sorted(expected)[::-1], abs=1e-5)
    exits = {k: v for k, v in counted(server).items() if k.startswith("edgeke_answers")}
    assert exits == {k: before[k] for k in exits}
    for query, said in (
        ("point=none", "no operating point 'none'"),
        ("point=full&delta=0.1", "not both"),
    ):
        status, answer = post(server, f"/classify?{query}", file.getvalue())
        assert (status, said in answer["error"]) == (400, True)


def test_what_cannot_be_met_names_the_nearest(server, images):
    status, answer = post(server, "/classify?deadline_ms=0.000001", b"\xff\xd8 no picture")
    assert (status, "cannot be read" in answer["error"]) == (400, True)
    body = json.loads(as_json(images[:1])) | {"parameters": {"deadline_ms": 1e-6}}
    status, answer = post(server, "/v2/models/edgeke/infer", json.dumps(body).encode())
    assert status == 422
    assert answer["nearest"] > 1e-6
    assert "cannot be met" in answer["error"]


def malformed(random: random.Random, good: bytes) -> tuple[str, bytes, dict[str, str]]:
    """A request that no client should send."""
    path, headers = "/v2/models/edgeke/infer", {"Content-Type": "application/json"}
    kind = random.randrange(10)
    if kind == 0:
        return path, good[: random.randrange(len(good))], headers
    if kind == 1:
        return path, random.randbytes(random.randrange(500)), headers
    if kind == 2:
        return path, good, headers | {"Inference-Header-Content-Length": str(10**9)}
    if kind == 3:
        return path, good, headers | {"Inference-Header-Content-Length": "-1 or so"}
    if kind == 4:
        return path, good, headers | {"Content-Encoding": random.choice(["gzip", "br", "deflate"])}
    if kind == 5:
        return "/classify", random.randbytes(200), {"Content-Type": "image/jpeg"}
    if kind == 6:
        names = ("deadline_ms", "max_degradation", "min_accuracy", "delta", "mean_latency_ms")
        value = random.choice(["nan", "inf", "-1", "0", "", "1e999", "ten"])
        return f"/classify?{random.choice(names)}={value}", b"", {}
    content = json.loads(good)
    tensor = content["inputs"][0]
    if kind == 7:
        tensor["shape"] = random.choice([[], [1], [1, 9, 9, 1], [0, 8, 8, 1], "4", None, [1e9] * 4])
    elif kind == 8:
        content["parameters"] = {
            "deadline_ms": random.choice([float("nan"), "5", -1, [], True, {}])
        }
    else:
        tensor["data"] = random.choice([[], [300] * 64, ["a"] * 64, [None] * 64, {"a": 1}])
    return path, json.dumps(content).encode(), headers


def test_a_thousand_malformed_requests_get_a_sentence(server, images):
    draw, good = random.Random(0), as_json(images[:1])
    for _ in range(1000):
        path, body, headers = malformed(draw, good)
        status, answer = post(server, path, body, **headers)
        assert 400 <= status < 500, (path, body, headers, answer)
        assert len(answer["error"]) > 10
    assert post(server, "/v2/models/edgeke/infer", good)[0] == 200


def test_requests_that_are_no_http_leave_the_server_alive(server, images):
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\nhalf",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            try:
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
                answer = client.recv(65536)
            except OSError:  # it has hung up already
                answer = b""
            assert answer == b"" or b" 4" in answer.split(b"\r\n")[0], answer
    status, answer = post(server, "/nowhere", b"")
    assert (status, "/classify" in answer["error"]) == (404, True)
    assert post(server, "/v2/models/edgeke/infer", as_json(images[:1]))[0] == 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve, images):
    server = serve("--body-limit", "1")
    connection = http.client.HTTPConnection(server.address, timeout=10)
    connection.putrequest("POST", "/classify")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert b"larger than" in response.read()
    connection.close()
    bomb = gzip.compress(bytes(50 * 2**20))
    assert post(server, "/classify", bomb, **{"Content-Encoding": "gzip"})[0] == 413


def test_a_slow_client_does_not_hold_the_others(server, images):
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\na")
        client = triton.InferenceServerClient(server.address)
        for _ in range(20):
            assert len(infer(client, images[:1]).as_numpy("label")) == 1


def ask_for(server, images, seconds: float, clients: int = 64) -> int:
    """That many clients ask for so long; how many answers, all of them right, they got."""
    expected = {n: len(images[:n]) for n in (1, 2, 3)}

    def one(number: int) -> int:
        client, count = triton.InferenceServerClient(server.address), 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            size = 1 + (number + count) % 3
            assert len(infer(client, images[:size]).as_numpy("label")) == expected[size]
            count += 1
        client.close()
        return count

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(one, range(clients)))


def counted(server) -> dict[str, float]:
    lines = get(server, "/metrics").decode().splitlines()
    return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if x[0] != "#")}


def test_64_clients_lose_nothing(serve, images):
    server = serve()
    before = ask_for(server, images, 3)
    metrics = counted(server)
    assert metrics['edgeke_requests_total{status="200"}'] >= before > 64
    assert metrics["edgeke_latency_seconds_count"] == before
    exits = sum(v for k, v in metrics.items() if k.startswith("edgeke_answers_total"))
    assert exits > before
    assert metrics["edgeke_waiting_images"] == 0


@pytest.mark.slow
def test_64_clients_lose_nothing_for_half_a_minute(serve, images):
    assert ask_for(serve(), images, 30) > 64


def test_what_was_accepted_is_answered_before_the_end(serve, images):
    """SIGTERM while 16 clients wait: each gets its answer or is not accepted at all."""
    server, many = serve("--longest", "60"), np.concatenate([images] * 40)
    statuses = []

    def ask() -> None:
        try:
            statuses.append(post(server, "/v2/models/edgeke/infer", as_json(many))[0])
        except (OSError, http.client.HTTPException):
            statuses.append(0)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    while counted(server)["edgeke_waiting_images"] == 0:
        assert any(thread.is_alive() for thread in threads)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert server.process.wait(30) in (0, -signal.SIGTERM), "uvicorn ends by the signal itself"
    assert 200 in statuses
    assert set(statuses) <= {200, 0, 503}


def test_a_killed_server_starts_again(serve, images):
    first = serve()
    first.process.kill()
    first.process.wait()
    second = serve()
    assert post(second, "/v2/models/edgeke/infer", as_json(images[:1]))[0] == 200


def test_sighup_serves_what_is_in_the_folder_or_keeps_the_old(serve, bundle, images):
    server, body = serve(), as_json(images[:1])
    path = "/v2/models/edgeke/infer"
    model = bundle / "edgeke.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    server.process.send_signal(signal.SIGHUP)
    wait_for(server, "the old model stays")
    assert post(server, path, body)[0] == 200
    temporary = bundle / "new"
    temporary.write_bytes(whole)
    temporary.rename(model)
    server.process.send_signal(signal.SIGHUP)
    while "reloaded" not in server.log():
        assert post(server, path, body)[0] == 200, "nothing is lost meanwhile"


def wait_for(server, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in server.log():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)


def test_a_token_is_asked_of_all_but_health_checks(serve, tmp_path, images):
    file = tmp_path / "token"
    file.write_text("secret\n")
    server = serve("--token-file", str(file))
    path, body = "/v2/models/edgeke/infer", as_json(images[:1])
    assert post(server, path, body)[0] == 401
    assert post(server, path, body, Authorization="Bearer wrong")[0] == 401
    assert post(server, path, body, Authorization="Bearer secret")[0] == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(server, "/metrics")
    assert json.loads(get(server, "/v2/health/live")) == {"live": True}
    assert "secret" not in server.log()


def test_tls(serve, tmp_path, images):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    import ssl

    server = serve("--tls-certificate", str(certificate), "--tls-key", str(key))
    context, deadline = ssl.create_default_context(cafile=str(certificate)), time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/v2/health/ready", context=context) as answer:
                assert json.load(answer)["ready"] is True
            return
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["missing"], "missing is missing; give a bundle folder"),
        (["{bundle}", "--tls-key", "key.pem"], "give both"),
        (["{bundle}", "--token-file", "nowhere"], "nowhere cannot be read"),
        (["{bundle}", "--batch", "0"], "--batch must be 1 to 1024"),
        (["{bundle}/edgeke.onnx"], "there are no segments"),
    ],
)
def test_bad_options_are_refused_before_anything_listens(bundle, capsys, options, said):
    from edgeke.serving.__main__ import main

    assert main([option.format(bundle=bundle) for option in options]) == 1
    assert said in capsys.readouterr().err


def test_the_model_folder_may_be_read_only(serve, bundle, images):
    before = {p: p.read_bytes() for p in Path(bundle).rglob("*") if p.is_file()}
    server = serve()
    assert post(server, "/v2/models/edgeke/infer", as_json(images[:1]))[0] == 200
    assert {p: p.read_bytes() for p in Path(bundle).rglob("*") if p.is_file()} == before


def test_log_lines_are_json(serve, images):
    server = serve()
    post(server, "/v2/models/edgeke/infer", as_json(images[:1]))
    wait_for(server, '"status": 200')
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert any(line.get("path") == "/v2/models/edgeke/infer" for line in lines)
