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
from edgeke.device.classifier import Classifier
from edgeke.device.scores import Score

CACHE = Path.home() / ".cache" / "edgeke-tests"
NEWEST = (f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}")
VERSIONS = {
    "1.15.1": ("onnxruntime==1.15.1", "numpy<2"),
    "1.18.1": ("onnxruntime==1.18.1", "numpy<2"),
    "newest": NEWEST,
}
BUNDLES = ("max_probability", "margin", "entropy", "learned", "int8")
POINTS = ("default", "proportions", "full")
TIE = 1e-5  # rounding of single precision

ASK = """
import dataclasses, json, sys, warnings
import numpy as np
import edgeke, onnxruntime
warnings.simplefilter("error")
from edgeke.device.classifier import Classifier

images = np.load("images.npy")
classifier = Classifier(".")
policy, found = classifier.policy, {}
def keep(name, answers):
    found[f"{name}/exit"] = [answer.exit for answer in answers]
    found[f"{name}/probabilities"] = np.stack([answer.probabilities for answer in answers])
for name in json.loads(sys.argv[1]):
    classifier.policy = dataclasses.replace(policy, default=policy.named[name].name)
    classifier._plans.clear()
    keep(f"{name}/one", [classifier.predict(image) for image in images])
    keep(f"{name}/batch", classifier.predict_batch(images))
for exit in range(len(policy.macs) + 1):
    keep(f"forced_{exit}/one", [classifier.forced(exit)(image) for image in images])
keep("stream/one", [answer for image in images for answer in classifier.stream(image)])
classifier.profile(rounds=1)
classifier.predict(images[0], mean_latency_ms=1e6, deadline_ms=1e6, max_degradation=0.99)
np.savez("answers.npz", **found)
print(json.dumps([edgeke.__file__, onnxruntime.__version__, sorted(sys.modules)]))
"""


@functools.cache
def environment(version: str) -> Path | str:
    """The Python of an environment with that ONNX Runtime, or why there is none."""
    folder = (
        CACHE / f"onnxruntime-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    )
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = " ".join(VERSIONS[version])
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
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
            return f"{wanted} cannot be installed: {done.stderr.strip()[-300:]}"
    stamp.write_text(wanted)
    return python


@pytest.fixture(params=VERSIONS)
def python(request) -> Path:
    found = environment(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


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
def test_answers_are_those_of_the_newest(python, unpacked, bundles, images, name):
    folder = unpacked(name)
    done = run(python, folder, "-c", ASK, json.dumps(POINTS))
    assert done.returncode == 0, done.stderr
    package, version, loaded = json.loads(done.stdout)
    assert Path(package).is_relative_to(folder)
    assert version in " ".join(VERSIONS["newest"]) or version in VERSIONS
    roots = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert not roots & {"torch", "scipy", "onnx", "PIL", "sklearn", "mlflow", "yaml"}

    here = Classifier(bundles[name])
    exits = len(here.policy.macs)
    forced = [[here.forced(e)(image).probabilities for image in images] for e in range(exits + 1)]
    expected = np.array(forced, np.float32)
    scores = Score(here.policy.score, here.policy.score_weights).of(expected[:exits])
    every = np.arange(len(images))
    with np.load(folder / "answers.npz") as answers:
        for point in POINTS:
            thresholds = np.asarray(here.policy.named[point].thresholds, np.float32)[:, None]
            sure = scores > thresholds
            exit = np.where(sure.any(axis=0), sure.argmax(axis=0), exits)
            clear = (np.abs(scores - thresholds) > TIE).all(axis=0)
            assert clear.mean() > 0.5
            for way in ("one", "batch"):
                found = answers[f"{point}/{way}/exit"]
                assert np.array_equal(found[clear], exit[clear])
                probabilities = answers[f"{point}/{way}/probabilities"]
                # An image on a tie may leave elsewhere; what that exit says is the same.
                assert np.allclose(probabilities, expected[found, every], atol=1e-4)
        for e in range(exits + 1):
            assert (answers[f"forced_{e}/one/exit"] == e).all()
            assert np.allclose(answers[f"forced_{e}/one/probabilities"], expected[e], atol=1e-4)
        streamed = answers["stream/one/probabilities"].reshape(len(images), exits, -1)
        assert np.allclose(streamed.transpose(1, 0, 2), expected[:exits], atol=1e-4)


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
