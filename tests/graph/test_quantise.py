import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from toys import SIZE, randomise

from edgeke.data.dataset import channels_last
from edgeke.device.session import open_session
from edgeke.graph.quantise import has_depthwise, quantise, quantise_segments
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit, with_layout


@pytest.fixture(scope="module", params=["edgeke", "stages"])
def segments(dataset, request) -> list[onnx.ModelProto]:
    torch.manual_seed(0)
    network = randomise(BranchyNet(with_layout(request.param, Backbone("resnet10", 1, 3, SIZE, 4))))
    return export_segments(network, dataset.mean, dataset.std, SIZE)


def test_int8_answers_nearly_alike_in_any_batch(segments, dataset):
    train, shown = (channels_last(dataset[name].images) for name in ("train", "validation"))
    quantised = [m.SerializeToString() for m in quantise_segments(segments, train)]
    exact = segment_logits([m.SerializeToString() for m in segments], shown, 1)
    coarse = segment_logits(quantised, shown, 1)
    assert np.abs(coarse - exact).mean() < 0.05 * np.ptp(exact)
    assert not np.array_equal(coarse, exact)
    assert np.array_equal(segment_logits(quantised, shown[:1], 1), coarse[:, :1])


def test_files_stay_standard_and_old_runtimes_can_read_them(segments, dataset):
    images = channels_last(dataset["train"].images)
    before = [m.SerializeToString() for m in segments]
    for model in quantise_segments(segments, images):
        assert model.ir_version == 8
        assert [(s.domain, s.version) for s in model.opset_import] == [("", 18)]
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(model, full_check=True)
        weights = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        kinds = {t.data_type for t in model.graph.initializer if t.name in weights}
        assert onnx.TensorProto.INT8 in kinds
        assert onnx.TensorProto.FLOAT not in kinds
    assert [m.SerializeToString() for m in segments] == before, "the fp32 graphs must stay as given"


def test_the_runtime_computes_all_convolutions_but_the_first_in_int8(network, dataset, tmp_path):
    """Also where equal biases are shared by the exporter: an untrained network's are all 0."""
    import onnxruntime

    for plain in (
        network,
        BranchyNet(with_layout("edgeke", Backbone("resnet10", 1, 3, SIZE, 4))).eval(),
    ):
        model = export_static(plain, dataset.mean, dataset.std, SIZE)
        small = quantise(model, channels_last(dataset["train"].images))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        providers = ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(small.SerializeToString(), options, providers=providers)
        kinds = collections.Counter(
            n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node
        )
        assert kinds["Conv"] == 1, "the first, of one channel"
        assert kinds["QLinearConv"] > 5


def test_an_int8_file_is_smaller(dataset):
    network = BranchyNet(single_exit(Backbone("resnet10", 1, 3, SIZE, 16))).eval()
    model = export_static(network, dataset.mean, dataset.std, SIZE)
    small = quantise(model, channels_last(dataset["train"].images))
    assert len(small.SerializeToString()) < 0.4 * len(model.SerializeToString())
    assert open_session(small.SerializeToString()).get_inputs()[0].name == "image"


def test_depthwise_convolutions_and_weights_as_asked_for(dataset):
    backbone = Backbone("timm/mobilenetv3_small_050", 1, 3, 32)
    network = randomise(BranchyNet(single_exit(backbone)))
    model = export_static(network, dataset.mean, dataset.std, 32)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 1), np.uint8)
    assert has_depthwise([model])
    assert not has_depthwise([export_static(
        BranchyNet(single_exit(Backbone("resnet10", 1, 3, SIZE, 4))).eval(),
        dataset.mean, dataset.std, SIZE,
    )])  # fmt: skip

    def weights(quantised: onnx.ModelProto) -> list[np.ndarray]:
        tensors = {t.name: t for t in quantised.graph.initializer}
        names = [n.input[0] for n in quantised.graph.node if n.op_type == "DequantizeLinear"]
        arrays = [onnx.numpy_helper.to_array(tensors[name]) for name in names if name in tensors]
        return [array for array in arrays if array.dtype == np.int8]

    everywhere = weights(quantise(model, images))
    assert any(array.shape[1] == 1 and array.ndim == 4 for array in everywhere)
    assert max(np.abs(array.astype(int)).max() for array in everywhere) <= 64
    some = weights(quantise(model, images, depthwise=False, weight_bits=8))
    assert 0 < len(some) < len(everywhere)
    assert not any(array.shape[1] == 1 and array.ndim == 4 for array in some)
    assert max(np.abs(array.astype(int)).max() for array in some) > 64


def test_what_stays_in_single_precision_is_not_quantised_on_loading():
    """ONNX Runtime gives such weights one scale for all channels: here most would become 0."""
    random = np.random.default_rng(0)
    depthwise = random.normal(size=(64, 1, 3, 3)).astype(np.float32)
    depthwise[0] *= 1000
    weights = {
        "one": random.normal(size=(64, 8, 1, 1)).astype(np.float32),
        "depthwise": depthwise,
        "three": random.normal(size=(4, 64, 1, 1)).astype(np.float32),
    }
    weights["three"][:, 0] = 0  # the large channel is not read: the small ones decide
    nodes, tensor = [], "features_in"
    for number, name in enumerate(weights):
        more = {"group": 64, "pads": [1] * 4} if name == "depthwise" else {}
        node = onnx.helper.make_node("Conv", [tensor, name], [f"{name}_out"], name, **more)
        last = number == len(weights) - 1
        tensor = "logits" if last else f"{name}_relu"
        nodes += [node, onnx.helper.make_node("Relu", node.output, [tensor], tensor)]
    shapes = (("features_in", ["n", 8, 8, 8]), ("logits", ["n", 4, 8, 8]))
    ends = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "toy", ends[:1], ends[1:], held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 8
    features = random.random((32, 8, 8, 8), np.float32)
    quantised = quantise(model, features, depthwise=False).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    as_written = onnxruntime.InferenceSession(quantised, options, ["CPUExecutionProvider"])
    sessions = (as_written, open_session(quantised))
    exact, answers = (s.run(None, {"features_in": features})[0] for s in sessions)
    assert np.abs(answers - exact).mean() < 0.02 * exact.std()
