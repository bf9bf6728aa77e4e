import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from toys import SIZE, randomise, with_recipe

from edgeke.data.augment import Augment
from edgeke.distill import distill
from edgeke.learning.fit import fit
from edgeke.learning.frozen_trunk import Features
from edgeke.learning.images import Images
from edgeke.learning.objectives import make_objective
from edgeke.learning.orders import ORDERS
from edgeke.learning.phases import OneExit
from edgeke.learning.predict import predict
from edgeke.learning.resume import fingerprint
from edgeke.networks.architecture import Backbone, ExitSpec
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout
from edgeke.params import KD, Network
from edgeke.train_branchynet import train_branchynet


@pytest.fixture
def student():
    """Every way to begin an exit: with pooling, with a body, with the backbone's own head."""
    names = ("layer1.0", "layer2.0", "layer3.0")
    kinds = ("pooled", "linear", "branch")
    layout = [ExitSpec(name, kind) for name, kind in zip(names, kinds, strict=True)]
    return with_layout(layout, Backbone("resnet10", 1, 3, 8, 4))


@pytest.fixture
def weights(student, dataset):
    return randomise(BranchyNet(student)).backbone_state()


@pytest.fixture
def start(weights, tmp_path):
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "w.safetensors"
    )
    return Network("resnet10", 4, weights=str(tmp_path / "w.safetensors"), trunk="frozen")


def test_heads_learn_the_same_from_features_as_from_images(student, weights, dataset, plan):
    """The slow way: every step runs the frozen trunk and the teacher on the augmented images."""
    kd = KD("kl", 0.5, 4.0, "teacher", False)
    images = Images.of(dataset, torch.device("cpu"))
    teacher = randomise(BranchyNet(student.branch(3)), seed=9)
    torch.manual_seed(0)
    network = BranchyNet(student, weights)
    features = Features(network, images, plan, teacher)

    augment = Augment(plan.augmentation, 3, images.normalise.mean)
    generator = torch.Generator().manual_seed(plan.seed)
    copies = [
        augment(batch, labels, generator)[0]
        for _ in range(plan.augmentation.copies)
        for batch, labels in zip(
            torch.split(images.train, 100), torch.split(images.train_labels, 100), strict=True
        )
    ]
    slow_images = dataclasses.replace(
        images,
        train=torch.cat(copies),
        train_labels=images.train_labels.repeat(plan.augmentation.copies),
    )
    for exit, end in enumerate(network.attached):
        torch.manual_seed(0)
        slow = BranchyNet(student, weights)
        rows = []
        for view, inputs, objective in (
            (OneExit(slow, exit, end), slow_images, make_objective(kd, teacher)),
            (
                features.view({exit: network.exits[exit]}),
                features.images,
                make_objective(kd, features.teacher),
            ),
        ):
            rows.append(
                fit(
                    view, objective, inputs, features.plan, description="", on_epoch=lambda *_: None
                )
            )
        for one, two in zip(*rows, strict=True):
            assert one == pytest.approx(two, abs=1e-4)
        for one, two in zip(
            network.exits[exit].parameters(), slow.exits[exit].parameters(), strict=True
        ):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_a_trunk_that_is_the_teachers_too_runs_once(student, weights, dataset, plan):
    images = Images.of(dataset, torch.device("cpu"))
    network, calls = BranchyNet(student, weights), []
    teacher = BranchyNet(student.branch(3), weights).eval()
    torch.nn.init.normal_(teacher.exits[0].head.get_parameter("fc.weight"))
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    for runs in (0, 3):  # of the teacher: on two copies of the training images, on validation
        features = Features(network, images, plan, teacher)
        assert len(calls) == runs
        answers = features.teacher(features.images.validation)
        slow = predict(teacher, images.validation, images.normalise)
        torch.testing.assert_close(answers, slow)
        next(teacher.backbone.parameters()).data[0] += 0.1
        calls.clear()


@pytest.mark.parametrize("source", ["teacher", "main"])
@pytest.mark.parametrize("order", ["asynchronous", "synchronous"])
def test_a_frozen_trunk_is_what_it_was_and_the_exits_have_learnt(
    student, start, weights, dataset, plan, order, source
):
    """From their branches, and once more only where the main exit supervises."""
    kd, plan = KD("kl", 0.5, 4.0, source, False), with_recipe(plan, epochs=3)
    teacher = BranchyNet(student.branch(3), weights)
    trained = distill(dataset, student, teacher, kd, plan, start=start, on_epoch=lambda *_: None)
    branches = {number: one.network for number, one in enumerate(trained)}
    told = []
    result, plain = train_branchynet(
        dataset,
        student,
        ORDERS[order](student.depths),
        branches,
        teacher,
        kd,
        [plan] * len(ORDERS[order](student.depths).phases),
        start=start,
        seed=0,
        weights=(0.25,) * 4,
        detach=False,
        on_epoch=lambda epoch, row: told.append(row),
    )
    state = result.network.backbone_state()
    assert all(torch.equal(state[name], weights[name]) for name in state if "fc" not in name)
    assert not torch.equal(state["fc.weight"], weights["fc.weight"])
    if order == "asynchronous":
        assert fingerprint(result.network.branch(3)) == fingerprint(branches[3])
    assert fingerprint(plain) == fingerprint(result.network.branch(3))
    same = [
        fingerprint(result.network.branch(e)) == fingerprint(branch)
        for e, branch in branches.items()
    ]
    if source == "teacher":
        assert all(same)
        assert not told
        return
    assert not any(same[:3])
    assert len(told) == 3, "one pass for all exits"
    for exit in range(3):
        key = f"validation/exit_{exit}/loss"
        assert told[-1][key] < told[0][key]


@pytest.mark.parametrize(("layout", "epochs"), [([0.2, 0.6], 3), ("edgeke", 6)])
def test_heads_on_a_trunk_that_stays_learn_from_features(dataset, plan, layout, epochs):
    """All in one pass; exits with layers of their own (edgeke's) learn one after the other."""
    backbone = Backbone("resnet10", 1, 3, SIZE, 4)
    architecture, plan = with_layout(layout, backbone), with_recipe(plan, epochs=3)
    main, told = BranchyNet(architecture.branch(2)).eval(), []
    trained, plain = train_branchynet(
        dataset,
        architecture,
        ORDERS["asynchronous"](architecture.depths),
        {2: main},
        None,
        KD("none", 0.0, 4.0, "teacher", False),
        [plan] * 2,
        start=Network("resnet10", width=4),
        seed=0,
        weights=(0.3, 0.3, 0.4),
        detach=False,
        on_epoch=lambda epoch, row: told.append(row),
    )
    assert len(told) == epochs
    for network in (trained.network.branch(2), plain):
        assert fingerprint(network) == fingerprint(main)
    assert told[-1]["validation/exit_0/loss"] < told[0].get("validation/exit_0/loss", 9)


def test_a_trunk_that_starts_from_weights_learns_slower_and_keeps_its_statistics(
    student, start, weights, dataset, plan
):
    finetuned = dataclasses.replace(start, trunk="finetuned")
    kd, slow = KD("none", 0.0, 4.0, "teacher", False), with_recipe(plan, trunk_rate=1e-6)
    moved = []
    for settings in (slow, with_recipe(plan, trunk_rate=1.0, keep_statistics=False)):
        one = distill(dataset, student, None, kd, settings, start=finetuned, on_epoch=lambda *_: 0)
        state = one[3].network.backbone_state()
        assert torch.equal(state["stem.bn.running_mean"], weights["stem.bn.running_mean"]) == bool(
            settings is slow
        )
        moved.append((state["stem.conv.weight"] - weights["stem.conv.weight"]).abs().max())
    assert moved[0] < 1e-4 < moved[1]
