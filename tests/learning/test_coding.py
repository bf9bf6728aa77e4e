"""A codec in the training loop: the same as on the wire, and only what is behind it learns."""

import copy

import numpy as np
import pytest
import torch
from test_train_branchynet import FRESH, NO_TEACHER, WEIGHTS
from toys import SIZE, randomise

from edgeke.device.codec import decode, encode, parse_codec
from edgeke.learning.coding import Coding, pass_through
from edgeke.learning.orders import ORDERS, with_codec, without_codec
from edgeke.learning.phases import CodedExits
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import CodecInLoop
from edgeke.train_branchynet import train_branchynet


@pytest.mark.parametrize("name", ["q8", "q4", "q2", "f16", "q4_r50", "q2_r20"])
def test_the_loop_s_codec_is_the_one_on_the_wire(name):
    features = np.random.default_rng(0).normal(0, 1, (3, 12, 6, 6)).astype(np.float32)
    codec = parse_codec(name)
    wire = decode(encode(features, codec), (12, 6, 6), 3)
    loop = pass_through(torch.from_numpy(features), codec.bits, torch.full((3,), codec.share))
    step = (features.max() - features.min()) / (2 ** min(codec.bits, 16) - 1)
    other = np.abs(loop.numpy() - wire) > 1e-5
    assert other.mean() < 0.01, "but for values in the middle of two steps"
    assert np.abs(loop.numpy() - wire).max() < 1.01 * step


def test_rounding_lets_gradients_through_and_evaluation_changes_nothing():
    features = torch.randn(8, 4, 5, 5, requires_grad=True)
    coding = Coding(parse_codec("q2_r50"))
    torch.manual_seed(0)
    coded = coding(features)
    changed = (coded != features).flatten(1).any(1)
    assert 0 < changed.sum() < 8, "some images, not all"
    weights = torch.randn_like(features)
    (coded * weights).sum().backward()
    assert torch.equal(features.grad[~changed], weights[~changed])
    total = features.grad.sum((2, 3))
    assert torch.allclose(total, weights.sum((2, 3)), atol=1e-4), "dropped ones share the mean's"
    assert torch.equal(coding.eval()(features), features)


def test_exits_behind_the_cut_see_coded_features(network):
    codec, images = parse_codec("q2"), torch.randn(64, 1, SIZE, SIZE)
    phase = with_codec(ORDERS["asynchronous"](network.attached), network.attached, 0).phases[-1]
    view = CodedExits(network, phase, 0, codec, False).eval()
    clean = network.eval()(images)[1:]
    assert torch.allclose(view(images), clean, atol=1e-5)
    view.coding.train()
    features = network.through(images, 0, 1)
    arrived = pass_through(features, 2, torch.ones(64))
    through = network.exits[1](network.through(arrived, 1, 2))
    answers = view(images)[0]
    coded = (answers - through).abs().amax(1) < 1e-4
    plain = (answers - clean[0]).abs().amax(1) < 1e-4
    assert (coded ^ plain).all()
    assert 16 < coded.sum() < 48


@pytest.mark.parametrize("name", ["asynchronous", "asynchronous_back", "synchronous"])
def test_what_is_behind_the_codec_learns(dataset, architecture, plan, name):
    """In a last phase the trunk in front stays; in joint phases all of it learns."""
    order = with_codec(ORDERS[name](architecture.depths), architecture.depths, 0)
    branches = {e: randomise(BranchyNet(architecture.branch(e)), seed=e) for e in range(3)}
    plans = [plan] * len(order.phases)
    settings = {"start": FRESH, "seed": 0, "weights": WEIGHTS, "detach": False}
    results = []
    for chosen in (None, CodecInLoop(0, "q2")):
        own = order if chosen else ORDERS[name](architecture.depths)
        trained, _ = train_branchynet(
            dataset, architecture, own, copy.deepcopy(branches), None, NO_TEACHER,
            plans[: len(own.phases)], codec=chosen, on_epoch=lambda *_: None, **settings,
        )  # fmt: skip
        results.append(trained.network.eval())
    without, coded = results
    images = torch.randn(4, 1, SIZE, SIZE)
    with torch.no_grad():
        one, other = without(images), coded(images)
    if name == "synchronous":
        assert not torch.equal(one[0], other[0])
    else:
        assert torch.equal(one[0], other[0])
        assert without_codec(order, architecture.depths)[0] == ORDERS[name](architecture.depths)
    assert not torch.equal(one[1], other[1])
    assert not torch.equal(one[2], other[2])
