"""The bundle, unpacked elsewhere, under nothing but numpy and ONNX Runtime, old and new.

Each version gets a virtual environment below ~/.cache/edgeke-tests that later runs find again.
Answers are taken in a child process: some versions abort on some graphs.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgeke.bundle import make_bundle

CACHE = Path.home() / ".cache" / "edgeke-tests"
NEWEST = (f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}")
VERSIONS = {
    "1.15.1": ("onnxruntime==1.15.1", "numpy<2"),
    "1.18.1": ("onnxruntime==1.18.1", "numpy<2"),
    "newest": NEWEST,
}
BUNDLES = ("max_probability", "margin", "entropy", "learned", "int8")

ASK = """
import dataclasses, json, sys, warnings
import numpy as np
import edgeke, onnxruntime
warnings.simplefilter("error")
from edgeke.device.classifier import Classifier

images = np.load("images.npy")
classifier = Classifier(".")
policy, arrays = classifier.policy, {}
def keep(name, answers):
    arrays[f"{name}/exit"] = [answer.exit for answer in answers]
    arrays[f"{name}/probabilities"] = np.stack([answer.probabilities for answer in answers])
for name in ("default", "proportions", "full"):
    classifier.policy = dataclasses.replace(policy, default=policy.named[name].name)
    classifier._plans.clear()
    keep(f"{name}/one", [classifier.predict(image) for image in images])
    keep(f"{name}/batch", classifier.predict_batch(images))
for exit in range(len(policy.macs) + 1):
    keep(f"forced_{exit}/one", [classifier.forced(exit)(image) for image in images])
keep("stream/one", [answer for image in images for answer in classifier.stream(image)])
classifier.profile(rounds=1)
assert classifier.profile_blocks(rounds=3).milliseconds.any(axis=0).sum() > 5
classifier.predict(images[0], mean_latency_ms=1e6, deadline_ms=1e6, max_degradation=0.99)
np.savez("answers.npz", **arrays)
print(json.dumps([edgeke.__file__, onnxruntime.__version__, sorted(sys.modules)]))
"""


@functools.cache
def environment(version: str) -> Path | str:
    """The Python of an environment with that ONNX Runtime, or why there is none."""
    folder = (
        CACHE / f"onnxruntime-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    )
    python, stamp = folder / "bin" / "python", folder / "installed"
    packages = " ".join(VERSIONS[version])
    if stamp.is_file() and stamp.read_text() == packages and python.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    make = [uv, "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    install = (
        [uv, "pip", "install", "--python", str(python)]
        if uv
        else [str(python), "-m", "pip", "install"]
    )
    for command in ([*make, str(folder)], [*install, *VERSIONS[version]]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            return f"{packages} cannot be installed: {done.stderr.strip()[-300:]}"
    stamp.write_text(packages)
    return python


@pytest.fixture(params=VERSIONS)
def python(request) -> Path:
    interpreter = environment(request.param)
    if isinstance(interpreter, str):
        pytest.skip(interpreter)
    return interpreter


@pytest.fixture
def unpacked(bundles, images, tmp_path):
    """Packs a bundle, unpacks it elsewhere, and puts images beside it."""

    def unpack(name: str) -> Path:
        with zipfile.ZipFile(make_bundle(bundles[name], tmp_path / "packed")) as archive:
            archive.extractall(tmp_path / "device")
        folder = tmp_path / "device" / "packed"
        np.save(folder / "images.npy", images)
        np.save(folder / "image.npy", images[0])
        return folder

    return unpack


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments],
        cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", BUNDLES)
def test_answers_are_those_of_the_newest(python, unpacked, name):
    folder = unpacked(name)
    by_version = {}
    for interpreter in (python, Path(sys.executable)):
        done = run(interpreter, folder, "-c", ASK)
        assert done.returncode == 0, done.stderr
        package, version, loaded = json.loads(done.stdout)
        assert Path(package).is_relative_to(folder)
        roots = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
        assert not roots & {"torch", "scipy", "onnx", "PIL", "sklearn", "mlflow", "yaml"}
        with np.load(folder / "answers.npz") as arrays:
            by_version[version] = dict(arrays)
    newest = by_version[onnxruntime.__version__]
    for answers in by_version.values():
        for key, exits in newest.items():
            if key.endswith("exit"):
                same = answers[key] == exits
                assert same.mean() > 0.95, key  # a score on a threshold may fall either way
                probabilities = key.replace("exit", "probabilities")
                difference = np.abs(answers[probabilities] - newest[probabilities])
                assert difference[same].max() < 1e-4, key


def test_the_command_line_runs_from_the_unpacked_bundle(python, unpacked):
    folder = unpacked("margin")
    for command in (
        ("info", "."),
        ("profile", ".", "--rounds", "2"),
        ("predict", ".", "image.npy", "--mean-latency-ms", "1000"),
        ("benchmark", ".", "--rounds", "2"),
    ):
        done = run(python, folder, "-m", "edgeke.device", *command)
        assert (done.returncode, done.stderr) == (0, ""), command
    done = run(python, folder, "-m", "edgeke.device", "predict", ".", "image.npy")
    assert done.stdout.startswith("image.npy: ")
    (folder / "picture.png").write_bytes(b"")
    done = run(python, folder, "-m", "edgeke.device", "predict", ".", "picture.png")
    assert done.returncode == 1
    assert "pip install pillow" in done.stderr
