"""A bundle to serve, and a server in a process of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bundles import build
from draws import settings
from servers import answers, free_port
from toys import ROOT, SIZE, randomise

from edgeke.calibrate import certify_partitions, compose
from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.device.manifest import read_manifest
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.branchynet import BranchyNet
from edgeke.policy.samples import ExitLogits


@pytest.fixture(scope="session")
def toy(architecture, dataset, tmp_path_factory) -> Path:
    """A bundle folder that tests must not change."""
    torch.manual_seed(0)
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    folder = tmp_path_factory.mktemp("served") / "bundle"
    return build(folder, segments, "margin", "", dataset, list_blocks(network, SIZE))


@pytest.fixture
def bundle(toy, tmp_path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def images(dataset) -> np.ndarray:
    return channels_last(dataset["test"].images)


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[SimpleNamespace]:
    """A server's address, process and log, once it is ready."""
    port, log = free_port(), bundle.parent / "server.log"
    command = [sys.executable, "-m", "edgeke.serving", str(bundle), "--port", str(port), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=output)
    scheme = "https" if "--tls-key" in options else "http"
    try:
        deadline = time.monotonic() + 60
        ready = f"http://127.0.0.1:{port}/v2/health/ready"
        while scheme == "http" and not answers(ready):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.1)
        yield SimpleNamespace(
            address=f"127.0.0.1:{port}", port=port, process=process, log=log.read_text,
            url=f"{scheme}://127.0.0.1:{port}",
        )  # fmt: skip
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def serve(bundle) -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts servers of the bundle, and ends them."""
    with contextlib.ExitStack() as stack:
        yield lambda *options, folder=bundle: stack.enter_context(serving(folder, *options))


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """One server for tests that only ask."""
    copy = shutil.copytree(toy, tmp_path_factory.mktemp("asked") / "bundle")
    with serving(Path(copy)) as running:
        yield running


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[SimpleNamespace]]:
    """`serving`, for servers of another bundle or scope."""
    return serving


@pytest.fixture(scope="session")
def divided(toy, dataset, tmp_path_factory) -> Path:
    """The toy bundle with partitions; its point `full` sends every image."""
    folder = tmp_path_factory.mktemp("divided") / "bundle"
    shutil.copytree(toy, folder)
    place = folder / "segments" / "fp32"
    manifest = read_manifest(place)
    files = [place / name for name in manifest.segments]
    chosen = settings(
        partitions=({"after": 0, "codecs": ["q4", "f32"]}, {"after": 1, "codecs": ["q8"]})
    )
    names = ("validation", "calibration")
    images = {name: channels_last(dataset[name].images) for name in names}
    answers = {
        name: ExitLogits(segment_logits(files, images[name], 1), dataset[name].labels)
        for name in names
    }
    policy = Classifier(toy).policy
    partitions = certify_partitions(files, images, answers, policy, chosen, manifest)
    assert [each.name for each in partitions] == ["after_0_q4", "after_0_f32", "after_1_q8", "raw"]
    (folder / "edgeke.onnx").write_bytes(compose(files, policy, manifest, partitions))
    return folder


@pytest.fixture(scope="module")
def tail_server(divided, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """One server of that bundle for tests that break links, not servers."""
    copy = shutil.copytree(divided, tmp_path_factory.mktemp("tail") / "bundle")
    with serving(Path(copy)) as running:
        yield running
