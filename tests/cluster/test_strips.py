"""Strips of rows give what the whole network gives."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from edgeke.cluster.network import Network, join
from edgeke.cluster.strips import Layout, alone, build
from edgeke.cluster.worker import Worker, run_together
from edgeke.device.manifest import Manifest
from edgeke.errors import InputError
from edgeke.networks.architecture import ExitSpec
from tests.cluster.conftest import make

KINDS = (ExitSpec(0.2, "linear"), ExitSpec(0.35, "branch"), ExitSpec(0.5, "separable"))
KINDS = (*KINDS, ExitSpec(0.7, "attention"))


def random_layout(network: Network, devices: int, random: np.random.Generator) -> Layout:
    cuts = [cut for cut in network.cuts[1:] if network.height(cut) >= devices]
    end = int(random.integers(len(cuts)))
    step = int(random.choice([network.stride[cuts[end]], 4, 3]))  # boundaries anywhere, too
    height = -(-network.height("image") // step)
    ends = np.sort(random.choice(np.arange(1, height), devices - 1, replace=False))
    heights = tuple(int(b - a) for a, b in pairwise([0, *ends, height]))
    exchanged = tuple(cut for cut in cuts[:end] if random.random() < 0.5)
    return Layout(exchanged, cuts[end], heights, int(random.integers(devices)), step)


def logits_of(network: Network, layout: Layout, image: np.ndarray) -> np.ndarray:
    programs = build(network, layout)
    workers = [Worker() for _ in programs.programs]
    for device, worker in enumerate(workers):
        keys = programs.keys(device)
        worker.load(0, programs.programs[device], {key: programs.graphs[key] for key in keys})
    logits, _, _ = run_together(workers, 0, programs, image)
    return logits


def check(network: Network, whole, tolerance: float = 1e-4, tries: int = 2) -> None:
    random = np.random.default_rng(3)
    for devices in (2, 3, 4):
        for _ in range(tries):
            layout = random_layout(network, devices, random)
            image = random.integers(0, 256, network.shapes["image"], np.uint8)
            expected = whole(image)
            assert expected.std() > 1e-2, "logits that are all alike show nothing"
            difference = np.abs(logits_of(network, layout, image) - expected)
            assert (difference <= tolerance * max(1, np.abs(expected).max())).all(), layout


@pytest.mark.parametrize(
    ("name", "size", "layout", "width"),
    [
        ("resnet18", 64, (0.3, 0.6), 8),
        ("resnet18", (65, 49), KINDS, 8),
        ("timm/resnet18", 64, (0.3, 0.6), None),
        ("timm/mobilenetv3_small_100", (97, 65), (0.3, 0.6), None),
        ("timm/efficientnet_lite0", 64, (0.02, 0.25, 0.6), None),
    ],
)
def test_strips_equal_the_whole_network(name, size, layout, width):
    check(*make(name, size, layout, width=width))


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, (99, 101), 224])
@pytest.mark.parametrize(
    "name",
    [
        *("timm/resnet18", "timm/resnet50", "timm/vgg16_bn", "timm/mobilenetv3_small_100"),
        *("timm/efficientnet_lite0", "timm/tf_efficientnet_lite0", "resnet18"),
        *("timm/densenet121", "timm/convnext_atto", "timm/regnety_002"),
    ],
)
def test_larger_networks_and_images(name, size):
    width = None if "/" in name else 16
    check(*make(name, size, width=width), tries=2)


@pytest.mark.slow
def test_every_kind_of_exit():
    for name, size in [("timm/resnet18", (97, 65)), ("timm/mobilenetv3_small_100", (129, 97))]:
        check(*make(name, size, KINDS), tries=4)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 8), ("timm/mobilenetv3_small_100", None)])
def test_int8_strips_equal_the_whole_int8_network(name, width):
    network, whole = make(name, 64, int8=True, width=width)
    assert any("QuantizeLinear" in cut for cut in network.cuts), "eight bits travel"
    check(network, whole, tolerance=1e-3)


def test_one_device_alone_is_the_whole_network(toy):
    network, whole = toy
    image = np.random.default_rng(0).integers(0, 256, network.shapes["image"], np.uint8)
    assert np.abs(logits_of(network, alone(network), image) - whole(image)).max() < 1e-4


def test_a_group_has_three_variants_and_heights_need_no_others(toy):
    """Top, middle, bottom: the same graphs whatever the heights, so a new plan opens none anew."""
    network, _ = toy
    cut = next(c for c in reversed(network.cuts) if network.height(c) >= 8)
    exchanged = tuple(network.cuts[1 : network.cuts.index(cut)])
    graphs = [
        build(network, Layout(exchanged, cut, heights)) for heights in [(2, 2, 2, 2), (3, 2, 2, 1)]
    ]
    first = [programs.programs[0].phases[1].graph for programs in graphs]
    assert first[0] == first[1]
    middle = {programs.programs[d].phases[1].graph for programs in graphs for d in (1, 2)}
    assert len(middle) == 1
    assert len({first[0], *middle, graphs[0].programs[3].phases[1].graph}) == 3


def test_only_halos_travel_between_groups(toy):
    network, _ = toy
    cut = network.cuts[3]
    programs = build(
        network, Layout(tuple(network.cuts[1:3]), cut, (network.height(cut) // 2,) * 2)
    )
    sent = [
        high - low
        for phase in programs.programs[0].phases
        for message in phase.messages
        if message.target == 1
        for _, _, low, high in message.rows
    ]
    assert sent
    assert max(sent) <= 3, "a block of two 3x3 convolutions reaches two rows, or three"


class _Attention(nn.Module):
    """A convolution, and attention over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.stem(image.permute(0, 3, 1, 2).float())
        flat = features.flatten(2)
        mixed = (flat @ (flat.transpose(1, 2) @ flat).softmax(-1)).reshape(features.shape)
        logits: torch.Tensor = self.last(self.mix(mixed).mean((2, 3)))
        return logits


def test_attention_over_positions_is_refused_with_the_layers_name(tmp_path):
    import warnings

    import onnx

    file = tmp_path / "0.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Attention(), (torch.zeros(1, 16, 16, 3, dtype=torch.uint8),), str(file),
            dynamo=False, opset_version=18, input_names=["image"], output_names=["logits"],
        )  # fmt: skip
    manifest = Manifest(("0.onnx",), (1,), 1, tuple("abcde"), (16, 16, 3))
    with pytest.raises(InputError, match=r"(Reshape|Flatten)\w* cannot be split .* % of the netwo"):
        join([onnx.load(file)], manifest)
