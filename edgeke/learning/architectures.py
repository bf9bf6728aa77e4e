"""From parameters and a dataset to the architectures that are trained on it."""

from edgeke.data.dataset import Dataset
from edgeke.networks.architecture import Architecture, Layout
from edgeke.params import Network

__all__ = ["student_architecture", "teacher_architecture"]


def teacher_architecture(network: Network, dataset: Dataset) -> Architecture:
    """The single-exit network for this dataset's channels and classes."""
    return Architecture.single(
        network.network, network.width, dataset.image_shape[0], len(dataset.classes)
    )


def student_architecture(
    network: Network, layout: Layout, dataset: Dataset, *, shared: bool = True
) -> Architecture:
    """The multi-exit network of a layout for this dataset's channels and classes."""
    channels, classes = dataset.image_shape[0], len(dataset.classes)
    return Architecture.with_layout(
        layout, network.network, network.width, channels, classes, shared
    )
