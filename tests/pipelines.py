"""Real DVC pipelines in temporary clones of the working tree, and what they left in MLflow."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from toys import ROOT

STAGES = [
    "download", "train_teacher", "distill", "prune", "train_branchynet", "export", "calibrate",
    "evaluate",
]  # fmt: skip
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))},
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def run(root: Path, *command: str, check: bool = True, **environment: str) -> str:
    """What a command prints; fails with it when the command does."""
    done = subprocess.run(
        command,
        cwd=root,
        env={**ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout[-6000:]
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that DVC ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def metrics(root: Path, stage: str) -> dict[str, float]:
    """What a stage wrote."""
    found: dict[str, float] = json.loads((root / "results" / stage / "metrics.json").read_text())
    return found


def clone_tree(root: Path) -> Path:
    """A clone of the working tree as it stands, committed, at `root`."""
    run(ROOT, "git", "clone", "--quiet", str(ROOT), str(root))
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "--quiet", "--allow-empty", "-m", "the tree under test")
    return root


def client(root: Path) -> Any:
    """MLflow's client of a clone's own store."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow' / 'mlflow.db'}")


def parents(root: Path) -> list[Any]:
    """The runs of pipeline states, oldest first."""
    return [run for run in _runs(root) if "edgeke.state" in run.data.tags]


def children(root: Path, parent: str) -> dict[str, Any]:
    """The runs of a state's stages by name; of several the newest."""
    below = [run for run in _runs(root) if run.data.tags.get("mlflow.parentRunId") == parent]
    return {run.info.run_name: run for run in below}


def _runs(root: Path) -> list[Any]:
    store = client(root)
    experiment = store.get_experiment_by_name("edgeke").experiment_id
    return list(store.search_runs([experiment], order_by=["attributes.start_time"]))
