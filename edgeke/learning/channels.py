"""Removes the channels of a network that matter least, by torch-pruning."""

import importlib
import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from edgeke.errors import InputError
from edgeke.networks.architecture import Backbone, sides
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.build import build_network
from edgeke.networks.cost import count_module
from edgeke.networks.layouts import single_exit
from edgeke.networks.pruned import same_answers, smaller_shapes
from edgeke.networks.tracing import trace

# Channels are removed in so many parts of all that there are, until few enough are left.
_PARTS = 200
# Layers keep a multiple of so many channels: runtimes compute several at once.
_MULTIPLE = 4


def load_torch_pruning() -> ModuleType:
    """The package. Errors: InputError when it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise InputError(
            "student.prune needs torch-pruning: pip install -r requirements-prune.txt; or set "
            "student.prune to null"
        ) from None


def check_prunable(backbone: Backbone, share: float) -> None:
    """Errors: InputError when channels of this network cannot be removed to this share of MACs."""
    network = BranchyNet(single_exit(backbone)).eval()
    remove_channels(network, share * trace(backbone).macs)


def remove_channels(network: BranchyNet, macs: float) -> BranchyNet:
    """A copy of a single-exit network, in evaluation mode, with at most so many MACs.

    Channels of least weight, in groups of layers that must have equal ones, are removed from the
    whole network, among layers of the same kind (isomorphic pruning, Fang et al. 2024). The
    classifier keeps its outputs. Errors: InputError when the network cannot be pruned so.
    """
    pruning, backbone = load_torch_pruning(), network.architecture.backbone
    plain = build_network(backbone).eval()
    plain.load_state_dict(network.backbone_state())
    images = torch.rand(1, backbone.channels, *sides(backbone.image_size))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _prune(pruning, plain, images, trace(backbone).layers[-1], macs)
        full = build_network(replace(backbone, pruned=()))
        smaller = replace(backbone, pruned=smaller_shapes(full, plain))
        rebuilt = BranchyNet(single_exit(smaller), plain.state_dict()).eval()
        same = same_answers(rebuilt, plain, images)
    except InputError:
        raise
    except Exception as error:  # whatever torch-pruning raises where it does not know a layer
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(_refusal(backbone, reason)) from error
    if not same:
        raise InputError(_refusal(backbone, "it cannot be built again from its tensors' shapes"))
    return rebuilt


def _prune(pruning: Any, network: nn.Module, images: Tensor, classifier: str, macs: float) -> None:
    pruner = pruning.pruner.BasePruner(
        network,
        images,
        pruning.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=1.0,
        iterative_steps=_PARTS,
        ignored_layers=[network.get_submodule(classifier)],
        round_to=_MULTIPLE,
        # Else all pruners of a process share theirs.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    for _ in range(_PARTS):
        if count_module(network, images)[1] <= macs:
            return
        pruner.step()
    raise RuntimeError("too few of its channels can be removed: raise student.prune.macs")


def _refusal(backbone: Backbone, reason: str) -> str:
    return (
        f"student.prune: {backbone.network} cannot be pruned ({reason}); set student.prune to null,"
        " or use another network"
    )
