from dataclasses import replace

import pytest
import torch
from toys import SIZE, randomise

from edgeke.errors import InputError
from edgeke.networks.architecture import KINDS, Architecture, Backbone, ExitSpec
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.heads import Statistics
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.networks.tracing import trace

RESNET10 = Backbone("resnet10", 1, 3, SIZE, 4)
RESNET18 = Backbone("resnet18", 3, 100, 32, 64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("exit", [0, 1, 2])
def test_a_branch_seen_alone_equals_the_same_exit(network, images, exit):
    assert torch.equal(network.branch(exit)(images)[0], network(images)[exit])


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("exit", [0, 1, 2])
def test_without_the_exits_behind_one_the_others_answer_the_same(
    architecture, images, exit, shared
):
    network = randomise(BranchyNet(replace(architecture, shared=shared)))
    shorter = network.until(exit)
    assert torch.equal(shorter(images), network(images)[: exit + 1])
    assert exit_costs(shorter, SIZE) == exit_costs(network, SIZE)[: exit + 1]


@torch.no_grad()
def test_a_branch_taken_over_answers_as_it_did_alone(network, architecture, images):
    alone = randomise(BranchyNet(architecture.branch(1)), seed=5)
    network.load_branch(1, alone)
    assert torch.equal(network(images)[1], alone(images)[0])
    with pytest.raises(InputError, match="branch 0 was distilled for another network"):
        network.load_branch(0, alone)


def test_the_trunk_is_computed_once(network, images):
    calls = []
    for number, block in enumerate(network.trunk):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    network(images)
    assert calls == list(range(len(network.trunk)))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_the_backbone_is_torchvisions_resnet(backbone):
    """Same weights, same function: torchvision's network with the small-image stem."""
    from torch import nn
    from torchvision import models

    ours = randomise(BranchyNet(single_exit(Backbone(backbone, 3, 10, 32, 64))))
    theirs = getattr(models, backbone)(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(
        dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)), strict=True
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(images)[0], theirs.eval()(images), atol=1e-4, rtol=1e-4)


def test_macs_of_the_papers_networks():
    # REFERENCE: ResNet18 has 555 M MACs; exit 0 costs 75.8 % of it.
    alone = exit_costs(BranchyNet(single_exit(RESNET18)), 32)[0]
    plain = alone.macs
    assert plain == pytest.approx(555e6, rel=0.01)
    assert alone.parameters == 11_220_132  # ResNet18 with 100 classes and the small stem
    network = BranchyNet(with_layout("edgeke", RESNET18)).train()
    macs = [cost.macs for cost in exit_costs(network, 32)]
    assert macs[0] / plain == pytest.approx(0.758, abs=0.001)
    assert macs[0] < macs[1] < macs[2]
    # The reference computes layer3 twice and pays 134.8 %; a shared trunk cannot.
    assert macs[2] / plain < 1.25
    assert network.training


def test_activation_bytes_by_hand():
    network = BranchyNet(Architecture(RESNET10, (ExitSpec("stem", "linear"),)))
    # Convolution, batch norm and ReLU write 4 x 8 x 8; pooling and flattening 4; linear 3.
    assert exit_costs(network, 8)[0].activation_bytes == 4 * (3 * 256 + 4 + 4 + 3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_exit_answers_wherever_it_is_attached(images, kind):
    for attach in ("stem", "layer1.0", "layer2.0", "layer3.0"):
        network = BranchyNet(with_layout((ExitSpec(attach, kind),), RESNET10)).eval()
        assert network(images).shape == (2, 5, 3)
        assert torch.equal(network.branch(0)(images)[0], network(images)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_after_every_cut_point_of_timms_networks(kind):
    """Odd sides, maps of 1x1, 16 to 1,280 channels; gradients that are numbers."""
    pytest.importorskip("timm", reason="timm is not installed")
    backbone = Backbone("timm/tf_efficientnet_lite0", 1, 3, 40)  # sides 20, 10, 5, 3, 2
    cuts = trace(backbone).cuts[:-1]
    network = BranchyNet(with_layout([ExitSpec(cut.name, kind) for cut in cuts], backbone))
    logits = network.train()(torch.randn(2, 1, 40, 40))
    assert logits.shape == (len(cuts) + 1, 2, 3)
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_statistics_over_positions():
    features = torch.randn(4, 16, 5, 3, requires_grad=True)
    statistics = Statistics((16, 5, 3))(features)
    expected = [features.mean((2, 3)), features.amax((2, 3)), features.std((2, 3), correction=0)]
    assert torch.allclose(statistics, torch.cat(expected, 1), atol=1e-4)
    # A constant map has a deviation of 0, where a square root alone would have no gradient.
    constant = torch.ones(2, 1, 1, 1, requires_grad=True)
    Statistics((1, 1, 1))(constant).sum().backward()
    assert constant.grad.isfinite().all()
    # Large maps are averaged down for mean and deviation, not for the maximum.
    large = torch.randn(2, 3, 32, 48)
    small = torch.nn.functional.avg_pool2d(large, 2)
    expected = [small.mean((2, 3)), large.amax((2, 3)), small.std((2, 3), correction=0)]
    assert torch.allclose(Statistics((3, 32, 48))(large), torch.cat(expected, 1), atol=1e-4)


def test_a_checkpoint_keeps_the_backbones_own_names():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    backbone = Backbone("timm/resnet18", 3, 5, 64)
    network = BranchyNet(with_layout((0.2, 0.6), backbone)).eval()
    plain = timm.create_model("resnet18", num_classes=5).eval()
    plain.load_state_dict(network.backbone_state(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images)[-1], plain(images))
    assert "backbone.layer1.0.conv1.weight" in network.state_dict()
    assert "exits.2.head.fc.weight" in network.state_dict()


def test_deviation_of_a_nearly_constant_channel_is_not_rounding():
    generator = torch.Generator().manual_seed(0)
    features = 20 + 1e-2 * torch.randn(4, 3, 31, 31, generator=generator)
    deviation = Statistics((3, 31, 31))(features)[:, 6:]
    exact = (features.double().var((2, 3), correction=0) + 1e-5).sqrt()
    assert torch.allclose(deviation.double(), exact, rtol=1e-4)
