import pytest

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture, Backbone, ExitSpec, check_layout

RESNET = Backbone("resnet10", 1, 3, 8, 4)


def test_round_trip_through_json(architecture):
    assert Architecture.from_json(architecture.to_json()) == architecture
    with pytest.raises(InputError, match="not the description of an EdgeKE network"):
        Architecture.from_json({"backbone": "resnet18"})


def test_a_branch_is_one_exit_alone(architecture):
    assert architecture.branch(1).exits == (architecture.exits[1],)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("resnet19", 1, 3, 8), "did you mean resnet18.*resnet10, resnet18, resnet34, or timm/"),
        (("timm/resnet18", 1, 3, 32, 64), "remove the key"),
        (("resnet18", 1, 3, 8, 4, "small"), "only timm's networks"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused_without_building_it(values, message):
    with pytest.raises(InputError, match=message):
        Backbone(*values)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("paper", "layout 'paper' is unknown; use one of edgeke, stages"),
        ((), "leaves nothing to choose from"),
        ((0.5, 1.5), "lies between 0 and 1"),
        ((0.5, 0.2), "smaller shares first"),
        ((0.5, 0.5), "two exits to 0.5"),
        ((ExitSpec("stem", "linear"), ExitSpec("stem", "pooled")), "two exits to stem"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_without_the_network(layout, message):
    with pytest.raises(InputError, match=message):
        check_layout(layout)
    check_layout("edgeke")
    check_layout((0.1, ExitSpec(0.2, "linear"), ExitSpec("layer4.0", "pooled")))


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="exit kind 'side' is unknown; use one of branch"):
        ExitSpec("layer3.0", "side")
