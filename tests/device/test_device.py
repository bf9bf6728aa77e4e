import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from toys import ROOT, replace

from edgeke.device.measure import peak_memory
from edgeke.device.policy import (
    Answer,
    OperatingPoint,
    Policy,
    Promise,
    force_exit,
    parse_policy,
    read_policy,
)
from edgeke.device.session import open_session
from edgeke.errors import InputError

POINT = OperatingPoint(
    name="full",
    thresholds=(2.0, -1.0),
    votes=(0.4, 0.6),
    shares=(0.0, 1.0),
    reach_upper=(1.0, 1.0),
    voted=0.0,
    validation_accuracy=0.92,
    accuracy=0.9,
    accuracy_interval=(0.8, 0.95),
    degradation=0.0,
    promises=(Promise("max_error", 0.15, 0.1, 1),),
)
ANSWER = Answer("max_cost_0.9", "max_cost", 0.9, 0.1, "full", None)
POLICY = Policy(
    score="learned",
    score_weights=((0.1, 2.0), (0.2, 1.0, -1.0)),
    temperatures=(1.0, 1.5),
    macs=(10, 20),
    main_macs=18,
    samples=100,
    delta=0.1,
    points=(POINT,),
    requirements=(ANSWER,),
    default="full",
)


def changed(**changes: object) -> str:
    return json.dumps({**POLICY.to_json(), **changes})


def test_policy_round_trip():
    assert parse_policy(json.dumps(POLICY.to_json())) == POLICY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "not an EdgeKE policy"),
        ("{}", "not an EdgeKE policy"),
        ("[]", "not an EdgeKE policy"),
        (changed(schema=99), "policy schema 99 is not 2"),
        (changed(surprise=1), "incomplete"),
        (changed(points=[]), "contradicts itself"),
        (changed(macs=[20, 10]), "contradicts itself"),
        (changed(macs=[10]), "contradicts itself"),
        (changed(temperatures=[1.0, 0.0]), "contradicts itself"),
        (changed(samples=0), "contradicts itself"),
        (changed(score_weights=[[0.1, 2.0]]), "contradicts itself"),
        (changed(requirements=[{**asdict(ANSWER), "point": "fast"}]), "contradicts itself"),
        (changed(requirements=[{}]), "incomplete"),
        (changed(default="fast"), "no operating point 'fast'; use one of full"),
        (changed(points=[{**POLICY.to_json()["points"][0], "votes": [1.0]}]), "contradicts"),
        (changed(points=[{**POLICY.to_json()["points"][0], "thresholds": [None, 1]}]), "contrad"),
    ],
)
def test_a_broken_policy_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_policy(text)


def test_a_policy_file_is_read_or_named(tmp_path: Path):
    (tmp_path / "policy.json").write_text(json.dumps(POLICY.to_json()))
    assert read_policy(tmp_path / "policy.json") == POLICY
    with pytest.raises(InputError, match=r"other\.json is missing"):
        read_policy(tmp_path / "other.json")


def test_a_policy_names_its_points():
    assert POLICY.point("full") is POINT
    with pytest.raises(InputError, match="use one of full, other"):
        replace(POLICY, points=(POINT, replace(POINT, name="other"))).point("none")


def test_forcing_thresholds():
    assert force_exit(1, 3) == (2.0, -1.0, 2.0)
    assert force_exit(3, 3) == (2.0, 2.0, 2.0)


def test_a_missing_or_broken_model_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="missing"):
        open_session(tmp_path / "edgeke.onnx")
    (tmp_path / "edgeke.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"edgeke\.onnx is truncated or not an ONNX model"):
        open_session(tmp_path / "edgeke.onnx")


def test_peak_memory_is_this_processs_own():
    code = (
        "from edgeke.device.measure import peak_memory as p; a = p(); b = bytearray(200 << 20);"
        "print(a, p())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, after = map(float, done.stdout.split())
    assert 150 < after - before < 260
    assert peak_memory() > 0


def test_the_device_room_needs_numpy_and_onnxruntime_only():
    code = (
        "import sys, pkgutil, importlib, edgeke.device as d\n"
        "for m in pkgutil.iter_modules(d.__path__, 'edgeke.device.'):\n"
        "    importlib.import_module(m.name)\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert {"numpy", "onnxruntime", "edgeke"} <= loaded
    assert not loaded & {
        "torch",
        "scipy",
        "onnx",
        "mlflow",
        "yaml",
        "PIL",
        "safetensors",
        "sklearn",
    }
