"""The model in MLflow: stored once, servable without torch, and what it says to bad requests."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from bundles import build
from toys import SIZE, replace

from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.tracking import store as stores
from edgeke.tracking.models import MODEL, model_name
from edgeke.tracking.runs import stage_run

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


@pytest.fixture(scope="module")
def models(architecture, dataset, tmp_path_factory) -> Path:
    """A folder of models as the stages leave it: fp32 and int8."""
    from toys import randomise

    folder = tmp_path_factory.mktemp("models")
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    coarse = quantise_segments(segments, channels_last(dataset["train"].images))
    build(folder, segments, "margin", "", dataset)
    return build(folder, coarse, "margin", ".int8", dataset)


def client():
    from mlflow import MlflowClient

    return MlflowClient(stores.store_uri(stores.project_root()))


def logged(models: Path, params) -> str:
    """The tag that a pipeline state's parent gets."""
    with stage_run("evaluate", params) as run:
        run.model(models)
        parent = run.outbox.address.parent
    return client().get_run(parent).data.tags[MODEL]


def test_the_int8_file_is_registered_below_its_profile(here, loaded, models):
    tag = logged(models, loaded)
    name = model_name(loaded)
    assert tag == f"{name}/1"
    assert name.endswith("-digits")
    version = client().get_model_version(name, "1")
    assert version.tags["edgeke.precision"] == "int8"
    folder = stored(name)
    copy = folder / "artifacts" / "edgeke.int8.onnx"
    assert copy.read_bytes() == (models / "edgeke.int8.onnx").read_bytes()
    described = (folder / "MLmodel").read_text()
    assert "loader_module: mlflow.pyfunc.loaders.code_model" in described
    assert f'shape": [-1, {SIZE}, {SIZE}, 1]' in " ".join(described.split())
    assert "input_example.json" in described
    assert not list(folder.rglob("*.pkl"))
    assert "torch" not in (folder / "requirements.txt").read_text()


def test_logging_a_model_leaves_mlflow_s_global_state_alone(here, loaded, models, monkeypatch):
    import mlflow

    before = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    logged(models, loaded)
    left = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    new = {key for key in left if left[key] != before.get(key)}
    assert not new & {"MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert mlflow.get_tracking_uri() == "http://elsewhere"


def stored(name: str) -> Path:
    version = client().search_model_versions(f"name = '{name}'")[0]
    from mlflow.artifacts import download_artifacts

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", stores.store_uri(stores.project_root()))
        return Path(download_artifacts(f"models:/{name}/{version.version}"))


def test_the_same_file_is_stored_once_and_another_is_a_new_version(here, store, loaded, models):
    other = replace(loaded, kd=replace(loaded.kd, beta=0.25))
    name = model_name(loaded)
    assert [logged(models, loaded), logged(models, other)] == [f"{name}/1", f"{name}/1"]
    changed = here / "models"
    changed.mkdir()
    shutil.copy(models / "edgeke.onnx", changed)
    assert logged(changed, loaded) == f"{name}/2"
    assert client().get_model_version(name, "2").tags["edgeke.precision"] == "fp32"
    kept = client().search_model_versions(f"name = '{name}'")
    assert len({version.source for version in kept}) == 2


def test_a_model_that_cannot_be_logged_costs_no_evaluation(here, loaded, models, capsys):
    with stage_run("evaluate", loaded) as run:
        run.model(here / "nowhere")
        run.headline({"test/default/accuracy": 0.5})
        parent = run.outbox.address.parent
    assert "the model was not logged" in capsys.readouterr().err
    assert client().get_run(parent).data.metrics == {"test/default/accuracy": 0.5}


WITHOUT = """
import builtins, runpy, sys
real = builtins.__import__
def guard(name, *rest, **more):
    if name.split(".")[0] in ("torch", "dvc", "scipy", "onnx", "sklearn"):
        raise ModuleNotFoundError(name)
    return real(name, *rest, **more)
builtins.__import__ = guard
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
print(model.predict(np.zeros((1, 8, 8, 1), np.uint8)).to_json(orient="records"))
import edgeke
print(edgeke.__file__)
"""


def test_the_model_loads_where_no_torch_and_no_project_is(here, loaded, models):
    logged(models, loaded)
    folder = stored(model_name(loaded))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, where = done.stdout.splitlines()[-2:]
    assert set(json.loads(answer)[0]) == {"label", "class_name", "confidence", "exit"}
    assert Path(where).is_relative_to(folder)


def ask(port: int, body: object) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_mlflow_serves_it(here, loaded, models, dataset):
    logged(models, loaded)
    name = model_name(loaded)
    client().set_registered_model_alias(name, "champion", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", f"models:/{name}@champion"]
    log = here / "server.log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MLFLOW_TRACKING_URI"] = stores.store_uri(stores.project_root())
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*command, "--env-manager", "local", "-p", str(port)],
            env=environment, stdout=out, stderr=out, start_new_session=True,
        ) as server,
    ):  # fmt: skip
        try:
            wait(port, server, log)
            images = channels_last(dataset["test"].images)[:5]
            status, answer = ask(port, {"inputs": images.tolist()})
            assert status == 200, answer
            own = [Classifier(models).predict(image) for image in images]
            for row, expected in zip(answer["predictions"], own, strict=True):
                assert row["label"] == expected.label
                assert row["class_name"] == expected.class_name
                assert row["exit"] == expected.exit
                assert row["confidence"] == pytest.approx(float(expected.probabilities.max()))
            # Requirements travel as parameters; one that nobody can meet is said in words.
            body = {"inputs": images.tolist(), "params": {"min_accuracy": 0.9999}}
            status, answer = ask(port, body)
            assert status == 400
            assert "min_accuracy" in answer["message"]
            assert "Traceback" not in answer["message"]
            status, answer = ask(port, {"inputs": [[[[0]]]]})
            assert status == 400
        finally:
            os.killpg(server.pid, 15)


def wait(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping").close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(log.read_text()[-3000:])
