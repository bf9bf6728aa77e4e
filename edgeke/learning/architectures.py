"""From parameters and a dataset to the networks that are trained on it."""

import dataclasses

import torch
from torch import Tensor

from edgeke.data.dataset import Dataset
from edgeke.learning.channels import check_prunable
from edgeke.networks.architecture import Architecture, Backbone, Layout, Shapes, resolve_layout
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.networks.weights import initial_weights, normalisation
from edgeke.params import Network, Params, check_exits


def teacher_architecture(network: Network, dataset: Dataset) -> Architecture:
    """The single-exit network for this dataset's images and classes."""
    return single_exit(_backbone(network, dataset))


def student_architecture(
    network: Network,
    layout: Layout,
    dataset: Dataset,
    *,
    shared: bool = True,
    pruned: Shapes = (),
) -> Architecture:
    """The multi-exit network of a layout for this dataset's images and classes.

    `pruned`: the shapes of a backbone whose channels were removed.
    """
    layout = resolve_layout(layout, network.weights is not None)
    backbone = dataclasses.replace(_backbone(network, dataset), pruned=pruned)
    return with_layout(layout, backbone, shared=shared)


def normalised_for(network: Network, dataset: Dataset) -> Dataset:
    """The dataset with the mean and deviation that a network's weights were trained with.

    The dataset's own for a network without weights, or of which nothing is known.
    """
    if network.weights is None:
        return dataset
    known = normalisation(_backbone(network, dataset), network.weights)
    if known is None:
        return dataset
    mean, std = known
    return dataclasses.replace(dataset, mean=mean, std=std)


def start_weights(network: Network, backbone: Backbone, seed: int) -> dict[str, Tensor] | None:
    """The weights that `network` starts from, its new classifier drawn with the seed, or None.

    Errors: InputError when they are missing or do not fit.
    """
    if network.weights is None:
        return None
    torch.manual_seed(seed)
    return initial_weights(backbone, network.weights)


def check_student(params: Params, dataset: Dataset) -> None:
    """Refuse a student that cannot be built, before hours go into its teacher.

    Errors: InputError for a network, layout or list of numbers that do not fit together, and for a
    network that cannot be pruned as it is to be.
    """
    student = student_architecture(params.profile.student, params.branchynet.layout, dataset)
    check_exits(params, len(student.exits))
    if params.student.prune is not None:
        check_prunable(student.backbone, params.student.prune.macs)


def _backbone(network: Network, dataset: Dataset) -> Backbone:
    channels, height, width = dataset.image_shape
    return network.backbone(channels, len(dataset.classes), (height, width))
