"""A store that is made once, working folders on it, and an experiment for every test."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from toys import ROOT

from edgeke import params


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A repository whose store is initialised once: creating it takes seconds."""
    root = tmp_path_factory.mktemp("repository")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    (root / "mlflow").mkdir()
    MlflowClient(f"sqlite:///{root / 'mlflow' / 'mlflow.db'}").search_experiments()
    return root


@pytest.fixture
def here(store: Path, tmp_path: Path, monkeypatch) -> Path:
    """An own working folder (as DVC gives queued runs) on the shared store."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(store))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(request) -> params.Params:
    """params.yaml, with an experiment of the test's own."""
    content = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    content["tracking"]["experiment"] = request.node.name
    return params.parse(content)
