"""Answers under promises about a class, and answers that are unsure."""

import json

import numpy as np
import pytest
import torch
from bundles import build
from toys import CLASSES, SIZE, randomise, replace

from edgeke.device import cli
from edgeke.device.choice import UnmetError
from edgeke.device.classifier import Classifier
from edgeke.errors import InputError
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import ClassShare, Requirement

NAME = CLASSES[1]


@pytest.fixture(scope="module")
def inspector(architecture, dataset, tmp_path_factory):
    torch.manual_seed(0)
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    share = ClassShare(**{"class": NAME, "share": 0.5})
    chosen = (
        Requirement(max_miss=share),
        Requirement(min_recall=share),
        Requirement(max_sure_error=0.9),
    )
    folder = tmp_path_factory.mktemp("inspector")
    return build(folder, segments, "max_probability", "", dataset, (), chosen)


def test_a_bias_and_unsure_answers_are_the_same_alone_and_in_a_batch(inspector, images):
    classifier = Classifier(inspector)
    share = 1 - min(
        p.promised("min_recall", 0.1, 2, NAME) for p in classifier.policy.points
    )  # the most that can be asked for
    recall = {"class": NAME, "share": share - 1e-6}
    for requested in ({"min_recall": recall}, {"max_sure_error": 0.999}):
        alone = [classifier.predict(image, **requested) for image in images]
        batch = classifier.predict_batch(images, **requested)
        for one, other in zip(alone, batch, strict=True):
            assert (one.label, one.class_name, one.exit) == (
                other.label, other.class_name, other.exit,
            )  # fmt: skip
            assert np.allclose(one.probabilities, other.probabilities, atol=1e-5)
    favoured = [a.label for a in classifier.predict_batch(images, min_recall=recall)]
    plain = [a.label for a in classifier.predict_batch(images)]
    assert classifier.predict(images[0], min_recall=recall).point.bias
    assert favoured.count(1) > plain.count(1)


def test_what_no_exit_is_sure_of_is_no_answer(inspector, images):
    classifier = Classifier(inspector)
    deepest = classifier.forced(2)
    middle = float(np.median([deepest(image).probabilities.max() for image in images]))
    point = next(p for p in classifier.policy.points if p.unsure)
    point = replace(point, name="half", thresholds=(2.0, 2.0, middle))
    points = (*classifier.policy.points, point)
    classifier.policy = replace(classifier.policy, points=points, default="half")
    classifier._plans.clear()  # opening has chosen the default already
    answers = [classifier.predict(image) for image in images]
    unsure = [answer for answer in answers if answer.exit == 3]
    assert 0 < len(unsure) < len(answers)
    assert {(a.label, a.class_name, a.unsure) for a in unsure} == {(-1, "unsure", True)}
    assert all(a.unsure == (a.exit == 3) for a in classifier.predict_batch(images))
    assert not any(answer.unsure for answer in answers if answer.exit < 3)


def test_the_command_line_takes_a_class_and_shows_the_promises(inspector, images, tmp_path, capsys):
    np.save(tmp_path / "a.npy", images[0])
    start = ["predict", str(inspector), str(tmp_path / "a.npy"), "--json"]
    assert cli.main([*start, "--min-recall", f"{NAME}=0.01"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] in CLASSES
    assert cli.main([*start, "--max-sure-error", "0.999"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["unsure"] == (row["label"] == -1)
    assert 0 < row["automation"] <= 1
    assert cli.main([*start, "--min-recall", NAME]) == 1
    assert "must be a class and a share" in capsys.readouterr().err
    assert cli.main([*start, "--min-recall", f"{NAME}=0.9999"]) == 1
    assert f"calibration images of class {NAME} are too few" in capsys.readouterr().err
    assert cli.main(["info", str(inspector)]) == 0
    assert f"max_miss of {NAME}: " in capsys.readouterr().out


def test_a_model_without_such_points_says_what_to_add(classifier, images):
    with pytest.raises(InputError, match=r"no points for max_sure_error; add it to calibrate\.req"):
        classifier.predict(images[0], max_sure_error=0.1)
    with pytest.raises(InputError, match=f"no points for min_recall of class {NAME}; add it"):
        classifier.predict(images[0], min_recall=f"{NAME}=0.9")
    assert not issubclass(InputError, UnmetError)
