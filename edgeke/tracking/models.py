"""The one-file model in MLflow: logged once per content, registered, and what was asked of it."""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from edgeke.bundle import copy_device_package
from edgeke.device.bundle import PRECISIONS
from edgeke.device.classifier import Classifier
from edgeke.params import Params
from edgeke.tracking.outbox import Address
from edgeke.tracking.store import locked, project_root

__all__ = ["MODEL", "PRECISION", "log_model", "model_name"]

MODEL = "edgeke.model"  # tag of a parent run: `<registered model>/<version>`
PRECISION = "edgeke.precision"  # tag of a version: int8 or fp32
_CONTENT = "edgeke.sha256"  # tag of a version
_GLOBAL = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")  # what MLflow's functions set
_REQUIREMENTS = ("min_accuracy", "max_degradation", "mean_latency_ms", "deadline_ms")


def model_name(params: Params) -> str:
    """The registered model of an experiment and profile: versions of one can replace each other."""
    return f"{params.tracking.experiment}-{params.profile_name}"


def log_model(address: Address, models: Path, params: Params) -> str:
    """Log and register the one file (int8 where there is one); returns `<name>/<version>`.

    A file that is registered already is not stored again. The parent's tag `edgeke.model` names it.
    Errors: whatever MLflow raises.
    """
    from mlflow import MlflowClient

    there = [of for of, name in PRECISIONS.items() if (models / name).is_file()]
    file = models / PRECISIONS[there[0]]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    client, name = MlflowClient(address.uri), model_name(params)
    assert address.parent is not None
    with locked(project_root()):
        found = client.search_model_versions(f"name = '{name}' and tags.`{_CONTENT}` = '{digest}'")
        number = found[0].version if found else _register(address, file, name)
        if not found:
            client.set_model_version_tag(name, number, _CONTENT, digest)
            client.set_model_version_tag(name, number, PRECISION, there[0])
    client.set_tag(address.parent, MODEL, f"{name}/{number}")
    return f"{name}/{number}"


def _register(address: Address, file: Path, name: str) -> str:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    import mlflow

    shape = Classifier(file).image_shape
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))]),
        Schema(
            [
                ColSpec("long", "label"),
                ColSpec("string", "class_name"),
                ColSpec("double", "confidence"),
                ColSpec("long", "exit"),
            ]
        ),
        ParamSchema([ParamSpec(of, "double", None) for of in _REQUIREMENTS]),
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True),  # advice about type hints
        _globally(address),
    ):
        logged = mlflow.models.Model.log(
            artifact_path=None,
            name="edgeke",
            flavor=mlflow.pyfunc,
            run_id=address.parent,
            registered_model_name=name,
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"onnx": str(file)},
            code_paths=[str(copy_device_package(Path(folder)))],
            pip_requirements=[f"{of}=={version(of)}" for of in ("mlflow", "numpy", "onnxruntime")],
            signature=signature,
            input_example=np.zeros((1, *shape), np.uint8),
        )
    return str(logged.registered_model_version)


@contextlib.contextmanager
def _globally(address: Address) -> Iterator[None]:
    """MLflow's global state set to the run's store and experiment: no client can log a model."""
    import mlflow

    before = {name: os.environ.get(name) for name in _GLOBAL}
    mlflow.set_tracking_uri(address.uri)
    try:
        run = mlflow.MlflowClient(address.uri).get_run(str(address.parent))
        mlflow.set_experiment(experiment_id=run.info.experiment_id)
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # as it was: the environment decides
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
