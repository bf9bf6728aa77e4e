"""The steel benchmark's parameters; its measurements take minutes."""

from benchmarks.backbones import steel
from edgeke.params import parse


def test_parts_differ_in_what_they_say():
    assert parse(steel(64)).profile.data.image_size == 64
    few = parse(steel(data={"validation": 600}, network={"weights": None, "trunk": "finetuned"}))
    assert few.profile.data.validation == 600
    assert few.profile.student.weights is None
    assert parse(steel()).profile.student.trunk == "frozen"
