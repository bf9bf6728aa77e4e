from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import ROOT
from workplaces import finish, start, write_params


@pytest.fixture
def workplace(dataset_file: Path) -> Path:
    write_params(dataset_file.parents[1], epochs=1)
    return dataset_file.parents[1]


# What training by hand on another machine does not need (docs/training.md).
ABSENT = (
    "accelerate", "dvc", "dvclive", "matplotlib", "mlflow", "onnx", "onnxruntime", "pandas", "PIL",
    "scipy", "sklearn", "torchvision", "yaml",
)  # fmt: skip
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Rest(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in {ABSENT}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Rest
"""


def test_training_by_hand_needs_no_mlflow_and_gives_the_same(workplace: Path):
    """On a machine with torch, safetensors, numpy, tqdm, pydantic and ruamel.yaml alone."""
    absent = workplace / "absent"
    absent.mkdir()
    (absent / "sitecustomize.py").write_text(HIDE)
    command = ("-m", "stages.train_teacher")
    output = finish(start(workplace, *command, PYTHONPATH=f"{absent}:{ROOT}"))
    assert "teacher: 100%" in output  # a progress bar
    by_hand = load_file(workplace / "models" / "teacher.safetensors")
    history = (workplace / "results" / "train_teacher" / "history.csv").read_text()

    write_params(workplace, epochs=1, tracking=True)
    finish(start(workplace, *command))
    assert (workplace / "mlflow" / "mlflow.db").is_file()
    tracked = load_file(workplace / "models" / "teacher.safetensors")
    assert tracked.keys() == by_hand.keys()
    assert all(torch.equal(tracked[key], by_hand[key]) for key in tracked)
    assert (workplace / "results" / "train_teacher" / "history.csv").read_text() == history
