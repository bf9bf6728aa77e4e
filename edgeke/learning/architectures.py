"""From parameters and a dataset to the architectures that are trained on it."""

from edgeke.data.dataset import Dataset
from edgeke.networks.architecture import Architecture, Backbone, Layout
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.params import Network, Params, check_exits

__all__ = ["check_student", "student_architecture", "teacher_architecture"]


def teacher_architecture(network: Network, dataset: Dataset) -> Architecture:
    """The single-exit network for this dataset's images and classes."""
    return single_exit(_backbone(network, dataset))


def student_architecture(
    network: Network, layout: Layout, dataset: Dataset, *, shared: bool = True
) -> Architecture:
    """The multi-exit network of a layout for this dataset's images and classes."""
    return with_layout(layout, _backbone(network, dataset), shared=shared)


def check_student(params: Params, dataset: Dataset) -> None:
    """Refuse a student that cannot be built, before hours go into its teacher.

    Errors: InputError for a network, layout or list of numbers that do not fit together.
    """
    student = student_architecture(params.profile.student, params.branchynet.layout, dataset)
    check_exits(params, len(student.exits))


def _backbone(network: Network, dataset: Dataset) -> Backbone:
    channels, _, side = dataset.image_shape
    return network.backbone(channels, len(dataset.classes), side)
