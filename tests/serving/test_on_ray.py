"""The server on Ray Serve, on this machine."""

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

import psutil
import pytest
from servers import answers, free_port
from toys import ROOT

from edgeke.device.classifier import Classifier

pytest.importorskip("ray.serve", reason="Ray is not installed (requirements-ray.txt)")


def ask_for(url: str, images) -> tuple[int, list[int]]:
    """Status and labels; status 0 where no answer came."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": images.shape, "data": images.tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    request = urllib.request.Request(f"{url}/v2/models/edgeke/infer", body)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)["outputs"][0]["data"]
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, []
    except (OSError, http.client.HTTPException):
        return 0, []


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
        while not answers(f"{url}/v2/health/ready"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        expected = [each.label for each in Classifier(bundle).predict_batch(images[:40])]
        seen = Counter[tuple[int, bool]]()

        def ask() -> None:
            while not stop.is_set():
                status, labels = ask_for(url, images[:40])
                seen[status, labels == expected] += 1

        clients = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
        for client in clients:
            client.start()
        before = replicas(process)
        assert len(before) == 2
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
        assert set(seen) == {(200, True)}, (seen, log.read_text()[-3000:])
        assert seen[200, True] > 100
    finally:
        stop.set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
