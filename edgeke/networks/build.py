"""Builds a backbone with fresh weights: one of ours, one of timm's, or the user's own."""

import difflib
import importlib
from typing import Any

from torch import nn

from edgeke.errors import InputError
from edgeke.networks.architecture import NETWORKS, TIMM, Backbone
from edgeke.networks.pruned import cut_to


def build_network(backbone: Backbone) -> nn.Module:
    """The network with fresh weights, from images `[N, C, H, W]` to logits `[N, K]`.

    Errors: InputError when timm is missing or does not know the network.
    """
    if backbone.network.startswith(TIMM):
        return cut_to(_timm_network(backbone), backbone.pruned)
    module, name = NETWORKS[backbone.network].split(":")
    network: nn.Module = getattr(importlib.import_module(module), name)(backbone)
    return cut_to(network, backbone.pruned)


def require_timm() -> Any:
    """timm, imported only when one of its networks is used."""
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"networks of timm need the package timm ({error}); run `pip install timm`"
        ) from error
    return timm


def _timm_network(backbone: Backbone) -> nn.Module:
    timm, name = require_timm(), backbone.network.removeprefix(TIMM)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 5, 0)
        raise InputError(
            f"timm {timm.__version__} has no network {name!r}; the nearest are "
            f"{', '.join(TIMM + other for other in near)}"
        )
    sizes = {"num_classes": backbone.classes, "in_chans": backbone.channels}
    network: nn.Module
    try:
        try:
            network = timm.create_model(name, drop_rate=0.0, **sizes)
        except TypeError:  # a few networks do not have the argument
            network = timm.create_model(name, **sizes)
    except RuntimeError as error:  # a tag of weights that does not exist
        raise InputError(f"{backbone.network}: {error}") from error
    if getattr(network, "output_fmt", "NCHW") != "NCHW":
        raise InputError(
            f"{backbone.network} is a transformer: its features are {network.output_fmt}, and "
            "heads need maps [N, C, H, W]; use a convolutional network"
        )
    if backbone.stem == "small":
        _keep_side(backbone, network)
    return network


def _keep_side(backbone: Backbone, network: nn.Module) -> None:
    """Stride 1 in the first convolution, and no pooling after it."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    halves = first.stride[0] > 1
    if halves and first.kernel_size[0] % 2:
        first.stride = (1, 1)
    pools = isinstance(getattr(network, "maxpool", None), nn.Module)
    if pools:
        network.maxpool = nn.Identity()
    if not pools and (not halves or first.stride[0] > 1):
        raise InputError(
            f"stem = small: {backbone.network} has neither a first convolution whose stride can be "
            "1 nor a pooling layer after it; use stem: standard"
        )
