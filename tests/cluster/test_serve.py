"""A bundle behind HTTP, answered by devices of one machine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from bundles import build
from servers import answers, free_port
from toys import ROOT, SIZE, randomise

from edgeke.cluster.__main__ import main
from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.branchynet import BranchyNet

pytest.importorskip("ray", reason="needs requirements-ray.txt")


def test_the_server_answers_as_one_device_does(architecture, dataset, tmp_path, capsys):
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    blocks = list_blocks(network, SIZE)
    folder = build(tmp_path / "bundle", segments, "margin", "", dataset, blocks)
    port, images = free_port(), channels_last(dataset["test"].images)[:6]
    command = [sys.executable, "-m", "edgeke.cluster", "serve", str(folder), "--local", "2"]
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT)
    url = f"http://127.0.0.1:{port}/v2"
    try:
        deadline = time.monotonic() + 180
        while not answers(f"{url}/health/ready"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for request in ({}, {"deadline_ms": 10_000.0}):
            tensor = {"name": "image", "datatype": "UINT8", "shape": list(images.shape)}
            tensor["data"] = images.ravel().tolist()
            body = json.dumps({"inputs": [tensor], "parameters": request}).encode()
            with urllib.request.urlopen(f"{url}/models/edgeke/infer", body) as response:
                outputs = {each["name"]: each for each in json.load(response)["outputs"]}
            own = Classifier(folder).predict_batch(images)
            assert outputs["label"]["data"] == [each.label for each in own]
            assert outputs["exit"]["data"] == [each.exit for each in own]
            got = np.reshape(outputs["probabilities"]["data"], (len(images), -1))
            assert np.abs(got - [each.probabilities for each in own]).max() < 1e-5
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait(60)
    assert main(["show", str(folder)]) == 0
    assert "expected until each exit: " in capsys.readouterr().out
    assert main(["profile", str(folder), "--memory", "x=1"]) == 1
