"""The one-file model in MLflow: stored once per content, registered, tagged for promotion."""

import contextlib
import hashlib
import inspect
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeke.bundle import copy_device_package
from edgeke.device.bundle import find_bundle
from edgeke.device.classifier import Classifier
from edgeke.errors import InputError
from edgeke.tracking.state import Record
from edgeke.tracking.store import locked

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mlflow import MlflowClient

MODEL = "edgeke.model"  # tag of a parent run: `<registered model>/<version>`
FILE = "edgeke.sha256"  # tag of a version and of a parent run: which file it is
OBJECTIONS = "edgeke.objections"  # tag of a version: why it may not be promoted; else empty
_MODELS = Path("models")


def digest(models: Path) -> str | None:
    """The SHA-256 of the one file that is shipped, int8 where there is one; None without any."""
    try:
        return hashlib.sha256(find_bundle(models).model.read_bytes()).hexdigest()
    except InputError:
        return None


def log_model(client: "MlflowClient", record: Record, parent: "Run") -> None:
    """Log and register the one file that the last stage measured, and tag version and parent.

    A file that is registered already is not stored again. Errors: InputError when models/ holds
    another file now; whatever MLflow raises.
    """
    if record.model is None or digest(_MODELS) != record.model:
        raise InputError(f"{_MODELS} does not hold the file that was evaluated: `dvc checkout` it")
    bundle = find_bundle(_MODELS)
    name = f"{record.experiment}-{record.tags['profile']}"  # its versions can replace each other
    with locked():  # of two workers with one file the second finds what the first registered
        same = client.search_model_versions(f"name = '{name}' and tags.`{FILE}` = '{record.model}'")
        number = str(same[0].version if same else _register(client, parent, bundle.model, name))
        client.set_model_version_tag(name, number, FILE, record.model)
    for key, value in promotion_tags(record, bundle.precision or "fp32").items():
        client.set_model_version_tag(name, number, key, str(value))
    for key, value in {MODEL: f"{name}/{number}", FILE: record.model}.items():
        client.set_tag(parent.info.run_id, key, value)


def promotion_tags(record: Record, precision: str) -> dict[str, str]:
    """What a promotion depends on and shows, of the very file that is registered.

    There is no objection where every requirement was certified and the file was checked against
    the network; `edgeke.<split>` are accuracy and cost at the default point.
    """
    prefix, metrics = "int8/" if precision == "int8" else "", record.headline
    certified = {
        match[1]: value == 1
        for key, value in metrics.items()
        if (match := re.fullmatch(rf"calibration/{prefix}([^/]+)/met", key))
    }
    objections = [f"{name} is not certified" for name, met in sorted(certified.items()) if not met]
    if not certified:
        objections.append("nothing was required of it (calibrate.requirements)")
    parity = metrics.get(f"validation/{prefix}composed/parity_difference")
    tolerance = float(record.params["export.parity_tolerance"])
    if parity is None or not parity <= tolerance:
        objections.append(f"its parity difference is {parity}, not at most {tolerance}")
    tags = {"edgeke.precision": precision, OBJECTIONS: "; ".join(objections)}
    for split in ("validation", "calibration", "test"):
        keys = [f"{split}/{prefix}default/{what}" for what in ("accuracy", "cost_share")]
        accuracy, cost = (metrics.get(key, float("nan")) for key in keys)
        tags[f"edgeke.{split}"] = f"accuracy {accuracy:.4f}, cost {cost:.4f}"
    return tags


def _register(client: "MlflowClient", parent: "Run", file: Path, name: str) -> str:
    """Store the model below its run and register it as the next version of `name`."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    import mlflow

    requirements = list(inspect.signature(Classifier.predict).parameters)[2:]
    of_class = ("max_miss", "min_recall")  # as text, such as crack=0.99
    parameters = ParamSchema(
        [ParamSpec(key, "string" if key in of_class else "double", None) for key in requirements]
    )
    # What is recorded, and not shown, is advice about type hints.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"onnx": str(file)},
            code_paths=[str(copy_device_package(Path(folder)))],
            pip_requirements=[
                f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime")
            ],
            # Without inputs: by a schema of uint8 MLflow would cast 0.7 to 0 and 300 to 44.
            signature=ModelSignature(params=parameters),
            input_example=np.zeros((1, *Classifier(file).image_shape), np.uint8),
        )
        run, experiment = parent.info.run_id, parent.info.experiment_id
        model = client.create_logged_model(experiment, "edgeke", source_run_id=run)
        client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.finalize_logged_model(model.model_id, "READY")
    with contextlib.suppress(MlflowException):  # it is there
        client.create_registered_model(name)
    # Not models:/<id>, which MLflow would look up in the store of its global state.
    source, model_id = model.artifact_location, model.model_id
    return str(client.create_model_version(name, source, run, model_id=model_id).version)
