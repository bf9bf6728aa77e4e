"""Stage `train_teacher`: the large single-exit network that supervises all others."""

from edgeke.data.dataset import Dataset
from edgeke.learning.build import teacher_architecture
from edgeke.learning.fit import Images, OnEpoch, Trained, default_device, train_alone
from edgeke.learning.objectives import CrossEntropy
from edgeke.params import Network, Recipe

__all__ = ["train_teacher"]


def train_teacher(
    dataset: Dataset, network: Network, recipe: Recipe, *, seed: int, on_epoch: OnEpoch
) -> Trained:
    """Train the teacher on labels alone; needs the splits train and validation."""
    return train_alone(
        teacher_architecture(network, dataset),
        CrossEntropy(),
        Images.of(dataset, default_device()),
        recipe,
        seed=seed,
        description="teacher",
        on_epoch=on_epoch,
    )
