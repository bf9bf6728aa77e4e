import numpy as np
import pytest
from draws import draw

from edgeke.errors import InputError
from edgeke.policy.samples import ExitLogits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:1], y), "at least two"),
        (lambda x, y: (x[0], y), "at least two"),
        (lambda x, y: (x, y[:-1]), "30 samples and 29 labels"),
        (lambda x, y: (x[:, :0], y[:0]), "at least one sample"),
        (lambda x, y: (np.where(np.arange(30)[:, None] == 7, np.nan, x), y), "finite at sample 7"),
        (lambda x, y: (x, y + 4), "is not one of the 5 classes"),
        (lambda x, y: (x, y - 1), "label -1"),
    ],
)
def test_bad_logits_are_refused(change, words):
    split = draw(30)
    with pytest.raises(InputError, match=words):
        ExitLogits(*change(split.logits, split.labels))
