import numpy as np
import pytest

from edgeke.data.answers import never_answered, useless

NAMES = ("good", "scratch", "crack")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2])


def test_a_network_that_never_answers_a_class_is_named():
    assert useless(LABELS, LABELS, NAMES) is None
    answers = np.array([0, 0, 0, 1, 1, -1, 0, 0])
    assert never_answered(answers, LABELS) == [2]
    assert useless(np.tile(LABELS % 2, 9), np.tile(LABELS, 9), NAMES) == "never answers crack"
    words = useless(np.array([1, 1, 1, 0, 1, 1, 0, 0]), LABELS, NAMES)
    assert words.startswith("never answers crack and is right in 0.375 of the images")
    assert words.endswith("where answering good always would be in 0.500")


@pytest.mark.parametrize(("right", "said"), [(39, True), (40, False)])
def test_chance_is_no_merit_where_no_class_has_most_images(right, said):
    """100 images, always one class: 30 right; two standard deviations are 9.2 images."""
    labels = np.repeat([0, 1, 2, 3], [30, 30, 20, 20])
    answers = (labels + 1) % 4
    answers[:right] = labels[:right]
    assert (useless(answers, labels, (*NAMES, "dent")) is not None) == said


def test_finding_rare_images_for_as_many_false_alarms_is_some_use():
    labels = np.array([0] * 95 + [1] * 5)
    answers = np.array([0] * 92 + [1] * 3 + [0] * 2 + [1] * 3)
    assert useless(answers, labels, NAMES[:2]) is None
    answers[0] = 1
    assert "where answering good always would be in 0.950" in useless(answers, labels, NAMES[:2])
