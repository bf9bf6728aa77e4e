import pytest

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture


def test_round_trip_through_json(architecture):
    assert Architecture.from_json(architecture.to_json()) == architecture
    with pytest.raises(InputError, match="not the description of an EdgeKE network"):
        Architecture.from_json({"backbone": "resnet18"})
