import dataclasses
import math

import pytest
import torch
from torch import nn
from toys import replace, with_recipe

from edgeke.data.dataset import Split
from edgeke.errors import InputError
from edgeke.learning.fit import _Training, fit, kept_epoch
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.predict import evaluate, predict
from edgeke.learning.schedules import learning_rate
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit

CPU = torch.device("cpu")


def train(dataset, plan, on_epoch=lambda epoch, row: None, width=4) -> Trained:
    torch.manual_seed(plan.seed)
    network = BranchyNet(single_exit(Backbone("resnet10", 1, len(dataset.classes), 8, width)))
    objective = CrossEntropy(label_smoothing=plan.optimisation.label_smoothing)
    images = Images.of(dataset, CPU)
    history = fit(network, objective, images, plan, description="toy", on_epoch=on_epoch)
    return Trained(network, history, (), kept_epoch(history, plan))


def equal(first, second) -> bool:
    one, two = first.network.state_dict(), second.network.state_dict()
    return all(torch.equal(one[key], two[key]) for key in one)


def test_it_learns_and_reports_every_epoch(dataset, plan):
    calls = []
    trained = train(
        dataset, with_recipe(plan, epochs=6), lambda epoch, row: calls.append((epoch, row))
    )
    assert [epoch for epoch, _ in calls] == [1, 2, 3, 4, 5, 6]
    assert [row for _, row in calls] == trained.history
    assert trained.history[-1]["validation/accuracy"] > 0.8
    assert trained.history[-1]["train/loss"] < trained.history[0]["train/loss"]
    assert trained.rows()[0]["epoch"] == 1


def test_the_seed_decides_everything(dataset, plan):
    first, second = train(dataset, plan), train(dataset, plan)
    assert equal(first, second)
    assert not equal(first, train(dataset, replace(plan, seed=1)))


def test_balanced_sampling_draws_every_class_equally_often(dataset, plan):
    labels = torch.zeros(900, dtype=torch.int64)
    labels[:30] = 1
    images = Images.of(dataset, CPU)
    images = replace(images, train=torch.zeros(900, 1, 8, 8), train_labels=labels)
    network = BranchyNet(single_exit(Backbone("resnet10", 1, len(dataset.classes), 8, 4)))

    def order(sampling: str) -> torch.Tensor:
        chosen = with_recipe(plan, sampling=sampling)
        return _Training(
            network, network, CrossEntropy(), images, chosen, None, None
        )._order()  # fmt: skip

    assert sorted(order("uniform").tolist()) == list(range(900))
    assert 380 < (labels[order("balanced")] == 1).sum() < 520


@pytest.mark.parametrize(
    "changes",
    [
        {"nesterov": False},
        {"optimiser": "adam", "learning_rate": 0.003},
        {"optimiser": "adamw", "learning_rate": 0.003, "decay_norms": False},
        {"schedule": "cosine"},
        {"schedule": "step", "warmup": 0.0},
        {"label_smoothing": 0.1},
        {"ema": 0.9},
        {"clip": 0.5},
    ],
    ids=str,
)
def test_every_option_learns_and_matters(dataset, plan, changes):
    base = with_recipe(plan, epochs=5)
    trained = train(dataset, with_recipe(base, **changes))
    assert trained.history[-1]["train/loss"] < 0.9 * math.log(3)
    assert trained.history[-1]["validation/accuracy"] > 0.6
    assert not equal(trained, train(dataset, base))


@pytest.mark.parametrize(("width", "last"), [(16, True), (4, False)])
def test_narrow_networks_stay_channels_first_on_the_cpu(dataset, plan, width, last):
    """With channels last PyTorch would corrupt memory: see docs/log.md."""
    trained = train(dataset, with_recipe(plan, epochs=1, batch_size=25), width=width)
    convolutions = [m for m in trained.network.modules() if isinstance(m, nn.Conv2d)]
    # With one input channel or one pixel, both layouts are the same.
    weights = [m.weight for m in convolutions if m.in_channels > 1 and m.kernel_size != (1, 1)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) == last for w in weights)


def test_bf16_trains(dataset, plan):
    fast = replace(plan, training=replace(plan.training, precision="bf16"))
    trained = train(dataset, with_recipe(fast, epochs=5))
    assert trained.history[-1]["validation/accuracy"] > 0.6
    assert all(t.dtype != torch.bfloat16 for t in trained.network.state_dict().values())


def test_the_moving_average_is_what_is_kept(dataset, plan):
    averaged, plain = train(dataset, with_recipe(plan, ema=0.5)), train(dataset, plan)
    assert averaged.history[-1]["train/loss"] == plain.history[-1]["train/loss"]
    assert not equal(averaged, plain)
    images = Images.of(dataset, CPU)
    logits = predict(averaged.network, images.validation, images.normalise)[-1]
    correct = (logits.argmax(-1) == images.validation_labels).double().mean()
    assert float(correct) == averaged.history[-1]["validation/accuracy"]


def test_patience_stops_on_validation_loss_and_keeps_the_best_epoch(dataset, plan, capsys):
    still = with_recipe(plan, epochs=20, learning_rate=1e-9, patience=2)
    trained = train(dataset, still)
    assert 8 <= len(trained.history) < 20  # not in the six epochs of warm-up
    assert f"toy ended early, after epoch {len(trained.history)} of 20" in capsys.readouterr().err
    losses = [row["validation/loss"] for row in trained.history]
    assert trained.metrics["validation/loss"] == min(losses)
    images = Images.of(dataset, CPU)
    assert evaluate(trained.network, images)["validation/loss"] == min(losses)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_with_patience_the_best_of_all_epochs_is_kept(dataset, plan, capsys, ema):
    """A rate that rises to the end: the last epochs are worse, and none of them counts."""
    rising = with_recipe(plan, epochs=6, learning_rate=1.0, warmup=0.999, patience=1, ema=ema)
    trained = train(dataset, rising)
    losses = [row["validation/loss"] for row in trained.history]
    assert len(losses) == 6
    assert trained.kept == 1 + losses.index(min(losses)) < 6
    assert f"of toy epoch {trained.kept} of 6 is kept" in capsys.readouterr().err
    images = Images.of(dataset, CPU)
    assert evaluate(trained.network, images)["validation/loss"] == min(losses)


TRAINS, WARNS = "", "warning: on validation toy "
EXTREMES = [
    *[
        ({"schedule": schedule, "warmup": warmup}, TRAINS)
        for schedule in ("one_cycle", "cosine", "step")
        for warmup in (0.0, 0.999)
    ],
    *[({"schedule": "step", "milestones": m}, TRAINS) for m in ((), (1e-9,), (1e6,), (2, 3))],
    *[({"patience": patience}, TRAINS) for patience in (1, 1_000_000)],
    *[({"ema": ema}, TRAINS) for ema in (1e-9, 0.9999999)],  # before: the first step's weights
    *[({"clip": clip}, words) for clip, words in ((1e-12, WARNS), (1e12, TRAINS))],
    ({"label_smoothing": 0.9999}, WARNS),
    *[({"momentum": momentum}, TRAINS) for momentum in (1e-9, 0.999999)],
    *[({"weight_decay": decay}, words) for decay, words in ((0.0, TRAINS), (10.0, WARNS))],
    ({"learning_rate": 1e-12}, WARNS),
    ({"learning_rate": 1000.0}, "lower learning_rate (now 1000.0)"),
    ({"optimiser": "adam", "learning_rate": 1000.0}, WARNS),
    ({"batch_size": 97}, "exceeds the 96 training images"),
    ({"epochs": 1, "batch_size": 96, "schedule": "cosine"}, WARNS),  # one step at rate 0
    *[({"crop_padding": pixels}, words) for pixels, words in ((1, TRAINS), (7, WARNS))],
    ({"cutout": 7}, TRAINS),
    ({"mixup": 100.0, "cutmix": 100.0}, TRAINS),
    ({"mixup": 1e-9, "cutmix": 1e-9}, TRAINS),
    ({"trivial_augment": True}, TRAINS),
    ({"precision": "bf16", "channels_last": False, "checkpoint_every": 1_000_000}, TRAINS),
]


@pytest.mark.parametrize(("changes", "words"), EXTREMES, ids=str)
def test_an_option_at_its_extreme_trains_or_the_reason_is_said(
    dataset, plan, capsys, changes, words
):
    plan = with_recipe(plan, epochs=5)
    for part in ("training", "augmentation"):
        fields = {f.name for f in dataclasses.fields(getattr(plan, part))}
        chosen = {key: value for key, value in changes.items() if key in fields}
        plan = replace(plan, **{part: replace(getattr(plan, part), **chosen)})
        changes = {key: value for key, value in changes.items() if key not in fields}
    plan = with_recipe(plan, **changes)
    if words not in (TRAINS, WARNS):
        with pytest.raises(InputError) as caught:
            train(dataset, plan)
        assert words in str(caught.value)
        return
    trained = train(dataset, plan)
    assert (WARNS in capsys.readouterr().err) == (words == WARNS)
    assert (trained.metrics["validation/accuracy"] > 0.55) == (words == TRAINS)


def test_a_class_that_is_never_answered_is_named(dataset, plan, capsys):
    own, plan = dataset["train"], with_recipe(plan, epochs=5)
    two = Split(own.images[own.labels != 2], own.labels[own.labels != 2])
    splits = {"train": two, "validation": dataset["validation"]}
    skewed = replace(dataset, splits=splits, classes=("down", "le{f}t", "\x1b[31mup"))
    assert train(skewed, plan).metrics["validation/never_answered"] == 1
    assert r"on validation toy never answers \x1b[31mup; look at" in capsys.readouterr().err
    assert train(dataset, plan).metrics["validation/never_answered"] == 0
    assert "never answers" not in capsys.readouterr().err


def test_a_batch_larger_than_the_split_is_refused(dataset, plan):
    with pytest.raises(InputError, match="batch_size = 100 exceeds the 96 training images"):
        train(dataset, with_recipe(plan, batch_size=100))


def test_a_diverged_loss_stops_with_what_to_change(dataset, plan):
    with pytest.raises(InputError, match="loss of toy diverged in epoch 1; lower learning_rate"):
        train(
            dataset, with_recipe(plan, learning_rate=1000.0, weight_decay=10.0, schedule="cosine")
        )


def test_predict_is_the_same_in_any_batching_and_keeps_the_mode(network, dataset, monkeypatch):
    images = Images.of(dataset, CPU)
    whole = predict(network.train(), images.validation, images.normalise)
    assert network.training
    monkeypatch.setattr("edgeke.learning.predict._BATCH", 7)
    parts = predict(network, images.validation, images.normalise)
    assert whole.shape == (3, 60, 3)
    assert torch.allclose(whole, parts, atol=1e-5)


def test_one_cycle_is_torchs(plan):
    steps, warmup = 50, 0.3
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.1, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    # torch counts the warm-up in steps and ends it one early: compare where both fall.
    share = (warmup * steps - 1) / (steps - 1)
    ours = with_recipe(plan, epochs=1, learning_rate=0.1, warmup=share)
    for step in range(steps):
        if step > 0.4 * steps:
            rate = learning_rate(ours, step, steps)
            assert rate == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-9)
        optimiser.step()
        theirs.step()


def test_cosine_at_worked_points(plan):
    ours = with_recipe(plan, epochs=101, learning_rate=1.0, schedule="cosine", warmup=0.1)
    rates = [learning_rate(ours, step, 1) for step in (5, 10, 55, 100)]
    assert rates == pytest.approx([0.5, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("epochs", "milestones", "falls"),
    [
        (400, (0.25, 0.5, 0.8), (100, 200, 320)),  # the published schedule
        (300, (100, 200, 320), (100, 200)),  # as epochs: the published schedule at 300 epochs
        (250, (80, 180, 240), (80, 180, 240)),  # the published fine-tuning
    ],
)
def test_milestones_are_shares_or_epochs(plan, epochs, milestones, falls):
    """The rate falls tenfold with the first step of these epochs, counted from 0."""
    ours = with_recipe(
        plan, epochs=epochs, learning_rate=0.1, schedule="step", warmup=0.0, milestones=milestones
    )
    for epoch in range(epochs):
        published = 0.1 * 0.1 ** sum(epoch >= fall for fall in falls)
        rates = [learning_rate(ours, 7 * epoch + step, 7) for step in (0, 6)]
        assert rates == pytest.approx([published, published])
