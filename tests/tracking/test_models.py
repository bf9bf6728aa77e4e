"""The model in MLflow: stored once, servable without torch, and what it says to bad requests."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import replace

from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.files import read_json
from edgeke.tracking import models as model_tracking
from edgeke.tracking import state
from edgeke.tracking.__main__ import main
from edgeke.tracking.models import MODEL, promotion_tags
from edgeke.tracking.store import connected, store_uri

from .conftest import HEADLINE, run_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


@pytest.fixture
def evaluated(repository: Path, models: Path) -> Path:
    """The models of a workspace, before its stages ran."""
    return Path(shutil.copytree(models, repository / "models"))


def version(experiment, number: int = 1):
    return experiment.client.get_model_version(f"{experiment.name}-digits", str(number))


def stored(experiment) -> Path:
    """The files that MLflow keeps of version 1."""
    from mlflow.artifacts import download_artifacts

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", store_uri())
        return Path(download_artifacts(f"models:/{experiment.name}-digits/1"))


def test_the_int8_file_is_registered_with_what_promotion_needs(evaluated, loaded, experiment):
    before = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    run_pipeline(loaded)
    left = {key for key, value in os.environ.items() if before.get(key) != value}
    assert not left & {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"}
    assert experiment.parents[0].data.tags[MODEL] == f"{experiment.name}-digits/1"
    tags = version(experiment).tags
    assert tags["edgeke.precision"] == "int8"
    assert tags["edgeke.objections"] == ""
    assert tags["edgeke.validation"] == "accuracy 0.9600, cost 0.7500"
    assert tags["edgeke.test"] == "accuracy 0.9500, cost nan"
    folder = stored(experiment)
    copy = folder / "artifacts" / "edgeke.int8.onnx"
    assert copy.read_bytes() == (evaluated / "edgeke.int8.onnx").read_bytes()
    assert not list(folder.rglob("*.pkl"))
    assert "torch" not in (folder / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"calibration/int8/max_cost_0.9/met": 0.0}, "max_cost_0.9 is not certified"),
        ({"calibration/int8/max_cost_0.9/met": None}, "nothing was required of it"),
        ({"validation/int8/composed/parity_difference": None}, "parity difference is None"),
        ({"validation/int8/composed/parity_difference": 2e-4}, "parity difference is 0.0002"),
    ],
)
def test_objections_are_those_of_the_file_that_is_registered(changes, objection):
    fp32 = {"calibration/max_cost_0.9/met": 1.0, "validation/composed/parity_difference": 0.0}
    values = {k: v for k, v in {**HEADLINE, **fp32, **changes}.items() if v is not None}
    record = SimpleNamespace(headline=values, params={"export.parity_tolerance": "0.0001"})
    assert objection in promotion_tags(record, "int8")["edgeke.objections"]
    assert promotion_tags(record, "fp32")["edgeke.objections"] == ""


def test_the_same_file_is_stored_once_and_another_is_a_new_version(evaluated, loaded, experiment):
    for beta in (0.5, 0.25):
        run_pipeline(replace(loaded, kd=replace(loaded.kd, beta=beta)))
    assert {run.data.tags[MODEL] for run in experiment.parents} == {f"{experiment.name}-digits/1"}
    (evaluated / "edgeke.int8.onnx").unlink()
    run_pipeline(loaded)
    assert version(experiment, 2).tags["edgeke.precision"] == "fp32"


def test_two_workers_that_register_one_file_at_once_make_one_version(
    evaluated, loaded, experiment, monkeypatch
):
    run_pipeline(loaded)
    record = state.Record(**read_json(Path("results/evaluate/run.json")))
    record.experiment = f"{experiment.name}-again"
    register = model_tracking._register

    def slowly(*arguments):
        time.sleep(1)
        return register(*arguments)

    monkeypatch.setattr(model_tracking, "_register", slowly)

    def log(_: int) -> None:
        with connected() as client:
            model_tracking.log_model(client, record, experiment.parents[0])

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(log, range(2)))
    found = experiment.client.search_model_versions(f"name = '{record.experiment}-digits'")
    assert len(found) == 1


def test_models_move_along_with_the_project(models, loaded, experiment, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    project = tmp_path / "before [1]"
    shutil.copytree(models, project / "models")
    (project / "results").mkdir()
    monkeypatch.chdir(project)
    run_pipeline(loaded)
    project = project.rename(tmp_path / "after, größer")
    monkeypatch.chdir(project)
    (project / "models" / "edgeke.int8.onnx").unlink()
    run_pipeline(loaded)  # registers version 2
    assert stored(experiment).is_relative_to(project)
    assert version(experiment, 2).source.startswith(project.as_uri())
    assert not (tmp_path / "before [1]").exists()
    (run,) = experiment.client.search_runs([experiment.runs[0].info.experiment_id], max_results=1)
    assert run.info.artifact_uri.startswith(project.as_uri())


def test_a_model_that_could_not_be_registered_is_by_resend(
    evaluated, loaded, experiment, capsys, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr("edgeke.tracking.models._register", lambda *_: 1 / 0)
        run_pipeline(loaded)
    assert "(division by zero)" in capsys.readouterr().err
    (parent,) = experiment.parents
    assert "test/int8/default/accuracy" in parent.data.metrics
    file = evaluated / "edgeke.int8.onnx"
    content = file.read_bytes()
    file.write_bytes(b"another model, trained meanwhile")
    assert main() == 1
    assert "does not hold the file that was evaluated" in capsys.readouterr().err
    file.write_bytes(content)
    assert main() == 0
    assert experiment.parents[0].data.tags[MODEL] == f"{experiment.name}-digits/1"


SERVE = """
import asyncio, builtins, json, sys
real = builtins.__import__
def guard(name, *rest, **more):
    if name.split(".")[0] in ("torch", "dvc", "scipy", "onnx", "sklearn"):
        raise ModuleNotFoundError(name)
    return real(name, *rest, **more)
builtins.__import__ = guard
import mlflow
from mlflow.pyfunc import scoring_server
app = scoring_server.init(mlflow.pyfunc.load_model(sys.argv[1]))
async def post(body):
    sent = []
    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode()}
    async def send(message):
        sent.append(message)
    head = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": head,
             "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 80)}
    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(part.get("body", b"") for part in sent[1:]))
async def post_all():
    return [await post(body) for body in json.load(sys.stdin)]
answers = asyncio.run(post_all())
import edgeke
print(json.dumps([edgeke.__file__, answers]))
"""


def test_it_is_served_without_torch_and_refuses_what_mlflow_would_drop_or_cast(
    evaluated, loaded, experiment, dataset
):
    """Through the app that `mlflow models serve` runs, in a process without our repository."""
    run_pipeline(loaded)
    images = channels_last(dataset["test"].images)[:5]
    image = images[0].tolist()
    bodies = [
        ({"inputs": images.tolist()}, None),
        ({"inputs": [image], "params": {"min_accuracy": 0.9999}}, "min_accuracy"),
        ({"inputs": [image], "params": {"min_accuracy": 0.1, "delta": 2.0}}, "delta"),
        ({"inputs": (images / 255).tolist()}, "uint8"),
        ({"inputs": (images + 0.0).tolist()}, "uint8"),
        ({"inputs": [[[[300]] * 8] * 8]}, "uint8"),
        ({"inputs": [[[[0]]]]}, "[8, 8, 1]"),
        ({"inputs": {"image": [image]}}, "must be a list"),
        ({"inputs": [image], "params": {"max_los": 0.5}}, "unknown parameter max_los; use"),
        ({"inputs": [image], "parms": {"min_accuracy": 0.5}}, "unknown field parms; use"),
        ({"inputs": [image], "params": {"min_accuracy": "0.5"}}, "min_accuracy"),
    ]
    folder = stored(experiment)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder)],
        input=json.dumps([body for body, _ in bodies]),
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, answers = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(folder)
    status, first = answers[0]
    assert status == 200, first
    own = [Classifier(evaluated).predict(image) for image in images]
    for row, expected in zip(first["predictions"], own, strict=True):
        assert (row["label"], row["class_name"]) == (expected.label, expected.class_name)
        assert row["exit"] == expected.exit
        assert row["confidence"] == pytest.approx(float(expected.probabilities.max()))
    for (body, words), (status, answer) in zip(bodies[1:], answers[1:], strict=True):
        assert status == 400, body["params"]
        assert words in answer["message"].split("Error:")[-1], answer["message"][-300:]
        assert "Traceback" not in answer["message"]
