"""docs/device.md does what it says."""

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import build
from frames import as_nv12, as_yuyv
from PIL import Image
from sklearn.datasets import load_sample_image
from toys import CLASSES, ROOT, SIZE, randomise, replace

from edgeke.device import cli
from edgeke.device.classifier import Classifier
from edgeke.device.decode import read_image
from edgeke.device.profile import Profile
from edgeke.graph.segments import export_segments
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout

DOCUMENT = (ROOT / "docs" / "device.md").read_text()


CAMERA = DOCUMENT.split("\n## Pixels from a camera")[1].split("\n## ")[0]


def blocks(language: str, text: str = DOCUMENT.replace(CAMERA, "")) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def here(bundle, images, tmp_path, monkeypatch):
    """A working directory with models/ and the images that the document speaks of."""
    bundle.rename(tmp_path / "models")
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "photo.png")
    np.save(tmp_path / "pixels.npy", images[1])
    monkeypatch.chdir(tmp_path)


def test_the_python_runs(here, monkeypatch, capsys):
    costs = Profile((1.0, 2.0, 4.0), (2.0, 4.0, 8.0), 20)
    monkeypatch.setattr("edgeke.device.classifier.measure_costs", lambda *arguments: costs)
    found: dict[str, object] = {}
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"docs/device.md, block {number}", "exec"), found)
    out = capsys.readouterr().out
    assert "nearest attainable is" in out
    assert str(costs.median_ms) in out
    assert "from exit" in out


def test_the_recipes_for_cameras_give_the_pipelines_pixels(dataset, tmp_path, monkeypatch, capsys):
    """On a colour model; what a camera gives is the same photograph."""
    splits = {
        name: replace(split, images=split.images.repeat(3, axis=1))
        for name, split in dataset.splits.items()
    }
    coloured = replace(dataset, splits=splits)
    architecture = with_layout("edgeke", Backbone("resnet10", 3, len(CLASSES), SIZE, 4))
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean * 3, dataset.std * 3, SIZE)
    build(tmp_path / "models", segments, "margin", "", coloured)
    monkeypatch.chdir(tmp_path)
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((1280, 720))
    photo.save("photo.png")
    pixels = np.asarray(photo)
    as_nv12(pixels).tofile("frame.nv12")
    as_yuyv(pixels).tofile("frame.yuyv")
    camera = types.SimpleNamespace(read=lambda: (True, pixels[..., ::-1]))
    stub = types.SimpleNamespace(VideoCapture=lambda number: camera)
    monkeypatch.setitem(sys.modules, "cv2", stub)
    found: dict[str, Any] = {"numpy": np, "Classifier": Classifier}
    found["classifier"] = classifier = Classifier("models")
    expected = read_image(Path("photo.png"), classifier.image_shape).astype(int)
    offs = []
    for code in blocks("python", CAMERA):
        exec(code, found)
        pixels = np.asarray(found["pixels"])
        offs.append(np.abs((pixels[..., ::-1] if "bgr" in code else pixels) - expected).mean())
    assert offs[0] == 0
    assert offs[1] < 0.01
    assert max(offs[2:]) < 1.2
    assert len(offs) == 4
    label = classifier.predict(expected.astype(np.uint8)).class_name
    assert capsys.readouterr().out.split()[:2] == [label, label]


def test_the_commands_run(here, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    ran = [line for line in commands if line.startswith("python -m edgeke.device ")]
    assert len(ran) == 8
    for line in ran:
        arguments = shlex.split(line, comments=True)[3:]
        places = {".": "models", "~/photo.png": "photo.png", "20": "1e6"}
        assert cli.main([places.get(argument, argument) for argument in arguments]) == 0, line
    assert capsys.readouterr().err == ""
