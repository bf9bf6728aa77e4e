"""Images that are no squares, from the network to the device."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from draws import draw, settings
from toys import CLASSES

from edgeke.calibrate import compose
from edgeke.device.classifier import Classifier
from edgeke.device.manifest import Manifest
from edgeke.errors import InputError
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.architecture import Architecture, Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.layouts import with_layout
from edgeke.networks.tracing import trace
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy

SIDES = (16, 72)


@pytest.mark.parametrize("layout", ["edgeke", "stages", [0.3]])
def test_a_line_of_pixels_is_answered_as_pytorch_does(tmp_path: Path, layout):
    backbone = Backbone("resnet10", 1, 3, SIDES, 4)
    network = BranchyNet(with_layout(layout, backbone)).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, *SIDES, 1), np.uint8)
    with torch.no_grad():
        normalised = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        expected = np.stack([logits.numpy() for logits in network(normalised)])
    files = []
    for number, model in enumerate(export_segments(network, (0.5,), (0.25,), SIDES)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    assert np.allclose(segment_logits(files, images, 1), expected, atol=1e-4)
    costs = tuple(cost.macs for cost in exit_costs(network, SIDES))
    blocks, names = list_blocks(network, SIDES), tuple(file.name for file in files)
    manifest = Manifest(names, costs, costs[-1], CLASSES, (*SIDES, 1), blocks=blocks)
    split = draw(300, classes=3, strengths=(1.0, 2.0, 3.0, 4.0)[: len(costs)])
    fitted, _ = fit_policy(split, costs, costs[-1], settings())
    model = compose(files, certify(fitted, split, settings()), manifest)
    (tmp_path / "edgeke.onnx").write_bytes(model)
    classifier = Classifier(tmp_path / "edgeke.onnx")
    assert classifier.image_shape == (*SIDES, 1)
    answer = classifier.forced(len(costs) - 1)(images[0])
    assert answer.label == expected[-1, 0].argmax()


def test_the_sides_go_with_the_checkpoint():
    one = with_layout("edgeke", Backbone("resnet10", 1, 3, SIDES, 4))
    assert Architecture.from_json(one.to_json()) == one
    read = {**one.to_json(), "backbone": {**one.to_json()["backbone"], "image_size": [16, 72]}}
    assert Architecture.from_json(read) == one
    assert Backbone("resnet10", 1, 3, (16, 16), 4) == Backbone("resnet10", 1, 3, 16, 4)


def test_a_side_that_is_too_small_is_named():
    with pytest.raises(InputError, match="8x512.*smallest"):
        trace(Backbone("timm/tf_efficientnet_lite0", 3, 3, (8, 512)))
