import pytest
import torch
from torch import nn
from toys import replace

from edgeke.errors import InputError
from edgeke.learning.fit import Images, fit, predict, train_alone
from edgeke.learning.objectives import CrossEntropy
from edgeke.networks.architecture import Architecture

CPU = torch.device("cpu")


def quiet(epoch: int, row: dict[str, float]) -> None:
    return


def train(dataset, architecture, recipe, seed=0):
    images = Images.of(dataset, CPU)
    alone = Architecture.single("resnet10", 4, 1, len(dataset.classes))
    return train_alone(
        alone, CrossEntropy(), images, recipe, seed=seed, description="toy", on_epoch=quiet
    )


def test_it_learns_and_reports_every_epoch(dataset, architecture, recipe):
    seen = []
    alone = Architecture.single("resnet10", 4, 1, len(dataset.classes))
    trained = train_alone(
        alone,
        CrossEntropy(),
        Images.of(dataset, CPU),
        replace(recipe, epochs=6),
        seed=0,
        description="toy",
        on_epoch=lambda epoch, row: seen.append((epoch, row)),
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [row for _, row in seen] == trained.history
    assert trained.history[-1]["validation/accuracy"] > 0.8
    assert trained.history[-1]["train/loss"] < trained.history[0]["train/loss"]
    assert trained.rows()[0]["epoch"] == 1


def test_the_seed_decides_everything(dataset, architecture, recipe):
    first, second = train(dataset, architecture, recipe), train(dataset, architecture, recipe)
    other = train(dataset, architecture, recipe, seed=1)
    states = [trained.network.state_dict() for trained in (first, second, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_calibration_and_test_images_cannot_matter(dataset, architecture, recipe):
    hidden = replace(dataset, splits={k: dataset.splits[k] for k in ("train", "validation")})
    first, second = train(dataset, architecture, recipe), train(hidden, architecture, recipe)
    assert first.history == second.history


def test_a_batch_larger_than_the_split_is_refused(dataset, architecture, recipe):
    with pytest.raises(InputError, match="batch_size = 100 exceeds the 96 training images"):
        train(dataset, architecture, replace(recipe, batch_size=100))


def test_a_diverged_loss_stops_with_what_to_change(dataset, recipe):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (self.weight * torch.inf).expand(1, len(images), 3) - torch.inf

    with pytest.raises(InputError, match="loss of toy diverged in epoch 1; lower learning_rate"):
        fit(
            Broken(),
            CrossEntropy(),
            Images.of(dataset, CPU),
            recipe,
            seed=0,
            description="toy",
            on_epoch=quiet,
        )


def test_predict_is_the_same_in_any_batching_and_keeps_the_mode(network, dataset, monkeypatch):
    images = Images.of(dataset, CPU)
    whole = predict(network.train(), images.validation, images.normalise)
    assert network.training
    monkeypatch.setattr("edgeke.learning.fit._PREDICT_BATCH", 7)
    parts = predict(network, images.validation, images.normalise)
    assert whole.shape == (3, 60, 3)
    assert torch.allclose(whole, parts, atol=1e-5)
