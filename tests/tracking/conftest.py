"""Parameters whose runs land in an experiment of the test's own."""

import copy

import pytest
import yaml
from toys import ROOT

from edgeke import params


@pytest.fixture
def loaded(request) -> params.Params:
    """params.yaml, with an experiment of the test's own."""
    content = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    content["tracking"]["experiment"] = request.node.name
    return params.parse(content)
