import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys import ROOT

from edgeke import params
from edgeke.params import Network
from edgeke.train_teacher import train_teacher


def test_the_teacher_learns_from_labels_alone(dataset, plan):
    rows = []
    trained = train_teacher(
        dataset, Network("resnet10", 4), plan, on_epoch=lambda e, row: rows.append(row)
    )
    assert len(rows) == plan.recipe.epochs
    assert trained.network.architecture.exits[0].kind == "main"
    assert len(trained.network.exits) == 1


@pytest.fixture
def workplace(dataset_file: Path) -> Path:
    """A folder with the toy dataset and parameters small enough for a process of its own."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"profile": "tiny"}
    tiny = content["profiles"]["tiny"]
    tiny["teacher"] = {"network": "resnet10", "width": 4}
    tiny["recipes"]["batch_size"] = 16
    tiny["recipes"]["train_teacher"]["epochs"] = 1
    root = dataset_file.parents[1]
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    assert params.load(root / "params.yaml").profile.teacher.width == 4
    return root


def run_stage(root: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "stages.train_teacher"],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def switch_tracking(root: Path, enabled: bool) -> None:
    content = yaml.safe_load((root / "params.yaml").read_text())
    content["tracking"]["enabled"] = enabled
    (root / "params.yaml").write_text(yaml.safe_dump(content))


def test_the_stage_with_and_without_tracking_makes_the_same_artefact(workplace: Path):
    switch_tracking(workplace, True)
    done = run_stage(workplace)
    assert done.returncode == 0, done.stderr
    assert (workplace / "mlflow" / "mlflow.db").is_file()
    tracked = load_file(workplace / "models" / "teacher.safetensors")
    history = (workplace / "results" / "train_teacher" / "history.csv").read_text()

    switch_tracking(workplace, False)
    done = run_stage(workplace)
    assert done.returncode == 0, done.stderr
    plain = load_file(workplace / "models" / "teacher.safetensors")
    assert tracked.keys() == plain.keys()
    assert all(torch.equal(tracked[key], plain[key]) for key in tracked)
    assert (workplace / "results" / "train_teacher" / "history.csv").read_text() == history
    assert "teacher: 100%" in done.stderr  # a progress bar


def test_the_stage_runs_where_mlflow_and_dvc_are_not_installed(workplace: Path):
    absent = workplace / "absent"
    absent.mkdir()
    for name in ("mlflow", "dvc"):
        (absent / f"{name}.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        )
    done = run_stage(workplace, PYTHONPATH=f"{absent}:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert (workplace / "models" / "teacher.safetensors").is_file()
    assert not (workplace / "mlflow").exists()


def test_a_truncated_dataset_stops_the_stage_in_one_line(workplace: Path):
    file = workplace / "data" / "dataset.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    switch_tracking(workplace, False)
    done = run_stage(workplace)
    assert done.returncode == 1
    assert "error: data/dataset.safetensors is truncated" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace / "models").exists()
