"""Hand-made runs, a store with real ones, and a browser without a network."""

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from toys import ROOT, replace

from edgeke import params
from edgeke.compare.rows import PipelineRun
from edgeke.tracking.runs import stage_run
from edgeke.tracking.store import project_root, store_uri

ASKED = "max_degradation_0.03_delta_0.1"


@pytest.fixture
def make_run() -> Callable[..., PipelineRun]:
    """A finished run with two exits and one requirement; parameters come with `__` for dots."""
    made = 0

    def make(
        accuracy: float = 0.9,
        seed: int | str = 0,
        metrics: dict[str, float] | None = None,
        status: str = "FINISHED",
        machine: str = "host",
        commit: str = "abc",
        **changes: str,
    ) -> PipelineRun:
        nonlocal made
        made += 1
        settings = {
            "profile": "digits",
            "kd.distance": "kl",
            "kd.beta": "0.5",
            "branchynet.order": "asynchronous",
            "calibrate.requirements": ASKED,
            "data.validation": "180",
            "evaluate.tiers": "one_thread:1:None, quarter_core:1:0.25",
            "seed": str(seed),
        }
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        given = headline(accuracy) if metrics is None else metrics
        name = f"run {made}"
        return PipelineRun(f"id{made}", name, status, made, settings, given, machine, commit)

    return make


def headline(accuracy: float) -> dict[str, float]:
    return {
        "validation/exit_0/accuracy": accuracy - 0.1,
        "validation/exit_1/accuracy": accuracy,
        "validation/default/accuracy": accuracy,
        "validation/default/cost_share": 0.8,
        f"validation/{ASKED}/accuracy": accuracy,
        f"validation/{ASKED}/cost_share": 0.8,
        f"calibration/{ASKED}/met": 1.0,
        "test/exit_0/accuracy": accuracy,
        "test/default/accuracy": accuracy - 0.05,
        "test/default/latency_ms_mean": 0.125,
        "test/int8/default/latency_ms_mean": 2.5,
    }


@pytest.fixture
def here(here: Path, request) -> Path:
    """The working folder, with a params.yaml that names an experiment of the test's own."""
    content = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    content["tracking"]["experiment"] = request.node.name
    (here / "params.yaml").write_text(yaml.safe_dump(content))
    return here


@pytest.fixture
def client(here: Path):
    """A client of the store of `here`."""
    from mlflow import MlflowClient

    return MlflowClient(store_uri(project_root()))


@pytest.fixture
def log_run(here: Path) -> Callable[..., None]:
    """Log a run as the pipeline does: the stages `download` and `evaluate`."""

    def log(accuracy: float, seed: int = 0, distance: str = "kl") -> None:
        loaded = params.load()
        chosen = replace(loaded, seed=seed, kd=replace(loaded.kd, distance=distance))
        with stage_run("download", chosen):
            pass
        with stage_run("evaluate", chosen) as run:
            run.headline(headline(accuracy))

    return log


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Open a file in headless Chromium, which finds no host: `--dump-dom`, `--screenshot=...`."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian: chromium)")

    def open_file(page: Path, *what: str) -> subprocess.CompletedProcess[str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1400,1600"]
        flags += ["--virtual-time-budget=25000", "--host-resolver-rules=MAP * ~NOTFOUND"]
        flags += ["--enable-logging=stderr", *what, page.resolve().as_uri()]
        return subprocess.run(
            [chromium, *flags], capture_output=True, text=True, check=True, timeout=120
        )

    return open_file
