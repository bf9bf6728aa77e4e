"""Small real things to test with: images that can be learnt, networks with random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeke.data.dataset import Split
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Plan

ROOT = Path(__file__).resolve().parents[1]
SIZE = 8
CLASSES = ("down", "left", "up")


def make_split(count: int, seed: int) -> Split:
    """Noise with a bright half that depends on the class: easy, but not trivial."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = random.integers(0, 160, (count, 1, SIZE, SIZE))
    for image, label in zip(images, labels, strict=True):
        half = (slice(SIZE // 2, None), slice(None)) if label == 0 else (slice(None), slice(0, 4))
        half = (slice(0, 4), slice(None)) if label == 2 else half
        image[0][half] += 60
    return Split(images.astype(np.uint8), labels)


def randomise(network: BranchyNet, seed: int = 0) -> BranchyNet:
    """Give every tensor values of its own, the same for a seed; exits are unsure, but differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.dtype == torch.float32:
                noise = torch.rand(tensor.shape, generator=generator)
                if "running_var" in name:
                    tensor.copy_(0.5 + noise)
                elif tensor.dim() > 1:
                    tensor.copy_((2 * noise - 1) * (6 / tensor[0].numel()) ** 0.5)
                else:
                    tensor.copy_(0.2 * noise + name.endswith("weight"))
        images = torch.randn(64, network.architecture.channels, SIZE, SIZE, generator=generator)
        for exit, logits in zip(network.exits, network.eval()(images), strict=True):
            last = [layer for layer in exit.modules() if isinstance(layer, torch.nn.Linear)][-1]
            scale = 2 / logits.std(dim=0).mean()
            last.weight.mul_(scale)
            last.bias.sub_(logits.mean(dim=0)).mul_(scale)
    return network


def with_recipe(plan: Plan, **changes: Any) -> Plan:
    """The plan with other values of its recipe, or of its optimisation."""
    names = {field.name for field in dataclasses.fields(plan.recipe)}
    recipe = {key: value for key, value in changes.items() if key in names}
    others = {key: value for key, value in changes.items() if key not in names}
    return dataclasses.replace(
        plan,
        recipe=dataclasses.replace(plan.recipe, **recipe),
        optimisation=dataclasses.replace(plan.optimisation, **others),
    )


def replace(value: Any, **changes: Any) -> Any:
    """`dataclasses.replace`, for terse tests."""
    return dataclasses.replace(value, **changes)
