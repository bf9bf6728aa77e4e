"""docs/device.md does what it says."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image
from toys import ROOT

from edgeke.device import cli
from edgeke.device.profile import Profile

DOCUMENT = (ROOT / "docs" / "device.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


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


def test_the_commands_run(here, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    ran = [line for line in commands if line.startswith("python -m edgeke.device ")]
    assert len(ran) == 8
    for line in ran:
        arguments = shlex.split(line, comments=True)[3:]
        places = {".": "models", "~/photo.png": "photo.png", "20": "1e6"}
        assert cli.main([places.get(argument, argument) for argument in arguments]) == 0, line
    assert capsys.readouterr().err == ""
