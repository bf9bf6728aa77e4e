import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from toys import CLASSES, SIZE, randomise

from edgeke.data.augment import Normalise
from edgeke.data.dataset import channels_last
from edgeke.device.policy import force_exit
from edgeke.device.scores import SCORES, Score, biased, calibrated_probabilities
from edgeke.device.session import open_session
from edgeke.errors import InputError
from edgeke.graph.compose import IR_VERSION, OPSET, compose_cascade
from edgeke.graph.parity import check_close, check_exits
from edgeke.graph.runner import segment_logits
from edgeke.graph.scores import build_score, score_constants
from edgeke.graph.segments import export_segments
from edgeke.learning.predict import predict
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout
from edgeke.policy.cascade import run_cascade
from edgeke.policy.learned import fit_learned

TEMPERATURES = (0.8, 1.3, 2.0)
MAX_PROBABILITY = Score("max_probability")


@pytest.fixture
def images(dataset) -> np.ndarray:
    return dataset["validation"].images


@pytest.fixture
def segments(network, dataset) -> list[onnx.ModelProto]:
    return export_segments(network, dataset.mean, dataset.std, SIZE)


def torch_logits(network, dataset, images) -> np.ndarray:
    normalise = Normalise(dataset.mean, dataset.std, torch.device("cpu"))
    return predict(network, torch.from_numpy(images), normalise).numpy()


def run_file(model: onnx.ModelProto, images, thresholds, votes, bias=(0.0, 0.0, 0.0)):
    session = open_session(model.SerializeToString())
    feeds = {"thresholds": np.float32(thresholds), "votes": np.float32(votes)}
    feeds["bias"] = np.float32(bias)
    answers = [session.run(None, {"image": image[None], **feeds}) for image in images]
    return np.concatenate([a[0] for a in answers]), np.concatenate([a[1] for a in answers])


def composed(segments, score=MAX_PROBABILITY) -> onnx.ModelProto:
    return compose_cascade(
        segments,
        score=score,
        temperatures=TEMPERATURES,
        image_shape=(SIZE, SIZE, 1),
        classes=len(CLASSES),
        metadata={"policy": "{}"},
    )


def test_segments_equal_pytorch_for_any_batch(network, dataset, images, segments):
    models = [segment.SerializeToString() for segment in segments]
    expected = torch_logits(network, dataset, images)
    for count in (1, 7, len(images)):
        logits = segment_logits(models, channels_last(images[:count]), 1)
        assert np.allclose(logits, expected[:, :count], atol=1e-4)


@pytest.mark.parametrize(("layout", "shared"), [("stages", True), ("edgeke", False)])
def test_other_networks_are_exported_alike(dataset, images, layout, shared):
    """Attention heads, and branches that share nothing."""
    built = with_layout(layout, Backbone("resnet10", 1, len(CLASSES), SIZE, 4), shared=shared)
    network = randomise(BranchyNet(built))
    models = export_segments(network, dataset.mean, dataset.std, SIZE)
    logits = segment_logits([m.SerializeToString() for m in models], channels_last(images), 1)
    assert np.allclose(logits, torch_logits(network, dataset, images), atol=1e-4)
    whole = compose_cascade(
        models,
        score=MAX_PROBABILITY,
        temperatures=[1.0] * len(models),
        image_shape=(SIZE, SIZE, 1),
        classes=len(CLASSES),
        metadata={},
    )
    pixels, last = channels_last(images), len(models) - 1
    answer, exit = run_file(whole, pixels, force_exit(last, len(models)), [1.0] * len(models))
    assert (exit == last).all()
    expected = calibrated_probabilities(logits, [1.0] * len(models))[last]
    assert np.allclose(answer, expected, atol=1e-5)


def test_files_load_from_the_oldest_runtime_on(segments):
    for model in (*segments, composed(segments)):
        assert model.ir_version == 8
        assert [(s.domain, s.version) for s in model.opset_import] == [("", 18)]
        onnx.checker.check_model(model)


@pytest.mark.parametrize("name", [*SCORES, "learned"])
def test_the_composed_file_equals_the_vectorised_cascade(segments, dataset, name):
    labels, pixels = dataset["validation"].labels, channels_last(dataset["validation"].images)
    logits = segment_logits([s.SerializeToString() for s in segments], pixels, 1)
    probabilities = calibrated_probabilities(logits, TEMPERATURES)
    score = fit_learned(probabilities, labels) if name == "learned" else Score(name)
    scores = score.of(probabilities)
    model, votes = composed(segments, score), (0.3, 0.3, 0.4)
    middle = tuple(float(np.median(s)) + 1e-4 for s in scores)
    reached = set()
    for thresholds in [middle, (0.99, 0.5, 0.2), *(force_exit(e, 3) for e in range(4))]:
        answer, exit = run_file(model, pixels, thresholds, votes)
        expected = run_cascade(probabilities, scores, thresholds, votes)
        assert (exit == expected.exit).all()
        assert np.allclose(answer, expected.probabilities, atol=1e-5)
        reached |= set(exit.tolist())
    assert reached == {0, 1, 2, 3}


def test_a_bias_moves_answers_as_numpy_says_and_zeros_change_no_bit(segments, dataset):
    pixels = channels_last(dataset["validation"].images)[:20]
    model, votes, bias = composed(segments), (0.3, 0.3, 0.4), (0.0, 3.0, -1.0)
    before = next(n for n in model.graph.node if "bias_factors" in n.input).input[0]
    traced = onnx.ModelProto()
    traced.CopyFrom(model)
    traced.graph.output.append(onnx.helper.make_tensor_value_info(before, 1, [1, 3]))
    session = open_session(traced.SerializeToString())
    for thresholds in ((0.5, 0.5, 0.5), force_exit(3, 3)):
        plain, exit = run_file(model, pixels, thresholds, votes)
        moved, same = run_file(model, pixels, thresholds, votes, bias)
        assert (exit == same).all()
        assert np.allclose(moved, biased(plain, bias), atol=1e-6)
        by_hand = plain * np.exp(bias)
        assert np.allclose(moved, by_hand / by_hand.sum(axis=1, keepdims=True), atol=1e-5)
        assert (moved.argmax(-1) != plain.argmax(-1)).any()
        assert (biased(plain, (0.0,) * 3) == plain).all()
        feeds = {"thresholds": np.float32(thresholds), "votes": np.float32(votes)}
        feeds |= {"image": pixels[:1], "bias": np.zeros(3, np.float32)}
        answer, _, unbiased = session.run(None, feeds)
        assert (answer == unbiased).all()


@pytest.mark.parametrize("name", [*SCORES, "learned"])
@pytest.mark.parametrize("classes", [2, 10])
def test_score_nodes_equal_numpy(name, classes):
    """Every exit's score out of a graph of the score alone, on ordinary and extreme answers."""
    logits = np.random.default_rng(0).normal(0, 3, (3, 300, classes)).astype(np.float32)
    logits[:, :50] *= 100
    logits[:, 50:60] = 0
    probabilities = calibrated_probabilities(logits, TEMPERATURES)
    labels = np.arange(300) % classes
    score = fit_learned(probabilities, labels) if name == "learned" else Score(name)
    nodes, weights = [], [*score_constants(classes)]
    weights.append(numpy_helper.from_array(np.array([0], np.int64), "axis_0"))
    for exit in range(3):
        at_exit = build_score(score, exit)
        nodes += at_exit[0]
        weights += at_exit[1]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "scores",
        [value(f"e{e}_probabilities", TensorProto.FLOAT, [1, classes]) for e in range(3)],
        [value(f"e{e}_score", TensorProto.FLOAT, [1]) for e in range(3)],
        weights,
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    session = open_session(model.SerializeToString())
    outputs = [
        session.run(None, {f"e{e}_probabilities": probabilities[e, None, n] for e in range(3)})
        for n in range(300)
    ]
    assert np.allclose(np.array(outputs)[:, :, 0].T, score.of(probabilities), atol=1e-5)


def test_later_weights_are_in_the_branch_that_needs_them(segments):
    model = composed(segments)
    outer = {tensor.name for tensor in model.graph.initializer}
    assert not any(name.startswith(("s1_", "s2_")) for name in outer)
    assert any(name.startswith("s0_") for name in outer)
    conditional = [node for node in model.graph.node if node.op_type == "If"]
    assert len(conditional) == 1


def test_parity_reports_and_refuses():
    a = np.zeros((2, 3), np.float32)
    assert check_close("x", a, a + 1e-6, 1e-4) == pytest.approx(1e-6)
    with pytest.raises(InputError, match=r"exit_0 in ONNX is off by 1\.00e-01"):
        check_close("exit_0 in ONNX", a, a + 0.1, 1e-4)
    with pytest.raises(InputError, match="off by nan"):
        check_close("x", a, a + np.nan, 1e-4)


def test_exits_may_differ_only_at_ties():
    scores = np.array([[0.5, 0.9], [0.1, 0.1]], np.float32)
    thresholds = np.array([0.5, 0.5], np.float32)
    assert check_exits(np.array([0, 0]), np.array([2, 0]), scores, thresholds, 1e-5) == 1
    with pytest.raises(InputError, match="leaves at exit 1 where the cascade leaves at 0"):
        check_exits(np.array([2, 1]), np.array([2, 0]), scores, thresholds, 1e-5)
