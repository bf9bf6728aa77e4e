import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeke.device.session import open_session
from edgeke.graph.padding import fold_padding
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_static
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit

timm = pytest.importorskip("timm")


class Net(nn.Module):
    """TensorFlow's padding, which is computed from the input's size; zeros and others."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import Conv2dSame

        self.first, self.second = Conv2dSame(3, 4, 3, 2), Conv2dSame(4, 4, 5, 2)
        self.third, self.fourth = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        x = self.third(nn.functional.pad(x, (1, 0, 2, 0)))
        x = self.fourth(nn.functional.pad(x, (1, 2, 0, 1), value=0.5))
        return nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")


@pytest.mark.parametrize("size", [32, 33, 40])
def test_padding_moves_into_convolutions_and_changes_nothing(size):
    torch.manual_seed(0)
    network, images = Net().eval(), torch.randn(2, 3, size, size)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (images,), buffer, dynamo=False, input_names=["x"], opset_version=18,
            dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
    model = onnx.load_from_string(buffer.getvalue())
    assert sum(node.op_type == "Pad" for node in model.graph.node) == 5
    fold_padding(model, images.numpy())
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    assert sorted(kinds) == ["Conv"] * 4 + ["Pad"] * 2, "one pads with 0.5, one reflects"
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = network(images).numpy()
    answers = open_session(model.SerializeToString()).run(None, {"x": images.numpy()})[0]
    assert np.abs(answers - expected).max() < 1e-5


@pytest.mark.parametrize("size", [32, 96])
def test_vgg_pools_to_more_than_there_is(size):
    """Its classifier begins with 7x7 positions: of a map of 1x1 here, and of 3x3."""
    torch.manual_seed(0)
    network = BranchyNet(single_exit(Backbone("timm/vgg11_bn", 1, 3, size))).eval()
    model = export_static(network, (0.5,), (0.25,), size)
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 1), np.uint8)
    answers = segment_logits([model.SerializeToString()], images, 1)[0]
    normalised = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = network(normalised)[0].numpy()
    assert np.abs(answers - expected).max() < 1e-4 * np.abs(expected).max()
