"""A repository of the test's own experiment, what MLflow holds of it, and a finished pipeline."""

import re
from pathlib import Path

import pytest
import yaml
from bundles import build
from toys import ROOT, SIZE, randomise

from edgeke import params
from edgeke.data.dataset import channels_last
from edgeke.files import write_json, write_table
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.tracking.results import RESULTS
from edgeke.tracking.runs import stage_run
from edgeke.tracking.store import store_uri


class Experiment:
    """What MLflow holds of one experiment; it has none before the first run."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(store_uri())

    @property
    def runs(self) -> list:
        known = self.client.get_experiment_by_name(self.name)
        return self.client.search_runs([known.experiment_id]) if known else []

    @property
    def parents(self) -> list:
        return [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]

    @property
    def children(self) -> dict:
        """By stage; of several the newest."""
        below = [run for run in self.runs if "mlflow.parentRunId" in run.data.tags]
        return {run.data.tags["edgeke.stage"]: run for run in reversed(below)}

    def curve(self, stage: str, key: str = "train/loss") -> list[tuple[int, float]]:
        return sorted(self.history(self.children[stage], key))

    def history(self, run, key: str = "train/loss") -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, key)]

    def everything(self) -> dict:
        """All that is stored, to compare."""
        return {
            run.info.run_id: (
                run.info.status,
                run.info.end_time,
                run.data.params,
                run.data.tags,
                {key: self.history(run, key) for key in run.data.metrics},
            )
            for run in self.runs
        }


def write_params(folder: Path, experiment: str, on_failure: str = "fail") -> Path:
    """A folder whose runs land in an experiment."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["tracking"].update(experiment=experiment, on_failure=on_failure)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def experiment(request) -> Experiment:
    """An experiment of the test's own."""
    return Experiment(re.sub(r"\W+", "-", request.node.name))


@pytest.fixture
def loaded(experiment, tmp_path: Path) -> params.Params:
    """params.yaml, with that experiment."""
    return params.load(write_params(tmp_path, experiment.name) / "params.yaml")


@pytest.fixture
def repository(here: Path, loaded) -> Path:
    """The working folder, with that params.yaml."""
    return here


def run_stage(stage: str, loaded: params.Params, metrics=None, rows=(), headline=None) -> None:
    """A stage as stages/ run them: its epochs live, then its files in results/."""
    with stage_run(stage, loaded) as run:
        if headline:
            run.headline(headline)
            run.model(Path("models"))
        for row in rows:
            run.epoch(row["epoch"], {f"train/branch_{row['branch']}/loss": row["train/loss"]})
        if rows:
            write_table(RESULTS / stage / "history.csv", rows)
        write_json(RESULTS / stage / "metrics.json", metrics or {"m": 1.0})


ROWS = [
    {"branch": branch, "epoch": epoch, "train/loss": 1 / epoch + branch}
    for branch in (0, 1)
    for epoch in (1, 2, 3)
]
HEADLINE = {
    "validation/int8/default/accuracy": 0.96,
    "validation/int8/default/cost_share": 0.75,
    "validation/int8/composed/parity_difference": 1e-7,
    "calibration/int8/max_cost_0.9/met": 1.0,
    "test/int8/default/accuracy": 0.95,
}
EVALUATED = {"test/int8/default/accuracy": 0.95, "test/int8/edgeke/load_ms": 5.0}


def run_pipeline(loaded: params.Params, headline=HEADLINE) -> None:
    """A pipeline in short: a stage that trains two branches, two that measure."""
    run_stage("distill", loaded, {"validation/branch_0/accuracy": 0.5}, ROWS)
    run_stage("calibrate", loaded)
    run_stage("evaluate", loaded, EVALUATED, headline=headline)


def check_curves(experiment: Experiment) -> None:
    """The two curves of `ROWS` are there, each point once."""
    for branch in (0, 1):
        expected = [(row["epoch"], row["train/loss"]) for row in ROWS if row["branch"] == branch]
        assert experiment.curve("distill", f"train/branch_{branch}/loss") == expected


@pytest.fixture(scope="session")
def models(architecture, dataset, tmp_path_factory) -> Path:
    """A folder of models as the stages leave it: fp32 and int8."""
    folder = tmp_path_factory.mktemp("models")
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    coarse = quantise_segments(segments, channels_last(dataset["train"].images))
    build(folder, segments, "margin", "", dataset)
    return build(folder, coarse, "margin", ".int8", dataset)
