import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import CLASSES, ROOT, replace

from edgeke.device import cli
from edgeke.device.classifier import Classifier
from edgeke.device.policy import RequirementResult


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code, output and errors."""

    def call(*arguments: object):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_info_tells_what_a_model_is(bundle, run):
    code, out, _ = run("info", bundle)
    assert code == 0
    assert "precision fp32" in out
    assert "3: down, left, up" in out
    assert "uint8 grey, 8 x 8 (height x width), [H, W, 1]" in out
    assert "not measured here yet" in out
    assert all(name in out for name in ("full", "proportions", "default"))
    _, out, _ = run("info", bundle / "edgeke.onnx")
    assert "none: no stream" in out


def test_info_says_which_requirements_are_not_met(bundle, run, monkeypatch):
    result = RequirementResult("min_accuracy_0.97", "min_accuracy", 0.97, 0.1, None, 0.9)
    policy = replace(Classifier(bundle).policy, requirements=(result,), default="full")
    monkeypatch.setattr("edgeke.device.bundle.parse_policy", lambda text: policy)
    _, out, _ = run("info", bundle)
    assert "default    full; min_accuracy_0.97 cannot be promised" in out


def test_profile_measures_and_is_shown(bundle, run):
    code, out, _ = run("profile", bundle, "--rounds", 3)
    assert code == 0
    assert "exit 2" in out
    measured = Classifier(bundle).measured
    assert measured.rounds == 3
    assert f"{measured.median_ms[0]:.3f}" in run("info", bundle)[1]


def test_predict_answers_every_image(bundle, images, tmp_path, run):
    np.save(tmp_path / "a.npy", images[0])
    Image.fromarray(images[1, :, :, 0]).save(tmp_path / "b.png")
    expected = Classifier(bundle).predict_batch(images[:2])
    code, out, _ = run("predict", bundle, tmp_path / "a.npy", tmp_path / "b.png")
    assert code == 0
    for line, answer in zip(out.splitlines(), expected, strict=True):
        left = f"exit {answer.exit}" if answer.exit < 3 else "the vote"
        assert f": {answer.class_name} (" in line
        assert left in line
    code, out, _ = run("predict", bundle, tmp_path / "b.png", "--json", "--max-degradation", 0.9)
    row = json.loads(out)
    assert row["class"] == CLASSES[row["label"]]
    assert set(row) == {"image", "label", "class", "probability", "exit", "point", "latency_ms"}


def test_requirements_reach_the_choice(bundle, images, tmp_path, run):
    np.save(tmp_path / "a.npy", images[0])
    Classifier(bundle).profile(rounds=1)
    for option, value in {
        "--mean-latency-ms": 1e-9,
        "--deadline-ms": 1e-9,
        "--min-accuracy": 0.9999,
        "--max-degradation": 0.00001,
    }.items():
        code, out, error = run("predict", bundle, tmp_path / "a.npy", option, value)
        assert (code, out) == (1, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_benchmark_ends_in_one_json_line(bundle, run):
    code, out, _ = run("benchmark", bundle, "--rounds", 2)
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    names = [f"exit_{e}" for e in range(3)] + [f"batch_exit_{e}" for e in range(3)] + ["stream"]
    assert set(result["milliseconds"]) == set(names)
    assert result["stream_over_full_path"] > 0
    shutil.rmtree(bundle / "segments")
    result = json.loads(run("benchmark", bundle, "--rounds", 2)[1].splitlines()[-1])
    assert set(result["milliseconds"]) == {"exit_0", "exit_1", "exit_2"}


def test_errors_are_one_line_and_exit_1(bundle, tmp_path, run):
    assert run("info", tmp_path / "none")[0] == 1
    code, out, error = run("benchmark", bundle, "--rounds", 0)
    assert (code, out, error) == (1, "", "error: rounds = 0 must be at least 1\n")
    code, out, error = run("predict", bundle, tmp_path / "none.npy", "--threads", 99999999999)
    assert (code, error.count("\n")) == (1, 1)
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", str(bundle)])
    assert caught.value.code == 2


def test_an_image_that_cannot_be_read_does_not_stop_the_others(bundle, images, tmp_path, run):
    for name in "ac":
        np.save(tmp_path / f"{name}.npy", images[0])
    code, out, error = run("predict", bundle, *(tmp_path / f"{name}.npy" for name in "abc"))
    assert code == 1
    assert [line.split(":")[0][-5:] for line in out.splitlines()] == ["a.npy", "c.npy"]
    assert error == f"error: {tmp_path / 'b.npy'} is missing\n"


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "edgeke.device", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, check=False, **options)


def test_names_that_the_terminal_cannot_show_are_escaped(bundle, images, tmp_path):
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.npy"))
    np.save(name, images[0])
    encoding = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = command("predict", bundle, name, env=encoding, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udcff.npy: " in done.stdout


def test_a_reader_that_has_read_enough_is_no_error(bundle):
    """As in `info . | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    assert command("info", bundle, stdout=writer).stderr == b""
    os.close(writer)


def test_ctrl_c_is_one_line(bundle, run, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "profile", interrupt)
    assert run("profile", bundle) == (130, "", "stopped\n")


def test_nothing_is_left_in_the_users_home(bundle, tmp_path):
    """ONNX Runtime would keep a device id there, and look up a telemetry host."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if key[:4] not in ("ORT_", "XDG_")}
    command("info", bundle, env={**kept, "HOME": str(home)}, stdout=subprocess.DEVNULL)
    assert list(home.rglob("*")) == []
