"""The server on Ray Serve, on this machine."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import psutil
import pytest
from servers import answers, free_port
from toys import ROOT

from edgeke.device.classifier import Classifier

pytest.importorskip("ray.serve", reason="Ray is not installed (requirements-ray.txt)")


def ask_for(url: str, body: bytes, expected: list[int]) -> str:
    """What becomes of a request: right, wrong, refused (so not accepted), or lost."""
    try:
        request = urllib.request.Request(f"{url}/v2/models/edgeke/infer", body)
        with urllib.request.urlopen(request, timeout=120) as response:
            labels = json.load(response)["outputs"][0]["data"]
            return "right" if labels == expected else "wrong"
    except urllib.error.HTTPError as error:
        with error:
            busy = error.code == 503 and b"of work wait" in error.read()
            return "refused" if busy else f"lost ({error.code})"
    except (OSError, http.client.HTTPException) as error:
        return f"lost ({error})"


def replicas(process: subprocess.Popen) -> set[int]:
    """The process ids of the model's replicas."""
    pids = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            if "Replica:edgeke:Replica" in " ".join(child.cmdline()):
                pids.add(child.pid)
    return pids


@pytest.mark.slow
def test_a_killed_replica_loses_nothing(bundle, images, tmp_path):
    """Two replicas under load; one is killed; every request gets the right answer."""
    port, log, stop = free_port(), tmp_path / "log", threading.Event()
    command = [sys.executable, "-m", "edgeke.serving.on_ray", str(bundle), "--replicas", "2"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not answers(f"{url}/v2/health/ready") or len(replicas(process)) < 2:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        # Large enough that most of a request's time is spent in a replica.
        many = np.concatenate([images] * 20)
        expected = [each.label for each in Classifier(bundle).predict_batch(many)]
        tensor = {"name": "image", "datatype": "UINT8", "shape": many.shape}
        body = json.dumps({"inputs": [tensor | {"data": many.tolist()}]}).encode()
        seen = Counter[str]()

        def ask() -> None:
            while not stop.is_set():
                seen[ask_for(url, body, expected)] += 1

        clients = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        before = replicas(process)
        time.sleep(2)
        for _ in range(2):  # the second one after the first is back
            victim = min(replicas(process) & before)
            os.kill(victim, signal.SIGKILL)
            before.discard(victim)
            end = time.monotonic() + 120
            while len(replicas(process)) < 2 or victim in replicas(process):
                assert time.monotonic() < end, "the replica was not started again"
                time.sleep(0.2)
        time.sleep(2)
        stop.set()
        for client in clients:
            client.join()
        assert set(seen) <= {"right", "refused"}, (seen, log.read_text()[-3000:])
        assert seen["right"] > 50
    finally:
        stop.set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", ["0", "4-1", "1-", "two", "1-2-3"])
def test_a_number_of_replicas_without_sense_is_refused(bundle, capsys, number):
    from edgeke.serving.on_ray import main

    assert main([str(bundle), "--replicas", number]) == 1
    assert f"--replicas {number} must be like 2, or 1-4" in capsys.readouterr().err


def test_a_replica_answers_with_files_and_knows_how_long_a_request_has_waited(bundle, images):
    from edgeke.serving.application import Settings
    from edgeke.serving.front import CAME
    from edgeke.serving.on_ray import Replica

    tensor = {"name": "image", "datatype": "UINT8", "shape": images[:1].shape}
    asked = {"inputs": [tensor | {"data": images[:1].tolist()}], "parameters": {"deadline_ms": 900}}
    scope = {"type": "http", "http_version": "1.1", "query_string": b"", "scheme": "http"}
    infer = {**scope, "method": "POST", "path": "/v2/models/edgeke/infer", "headers": []}

    async def ask() -> list[int]:
        replica = Replica.__new__(Replica)
        await replica.__init__(Settings(bundle))
        page = {**scope, "method": "GET", "path": "/", "headers": []}
        status, headers, body = await asyncio.wait_for(replica.ask(page, b""), 20)
        assert b"content-security-policy" in dict(headers)
        assert body.startswith(b"<!doctype html>")
        waits = [
            await replica.ask(infer | {CAME: time.time() - s}, json.dumps(asked).encode())
            for s in (0, 5)
        ]
        return [status, *(each[0] for each in waits)]

    assert asyncio.run(ask()) == [200, 200, 503]
