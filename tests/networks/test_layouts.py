import pytest

from edgeke.errors import InputError
from edgeke.networks.architecture import Backbone, ExitSpec
from edgeke.networks.layouts import single_exit, with_layout

RESNET10 = Backbone("resnet10", 1, 3, 8, 4)
RESNET18 = Backbone("resnet18", 3, 10, 32, 16)


def test_the_papers_layout():
    # REFERENCE: shared up to layer3.0, up to layer3, and ResNet18 itself.
    assert with_layout("edgeke", RESNET18).exits == (
        ExitSpec("layer3.0", "branch"),
        ExitSpec("layer3.1", "branch"),
        ExitSpec("layer4.1", "main"),
    )


def test_stages_attaches_before_each_halving():
    exits = with_layout("stages", RESNET18).exits
    assert [exit.attach for exit in exits] == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]


def test_shares_of_operations_are_the_nearest_cut_points():
    # layer1.0, layer2.1 and layer3.1 end at 15, 52 and 76 % of the operations.
    exits = with_layout((0.1, 0.5, ExitSpec(0.8, "linear")), RESNET18).exits
    assert list(map(str, exits)) == [
        "layer1.0:pooled", "layer2.1:pooled", "layer3.1:linear", "layer4.1:main",
    ]  # fmt: skip


def test_shares_never_meet_at_one_cut_point():
    exits = with_layout((0.5, 0.51, 0.52), RESNET18).exits
    assert [exit.attach for exit in exits[:-1]] == ["layer2.0", "layer2.1", "layer3.0"]
    beside = with_layout((ExitSpec("layer2.1", "linear"), 0.52), RESNET18).exits
    assert [exit.attach for exit in beside[:-1]] == ["layer2.1", "layer3.0"]
    with pytest.raises(InputError, match="10 exits, and resnet18 has 8 cut points"):
        with_layout([step / 11 for step in range(1, 11)], RESNET18)


def test_a_layout_of_ones_own():
    own = (ExitSpec("layer1.0", "linear"), ExitSpec("layer3.0", "attention"))
    assert with_layout(own, RESNET10).exits == (*own, ExitSpec("layer4.0", "main"))
    # A stage ends where its last block does.
    assert with_layout((ExitSpec("layer3", "linear"),), RESNET18).exits[0].attach == "layer3.1"
    assert single_exit(RESNET10).exits == (ExitSpec("layer4.0", "main"),)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([("layer9.0", "linear")], r"layer9\.0'.*attach it to one of layer\d\.0"),
        ([("layer3.0.conv1", "linear")], "not a cut point of resnet10"),
        ([("fc", "linear")], "fc: it belongs to the classifier.* after .*layer4.0"),
        ([("layer3.0", "linear"), ("layer1.0", "linear")], "shallow to deep"),
        ([("layer3.0", "linear"), ("layer3.0", "pooled")], "two exits to layer3.0"),
        ([("layer4.0", "linear")], "shallow to deep"),  # where the main exit is
        ([("layer3.0", "main")], "rest of the backbone after its last feature map, layer4.0"),
    ],
)
def test_impossible_exits_are_refused(exits, message):
    with pytest.raises(InputError, match=message):
        with_layout([ExitSpec(*exit) for exit in exits], RESNET10)
