import pytest

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture, ExitSpec, block_names, layout_exits


def test_blocks_of_resnet18_in_order():
    stages = [f"layer{s}.{i}" for s in (1, 2, 3, 4) for i in (0, 1)]
    assert block_names("resnet18") == ("stem", *stages)
    with pytest.raises(InputError, match="resnet18, resnet34"):
        block_names("resnet19")


def test_the_papers_layout():
    # REFERENCE: shared up to layer3.0, up to layer3, and ResNet18 itself.
    assert layout_exits("edgeke", "resnet18") == (
        ExitSpec("layer3.0", "branch"),
        ExitSpec("layer3.1", "branch"),
        ExitSpec("layer4.1", "main"),
    )
    with pytest.raises(InputError, match="layout 'paper' is unknown; use one of edgeke, stages"):
        layout_exits("paper", "resnet18")


def test_a_layout_of_ones_own():
    own = (ExitSpec("layer1.1", "linear"), ExitSpec("layer3.0", "attention"))
    assert layout_exits(own, "resnet18") == (*own, ExitSpec("layer4.1", "main"))


def test_round_trip_through_json(architecture):
    assert Architecture.from_json(architecture.to_json()) == architecture
    with pytest.raises(InputError, match="not the description of an EdgeKE network"):
        Architecture.from_json({"backbone": "resnet18"})


def test_impossible_exits_are_refused():
    with pytest.raises(InputError, match=r"layer9\.0.*attach it to one of stem, layer1\.0"):
        Architecture("resnet10", 4, 1, 3, (ExitSpec("layer9.0", "main"),))
    with pytest.raises(InputError, match="shallow to deep"):
        Architecture(
            "resnet10", 4, 1, 3, (ExitSpec("layer3.0", "branch"), ExitSpec("layer1.0", "main"))
        )
    with pytest.raises(InputError, match=r"branch behind layer4\.0 has no next block"):
        layout_exits((ExitSpec("layer4.0", "branch"),), "resnet10")
    with pytest.raises(InputError, match="exit kind 'side' is unknown"):
        Architecture("resnet10", 4, 1, 3, (ExitSpec("layer3.0", "side"),))


def test_a_branch_is_one_exit_alone(architecture):
    assert architecture.branch(1).exits == (architecture.exits[1],)
