"""Promotion: only what is certified and equals the network; test numbers decide nothing."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from toys import ROOT

from edgeke import promote as module
from edgeke.promote import Candidate, objections

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")

GOOD = Candidate(
    "run",
    "edgeke-digits",
    "2",
    "int8",
    {
        "calibration/int8/max_degradation_0.03/met": 1.0,
        "calibration/int8/max_cost_0.9/met": 1.0,
        "calibration/max_cost_0.9/met": 0.0,  # of fp32, which is not what is served
        "test/int8/default/accuracy": 0.0,
    },
    {"train/exit_0/parity_difference": 1e-6},
    1e-4,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"metrics": {**GOOD.metrics, "calibration/int8/max_cost_0.9/met": 0.0}}, ["max_cost_0.9"]),
        ({"metrics": {}}, ["nothing was asked"]),
        ({"parity": {}}, ["no parity check"]),
        ({"parity": {"train/main/parity_difference": 2e-4}}, ["train/main", "2.0e-04"]),
        ({"parity": {"train/main/parity_difference": float("nan")}}, ["train/main"]),
        ({"precision": "fp32"}, ["max_cost_0.9"]),
    ],
)
def test_what_speaks_against_a_model(changes, words):
    found = objections(dataclasses.replace(GOOD, **changes))
    assert len(found) == len(words[:1])
    for word in words:
        assert word in found[0]


@pytest.fixture(scope="module")
def store(empty_store, tmp_path_factory) -> Path:
    """A repository with two runs, each with a registered version, and one without."""
    root = tmp_path_factory.mktemp("repository")
    (root / "mlflow").mkdir()
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    shutil.copy(empty_store, root / "mlflow")
    from mlflow.entities import Metric, Param

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow' / 'mlflow.db'}")
    experiment = client.create_experiment("edgeke")
    client.create_registered_model("edgeke-digits")
    for number, (name, met) in enumerate((("good", 1.0), ("bad", 0.0), ("unfinished", None)), 1):
        tags = {"edgeke.state": name, "DVC_EXP_NAME": f"exp-{name}"}
        run = client.create_run(experiment, tags=tags, run_name=f"digits-{name}").info.run_id
        client.log_batch(run, params=[Param("export.parity_tolerance", "0.0001")])
        below = {"mlflow.parentRunId": run, "DVC_STAGE": "export"}
        export = client.create_run(experiment, tags=below, run_name="export").info.run_id
        client.log_metric(export, "train/exit_0/parity_difference", 1e-6)
        if met is None:
            continue
        values = {
            "calibration/int8/max_cost_0.9/met": met,
            "calibration/int8/default/accuracy": 0.97,
            "test/int8/default/accuracy": 0.9 if name == "good" else 1.0,
        }
        client.log_batch(run, [Metric(key, value, 0, 0) for key, value in values.items()])
        version = client.create_model_version("edgeke-digits", f"file:///{name}", run)
        client.set_model_version_tag("edgeke-digits", version.version, "edgeke.precision", "int8")
        client.set_tag(run, "edgeke.model", f"edgeke-digits/{number}")
    return root


@pytest.fixture(autouse=True)
def _here(store, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(store)


def aliases(store: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}")
    found = client.get_registered_model("edgeke-digits").aliases
    return {alias: str(version) for alias, version in found.items()}


def test_a_certified_model_gets_the_alias_and_test_stands_beside(store, capsys):
    assert module.main(["exp-good", "--alias", "challenger"]) == 0
    out = capsys.readouterr().out
    assert aliases(store)["challenger"] == "1"
    assert "test        accuracy 0.9000   (shown, decides nothing)" in out
    assert "models:/edgeke-digits@challenger" in out
    assert module.main(["digits-good", "--alias", "challenger"]) == 0
    assert "before: version 1" in capsys.readouterr().out


def test_one_that_is_better_on_test_but_not_certified_gets_none(store, capsys):
    assert module.main(["digits-bad"]) == 1
    assert "max_cost_0.9 is not certified" in capsys.readouterr().err
    assert "champion" not in aliases(store)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("nobody", "no run is called 'nobody'; `make compare` lists them"),
        ("digits-unfinished", "has no registered model"),
    ],
)
def test_runs_that_cannot_be_promoted_say_why(wanted, words, capsys):
    assert module.main([wanted]) == 1
    assert words in capsys.readouterr().err


def test_an_ambiguous_name_asks_for_an_id(store, capsys):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("edgeke").experiment_id
    twins = [
        client.create_run(experiment, tags={"edgeke.state": "twin"}, run_name="twin").info.run_id
        for _ in range(2)
    ]
    assert module.main(["twin"]) == 1
    told = capsys.readouterr().err
    assert "2 runs are called 'twin'" in told
    assert all(run[:8] in told for run in twins)
    assert module.main([twins[0][:12]]) == 1  # found, but has no model
    assert "twin has no registered model" in capsys.readouterr().err
