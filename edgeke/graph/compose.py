"""Composes segments into the one file: nested If nodes, so an early exit skips the rest."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from edgeke.device.scores import Score
from edgeke.graph.scores import build_score, score_constants

# The widest support for a file with If nodes: ONNX Runtime 1.15.1 and everything newer.
OPSET = 18
IR_VERSION = 8


def compose_cascade(
    segments: Sequence[onnx.ModelProto],
    *,
    score: Score,
    temperatures: Sequence[float],
    image_shape: tuple[int, int, int],
    classes: int,
    metadata: Mapping[str, str],
    watched: bool = False,
) -> onnx.ModelProto:
    """One standard ONNX model that answers at the first exit that is sure.

    Inputs: `image` uint8 `[1, H, W, C]`, `thresholds` and `votes` float32 `[E]`, and `bias` float32
    `[K]`, added to the logarithms of the answer's probabilities: zeros change no bit. Outputs:
    `probabilities` float32 `[1, K]`, `exit` int64 `[1]` (E = voted), and where it is `watched`
    `first_score` float32 `[1]`, exit 0's, by which a device notices shift. `image_shape` is
    `(H, W, C)`. Segment e + 1 and all its weights are in the else-branch after exit e.
    """
    exits = len(segments)
    prefixed = [compose.add_prefix(model, f"s{e}_") for e, model in enumerate(segments)]
    constants = [
        numpy_helper.from_array(np.array([0], np.int64), "axis_0"),
        *score_constants(classes),
    ]
    graph = _level(0, prefixed, score, temperatures)
    used = _inputs(graph) | {"axis_1"}  # ONNX Runtime complains about constants that no node reads
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.UINT8, [1, *image_shape]),
        helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [exits]),
        helper.make_tensor_value_info("votes", TensorProto.FLOAT, [exits]),
        helper.make_tensor_value_info("bias", TensorProto.FLOAT, [classes]),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, classes]),
        helper.make_tensor_value_info("exit", TensorProto.INT64, [1]),
    ]
    rename = helper.make_node("Identity", ["image"], [prefixed[0].graph.input[0].name])
    # The cascade's own outputs take the public names only here, at the outermost level.
    publish = [
        *_biased(graph.output[0].name, "probabilities"),
        helper.make_node("Identity", [graph.output[1].name], ["exit"]),
    ]
    if watched:
        outputs.append(helper.make_tensor_value_info("first_score", TensorProto.FLOAT, [1]))
        publish.append(helper.make_node("Identity", ["e0_score"], ["first_score"]))
    whole = helper.make_graph(
        [rename, *graph.node, *publish],
        "edgeke",
        inputs,
        outputs,
        [*(constant for constant in constants if constant.name in used), *graph.initializer],
    )
    model = helper.make_model(
        whole,
        producer_name="edgeke",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return model


def _level(
    exit: int, segments: Sequence[onnx.ModelProto], score: Score, temperatures: Sequence[float]
) -> onnx.GraphProto:
    """Segment `exit` and the decision after it, as a graph with two outputs."""
    segment, last = segments[exit].graph, exit == len(segments) - 1
    name = f"e{exit}_"
    score_nodes, score_weights = build_score(score, exit)
    nodes = []
    if exit:
        before = segments[exit - 1].graph.output[1].name
        nodes.append(helper.make_node("Identity", [before], [segment.input[0].name]))
    nodes += [
        *segment.node,
        helper.make_node("Div", [segment.output[0].name, f"{name}temperature"], [f"{name}scaled"]),
        helper.make_node("Softmax", [f"{name}scaled"], [f"{name}probabilities"], axis=1),
        *score_nodes,
        helper.make_node("Gather", ["thresholds", f"{name}index"], [f"{name}threshold"]),
        helper.make_node("Greater", [f"{name}score", f"{name}threshold"], [f"{name}sure"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(temperatures[exit], np.float32), f"{name}temperature"),
        numpy_helper.from_array(np.array([exit], np.int64), f"{name}index"),
        *score_weights,
    ]
    then = helper.make_graph(
        [
            helper.make_node("Identity", [f"{name}probabilities"], [f"{name}then_probabilities"]),
            helper.make_node("Identity", [f"{name}index"], [f"{name}then_exit"]),
        ],
        f"{name}leave",
        [],
        _outputs(f"{name}then_"),
    )
    other = _vote(len(segments)) if last else _level(exit + 1, segments, score, temperatures)
    for node in nodes:
        node.name = node.name or node.output[0]  # tells a profile whose time it is
    nodes.append(
        helper.make_node(
            "If",
            [f"{name}sure"],
            [f"{name}out_probabilities", f"{name}out_exit"],
            then_branch=then,
            else_branch=other,
        )
    )
    return helper.make_graph(
        nodes,
        f"{name}reached",
        [],
        _outputs(f"{name}out_"),
        [*segment.initializer, *constants],
    )


def _biased(probabilities: str, out: str) -> list[onnx.NodeProto]:
    """`edgeke.device.scores.biased`: the bias is added to logarithms, the sum stays as it is."""
    return [
        helper.make_node("Exp", ["bias"], ["bias_factors"]),
        helper.make_node("Mul", [probabilities, "bias_factors"], ["bias_raised"]),
        helper.make_node("ReduceSum", ["bias_raised", "axis_1"], ["bias_after"], keepdims=1),
        helper.make_node("ReduceSum", [probabilities, "axis_1"], ["bias_before"], keepdims=1),
        helper.make_node("Div", ["bias_after", "bias_before"], ["bias_total"]),
        helper.make_node("Div", ["bias_raised", "bias_total"], [out]),
    ]


def _vote(exits: int) -> onnx.GraphProto:
    """The exits' probabilities averaged with the weights in `votes`."""
    nodes = [
        helper.make_node(
            "Concat", [f"e{e}_probabilities" for e in range(exits)], ["vote_all"], axis=0
        ),
        helper.make_node("ReduceSum", ["votes", "axis_0"], ["vote_sum"], keepdims=1),
        helper.make_node("Div", ["votes", "vote_sum"], ["vote_weights"]),
        helper.make_node("Unsqueeze", ["vote_weights", "axis_0"], ["vote_row"]),
        helper.make_node("MatMul", ["vote_row", "vote_all"], ["vote_probabilities"]),
        helper.make_node("Identity", ["vote_index"], ["vote_exit"]),
    ]
    index = numpy_helper.from_array(np.array([exits], np.int64), "vote_index")
    return helper.make_graph(nodes, "vote", [], _outputs("vote_"), [index])


def _inputs(graph: onnx.GraphProto) -> set[str]:
    """Every name that a node of the graph, or of a graph inside it, reads."""
    names: set[str] = set()
    for node in graph.node:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _inputs(attribute.g)
    return names


def _outputs(prefix: str) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(f"{prefix}probabilities", TensorProto.FLOAT, None),
        helper.make_tensor_value_info(f"{prefix}exit", TensorProto.INT64, None),
    ]
