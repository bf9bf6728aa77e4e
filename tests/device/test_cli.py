import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image
from toys import CLASSES, ROOT, SIZE, replace

from edgeke.device import cli
from edgeke.device.classifier import Classifier
from edgeke.device.policy import RequirementResult
from edgeke.errors import InputError, escaped


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
    expected = {"image", "label", "class", "probability", "exit", "point", "promised", "latency_ms"}
    assert set(row) == expected


def test_predict_keeps_the_state_of_shift_over_many_calls(bundle, tmp_path, run):
    np.save(tmp_path / "dark.npy", np.zeros((SIZE, SIZE, 1), np.uint8))
    dark, state = [tmp_path / "dark.npy"] * 60, tmp_path / "shift.json"
    for _ in range(3):
        code, out, _ = run("predict", bundle, *dark, "--shift-state", state)
        assert code == 0
    assert "nothing is promised: images do not come as in calibration" in out.splitlines()[-1]
    assert json.loads(state.read_text())["images"] == 180
    _, out, _ = run("predict", bundle, dark[0], "--json", "--shift-state", state)
    assert json.loads(out)["promised"] is False


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


def test_ctrl_c_in_a_real_process_is_one_line(bundle, tmp_path):
    """While it measures; and while numpy is imported, which takes a slow device seconds."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "numpy.py").write_text("print('ready', flush=True); input()")
    for path, line in ((str(tmp_path / "slow"), "ready"), ("", "")):
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        arguments = [
            sys.executable,
            "-m",
            "edgeke.device",
            "profile",
            bundle,
            "--rounds",
            "10000000",
        ]
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if line:
            assert process.stdout.readline().strip() == line
        else:
            time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "stopped\n")
        assert process.returncode == 130
    assert [file.name for file in bundle.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(
    "words", ["\x1b[2J\x1b]0;owned\x07", "up\nerror: none", "a\u202eb", "c\x9bd"]
)
def test_names_in_a_model_cannot_command_the_terminal(bundle, images, tmp_path, run, words):
    model = onnx.load(bundle / "edgeke.onnx")
    carried = {prop.key: prop.value for prop in model.metadata_props}
    carried["classes"] = json.dumps([words, words, words])
    policy = json.loads(carried["policy"])
    old, policy["default"] = policy["default"], words
    for point in policy["points"]:
        point["name"] = words if point["name"] == old else point["name"]
    for result in policy["requirements"]:
        result["point"] = words if result["point"] == old else result["point"]
    helper.set_model_props(model, {**carried, "policy": json.dumps(policy)})
    onnx.save(model, bundle / "edgeke.onnx")
    np.save(tmp_path / "a.npy", images[0])
    dangerous = [character for character in words if not character.isprintable()]
    for arguments in (
        ["info"],
        ["predict", tmp_path / "a.npy"],
        ["predict", tmp_path / "a.npy", "--json"],
    ):
        name, *rest = arguments
        code, out, error = run(name, bundle, *rest)
        assert (code, error) == (0, "")
        assert not any(character in out for character in dangerous if character != "\n")
        assert words not in out
    del policy["points"][0]["votes"]
    policy["default"] = words + "!"
    helper.set_model_props(model, {**carried, "policy": json.dumps({**policy, words: 1})})
    onnx.save(model, bundle / "edgeke.onnx")
    code, out, error = run("info", bundle)
    assert (code, out) == (1, "")
    assert not any(character in error for character in dangerous if character != "\n")


def test_other_languages_are_shown_as_they_are():
    for text in ("Čeština, 日本語　全角", "می\u200cخواهم", "👩\u200d🔧", "1\u00a0mm"):
        assert escaped(text) == text
        assert str(InputError(f"{text}\nnext line")) == f"{text}\nnext line"


def test_nothing_is_left_in_the_users_home(bundle, tmp_path):
    """ONNX Runtime would keep a device id there, and look up a telemetry host."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if key[:4] not in ("ORT_", "XDG_")}
    command("info", bundle, env={**kept, "HOME": str(home)}, stdout=subprocess.DEVNULL)
    assert list(home.rglob("*")) == []
