import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from toys import SIZE, randomise

from edgeke.data.dataset import channels_last
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.refit import refit_heads
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout


def logits(segments, images):
    return segment_logits([model.SerializeToString() for model in segments], images, 1)


@pytest.fixture(scope="module")
def segments(dataset) -> list[onnx.ModelProto]:
    torch.manual_seed(0)
    backbone = Backbone("resnet10", 1, 3, SIZE, 8)
    network = randomise(BranchyNet(with_layout([0.2, 0.6], backbone)))
    return export_segments(network, dataset.mean, dataset.std, SIZE)


def test_refitted_heads_answer_more_like_single_precision(segments, dataset):
    train, shown = (channels_last(dataset[name].images) for name in ("train", "validation"))
    coarse = quantise_segments(segments, train)
    before = [model.SerializeToString() for model in coarse]
    refitted = refit_heads(coarse, segments, train)
    assert [model.SerializeToString() for model in coarse] == before
    exact = logits(segments, shown)
    errors = [np.square(logits(m, shown) - exact).mean((1, 2)) for m in (coarse, refitted)]
    assert (errors[1] < errors[0]).all()


def test_a_head_that_reads_something_else_is_found_again(segments, dataset):
    """Its features are the same here, so regression has a known answer: the old weights."""
    train = channels_last(dataset["train"].images)
    spoilt = copy.deepcopy(segments)
    for model in spoilt:
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        for tensor in model.graph.initializer:
            if tensor.name == gemm.input[2]:
                moved = numpy_helper.to_array(tensor) + np.float32([3, -2, 1])
                tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    restored = refit_heads(spoilt, segments, train)
    assert np.abs(logits(spoilt, train) - logits(segments, train)).max() > 2
    assert np.abs(logits(restored, train) - logits(segments, train)).max() < 1e-3


def test_logits_of_no_linear_layer_stay(segments, dataset):
    last = copy.deepcopy(segments[-1])
    last.graph.output[0].name = "doubled"
    last.graph.node.append(onnx.helper.make_node("Add", ["logits", "logits"], ["doubled"]))
    kept = refit_heads([*segments[:-1], last], segments, channels_last(dataset["train"].images))
    assert kept[-1].SerializeToString() == last.SerializeToString()
