"""Networks with random weights, their segments, and what a whole network answers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeke.cluster.network import Network, join
from edgeke.device.manifest import Manifest
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments
from edgeke.networks.architecture import Backbone, Layout, sides
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout


def make(
    name: str,
    size: int | tuple[int, int],
    layout: Layout = (0.3, 0.6),
    *,
    int8: bool = False,
    width: int | None = None,
) -> tuple[Network, Callable[[np.ndarray], np.ndarray]]:
    """A network for the cluster, and a function that computes the whole one's logits `[E, K]`."""
    torch.manual_seed(0)
    shape, classes = (*sides(size), 3), tuple("abcde")
    branchy = BranchyNet(with_layout(layout, Backbone(name, 3, len(classes), size, width))).eval()
    for module in branchy.modules():  # activations that neither vanish nor grow with depth
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    models = export_segments(branchy, [0.5] * 3, [0.25] * 3, size)
    if int8:
        samples = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
        models = quantise_segments(models, samples)
    names = tuple(f"{number}.onnx" for number in range(len(models)))
    manifest = Manifest(names, tuple(range(1, len(models) + 1)), len(models), classes, shape)
    contents = [model.SerializeToString() for model in models]
    return join(models, manifest), lambda image: segment_logits(contents, image, 1)[:, 0]


@pytest.fixture(scope="session")
def toy() -> tuple[Network, Callable[[np.ndarray], np.ndarray]]:
    """Our smallest, three exits."""
    return make("resnet10", 32, "edgeke", width=4)


def write_segments(network: Network, models: list, folder: Path) -> None:
    """The segments as `export` writes them."""
    folder.mkdir(parents=True)
    for name, model in zip(network.manifest.segments, models, strict=True):
        (folder / name).write_bytes(model.SerializeToString())
    (folder / "segments.json").write_text(network.manifest.to_json())
