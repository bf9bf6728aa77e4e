import dataclasses
import json
from pathlib import Path

import pytest
import torch
from toys import SIZE, replace

from edgeke.data.augment import Normalise
from edgeke.errors import InputError
from edgeke.learning.checkpoints import (
    Preprocessing,
    load_checkpoint,
    load_teacher,
    save_checkpoint,
)
from edgeke.learning.predict import predict
from edgeke.params import KD

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((0.5,), (0.25,), (1, SIZE, SIZE), ("down", "left", "up"))


@pytest.fixture
def saved(network, tmp_path: Path) -> Path:
    path = tmp_path / "models" / "net"
    save_checkpoint(
        network,
        path,
        preprocessing=PREPROCESSING,
        params={"seed": 0, "kd": KD("kl", 0.5, 4.0, "teacher", False)},
        metrics={"validation/accuracy": 0.5},
    )
    return path


def test_round_trip(network, saved: Path):
    read, preprocessing = load_checkpoint(saved, CPU)
    assert preprocessing == PREPROCESSING
    assert not read.training
    images = torch.randn(3, 1, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(read(images), network(images))
    described = json.loads(saved.with_suffix(".json").read_text())
    assert described["params"]["kd"] == {
        "distance": "kl",
        "beta": 0.5,
        "temperature": 4.0,
        "source": "teacher",
        "paper_weights": False,
    }
    assert described["metrics"] == {"validation/accuracy": 0.5}


@pytest.mark.parametrize("keep", [0, 20, -10])
def test_a_truncated_file_is_refused(saved: Path, keep: int):
    weights = saved.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"net\.safetensors is truncated or not the checkpoint"):
        load_checkpoint(saved, CPU)


def test_weights_of_another_network_are_refused(saved: Path):
    file = saved.with_suffix(".json")
    described = json.loads(file.read_text())
    described["architecture"]["backbone"]["width"] = 8
    file.write_text(json.dumps(described))
    with pytest.raises(InputError, match="not the checkpoint its JSON describes"):
        load_checkpoint(saved, CPU)
    file.write_text(json.dumps({**described, "architecture": {"backbone": "resnet18"}}))
    with pytest.raises(InputError, match="not the description of an EdgeKE network"):
        load_checkpoint(saved, CPU)


def test_missing_files_are_named(saved: Path):
    saved.with_suffix(".safetensors").unlink()
    with pytest.raises(InputError, match=r"net\.safetensors is missing; `dvc repro`"):
        load_checkpoint(saved, CPU)
    with pytest.raises(InputError, match=r"other\.json is missing"):
        load_checkpoint(saved.with_name("other"), CPU)


def test_a_network_of_other_data_is_refused(saved: Path):
    assert load_checkpoint(saved, CPU, PREPROCESSING)
    other = replace(PREPROCESSING, classes=("left", "down", "up"))
    with pytest.raises(
        InputError, match=r"net\.safetensors was trained on other images .* classes"
    ):
        load_checkpoint(saved, CPU, other)


def test_a_teacher_with_another_normalisation_takes_the_students_images(
    network, dataset, tmp_path: Path
):
    own = Preprocessing.of(dataset)
    save_checkpoint(network, tmp_path / "t", preprocessing=own, params={}, metrics={})
    student = dataclasses.replace(own, mean=(0.5,), std=(0.25,))
    images = torch.from_numpy(dataset["train"].images[:20])
    answers = [
        predict(teacher, images, Normalise(given.mean, given.std, torch.device("cpu")))
        for given in (own, student)
        for teacher in [load_teacher(tmp_path / "t", given, own)]
    ]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("up", "left", "down")}, "classes down, left, up instead of up, left, down"),
        ({"mean": (0.4,)}, "mean 0.5 instead of 0.4"),  # the same pictures inverted
        ({"std": (0.3,)}, "std 0.25 instead of 0.3"),
        ({"image_shape": (3, SIZE, SIZE)}, "image_shape 1, 8, 8 instead of 3, 8, 8"),
    ],
)
def test_a_teacher_of_other_images_is_refused_before_training(saved, changes, words):
    expected = replace(PREPROCESSING, **changes)
    with pytest.raises(InputError, match="was trained on other images") as caught:
        load_teacher(saved, expected, expected)
    assert words in str(caught.value)
