import copy
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from toys import ROOT

from edgeke.errors import InputError
from edgeke.networks import __main__ as command
from edgeke.networks.architecture import NETWORKS, Backbone, ExitSpec
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.build import build_network
from edgeke.networks.layouts import with_layout
from edgeke.networks.tracing import trace

pytest.importorskip("timm", reason="timm is not installed")

# One of each family: residual, depthwise, squeeze and excitation, concatenation, parallel
# resolutions, reparametrised, layer norm with NHWC steps, kernels of several sizes.
EXACT = [
    "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "densenet121", "hrnet_w18_small",
    "mobileone_s0", "convnext_atto", "mixnet_s",
]  # fmt: skip


@pytest.mark.parametrize("name", [f"timm/{name}" for name in EXACT])
def test_the_blocks_of_a_network_equal_it_exactly(name):
    """Outputs in evaluation, and gradients in training, to the last bit."""
    torch.manual_seed(0)
    backbone = Backbone(name, 3, 5, 64)
    traced, network = trace(backbone), build_network(backbone)
    places = [None, *traced.cuts, None]
    blocks = nn.Sequential(*(traced.part(network, *ends) for ends in itertools.pairwise(places)))
    names = [key.split(".", 1)[1] for key in blocks.state_dict()]
    assert sorted(names) == sorted(network.state_dict())
    images, whole = torch.randn(2, 3, 64, 64), copy.deepcopy(network)
    with torch.no_grad():
        assert torch.equal(blocks.eval()(images), whole.eval()(images))
    for module in (blocks.train(), whole.train()):
        torch.manual_seed(1)
        module(images).square().sum().backward()
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_cut_points_of_efficientnet_lite0():
    traced = trace(Backbone("timm/tf_efficientnet_lite0", 3, 6, 128))
    names = [cut.name for cut in traced.cuts]
    # Not inside a block, not in front of a normalisation, not in the classifier.
    assert names[:3] == ["bn1", "blocks.0.0", "blocks.1.0"]
    assert names[-2:] == ["blocks.6.0", "bn2"]
    assert len(names) == 18
    cuts = {cut.name: cut for cut in traced.cuts}
    assert cuts["blocks.1.0"].shape == (24, 32, 32)
    assert cuts["bn2"].shape == (1280, 4, 4)
    assert traced.macs == pytest.approx(127e6, rel=0.02)  # the published 385 M at 224x224
    macs = [cut.macs for cut in traced.cuts]
    assert macs == sorted(macs)
    assert macs[-1] < traced.macs


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (("timm/resnet81", 3, 5, 64), "no network 'resnet81'; the nearest are (timm/[^,]*, ){4}ti"),
        (("timm/resnet18.nowhere", 3, 5, 64), "Invalid pretrained tag"),
        (
            ("timm/vit_tiny_patch16_224", 3, 5, 224),
            "no feature maps (after|anywhere).*transformers",
        ),
        (("timm/swin_tiny_patch4_window7_224", 3, 5, 224), "is a transformer"),
        (("timm/resnet18", 3, 5, 16), "divides the side by 32; the smallest size that works is 32"),
        (("timm/inception_v3", 3, 5, 32), "the smallest that works is 80"),
        (("timm/vgg11_bn", 3, 5, 64, None, "small"), "neither a first convolution"),
        (("resnet18", 3, 5, 64), "needs a width"),
    ],
)
def test_a_network_that_cannot_have_exits_is_refused(backbone, message):
    with pytest.raises(InputError, match=message):
        trace(Backbone(*backbone))


def test_a_small_stem_keeps_the_side():
    cuts = trace(Backbone("timm/resnet18", 3, 5, 32, stem="small")).cuts
    assert cuts[0].shape == (64, 32, 32)
    assert cuts[-1].shape == (512, 4, 4)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.conv = nn.Conv2d(backbone.channels, 8, 3, padding=1)
        self.fc = nn.Linear(8, backbone.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            x = -x
        return self.fc(x.mean((2, 3)))


class TwoModes(Branching):
    """A step that only exists in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.conv(x), 0.5, self.training)
        return self.fc(x.mean((2, 3)))


class OwnTensor(Branching):
    """A parameter of the outermost module."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.scale).mean((2, 3)))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (Branching, "cannot be traced by torch.fx, so it cannot be cut into blocks: symbolically"),
        (TwoModes, "does something else in training.*dropout"),
        (OwnTensor, "uses the tensor scale"),
    ],
)
def test_code_that_blocks_could_not_reproduce_is_refused(built, message, monkeypatch):
    monkeypatch.setitem(NETWORKS, built.__name__, f"{__name__}:{built.__name__}")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    with pytest.raises(InputError, match=message):
        trace(Backbone(built.__name__, 1, 3, 8))


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    """The example of docs/backbones.md."""
    example = (ROOT / "docs" / "backbones.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 20
    (tmp_path / "steelnet.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(NETWORKS, "steelnet", "steelnet:SteelNet")
    backbone = Backbone("steelnet", 1, 6, 64)
    assert [cut.name for cut in trace(backbone).cuts] == ["stem", "early", "late"]
    network = BranchyNet(with_layout((0.1, ExitSpec("early", "branch")), backbone)).eval()
    assert network(torch.randn(2, 1, 64, 64)).shape == (3, 2, 6)


def test_the_command_prints_the_cut_points(capsys):
    assert command.main(["resnet10", "--width", "16", "--image-size", "32"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["cut", "point", "C", "x", "H", "x", "W", "operations", "bytes"]
    assert rows[1].split() == ["stem", "16", "x", "32", "x", "32", "2.7%", "65,536"]
    assert [row.split()[0] for row in rows[1:-1]] == [
        "stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0",
    ]  # fmt: skip
    assert command.main(["resnet10"]) == 1
    assert "needs a width" in capsys.readouterr().err
