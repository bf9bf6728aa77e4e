"""Networks with fewer channels: shapes are taken from a full network, and given to another one.

Whatever removed the channels, the shapes of a network's tensors are enough to build it again. So a
checkpoint needs no code of the library that pruned it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from edgeke.networks.architecture import Shapes


def smaller_shapes(full: nn.Module, pruned: nn.Module) -> Shapes:
    """The tensors of `pruned` that have other shapes than in `full`, in order."""
    before = full.state_dict()
    return tuple(
        (name, tuple(tensor.shape))
        for name, tensor in pruned.state_dict().items()
        if tensor.shape != before[name].shape
    )


def cut_to(network: nn.Module, shapes: Shapes) -> nn.Module:
    """Cut tensors to these shapes, and tell their layers; the first channels are kept.

    Weights are those of a fresh network: a checkpoint's are loaded afterwards. Errors: KeyError,
    AttributeError or RuntimeError for shapes of another network.
    """
    for name, shape in shapes:
        owner, _, key = name.rpartition(".")
        layer = network.get_submodule(owner)
        tensor = layer.get_parameter(key) if key in layer._parameters else layer.get_buffer(key)
        part = tensor.detach()[tuple(slice(size) for size in shape)].clone()
        if tuple(part.shape) != shape:
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, less than {shape}")
        if key == "weight":
            _tell(layer, part)
        setattr(layer, key, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
    return network


def _tell(layer: Any, weight: Tensor) -> None:
    """Change what a layer says about its channels, as far as its forward pass reads it."""
    if isinstance(layer, nn.Conv2d):
        per_group = layer.out_channels // layer.groups
        if 1 < layer.groups == layer.in_channels:  # depthwise
            layer.groups = weight.shape[0] // per_group
        layer.out_channels = weight.shape[0]
        layer.in_channels = weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(weight)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = len(weight)


def same_answers(first: nn.Module, second: nn.Module, images: Tensor) -> bool:
    """Whether two networks in evaluation mode answer images bit for bit alike."""
    with torch.no_grad():
        return torch.equal(first.eval()(images).flatten(), second.eval()(images).flatten())
