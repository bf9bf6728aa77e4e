import json
import shutil

import numpy as np
import pytest
from PIL import Image
from toys import CLASSES

from edgeke.device import cli
from edgeke.device.classifier import Classifier


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
    assert "uint8 [8, 8, 1]" in out
    assert "not measured here yet" in out
    assert all(name in out for name in ("full", "proportions", "default"))
    _, out, _ = run("info", bundle / "edgeke.onnx")
    assert "none: no stream" in out


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
    code, out, error = run("predict", bundle, tmp_path / "none.npy")
    assert (code, out) == (1, "")
    assert error == f"error: {tmp_path / 'none.npy'} is missing\n"
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", str(bundle)])
    assert caught.value.code == 2
