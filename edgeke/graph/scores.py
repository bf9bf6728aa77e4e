"""Scores as ONNX nodes: the same arithmetic as `edgeke.device.scores`, in the same precision."""

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeke.device.scores import Score

_SMALLEST = 1e-12


def score_constants(classes: int) -> list[onnx.TensorProto]:
    """Constants that the score's nodes of every exit share, at the outermost level."""
    return [
        numpy_helper.from_array(np.array([1], np.int64), "axis_1"),
        numpy_helper.from_array(np.array([2], np.int64), "two"),
        numpy_helper.from_array(np.array(_SMALLEST, np.float32), "smallest"),
        numpy_helper.from_array(np.array(math.log(classes), np.float32), "log_classes"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    ]


def build_score(score: Score, exit: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from `e<exit>_probabilities` `[1, K]` to `e<exit>_score` `[1]`, and their weights.

    The learned score also reads what earlier exits computed on the way.
    """
    name = f"e{exit}_"
    if score.name in _PLAIN:
        return _PLAIN[score.name](f"{name}probabilities", f"{name}score"), []
    if score.name != "learned":
        raise ValueError(f"score {score.name!r} has no graph")
    nodes, inputs = [], []
    for kind, build in _PLAIN.items():
        nodes += build(f"{name}probabilities", f"{name}{kind}")
    for earlier in range(exit + 1):
        inputs += [f"e{earlier}_{kind}" for kind in _PLAIN]
    for earlier in range(exit):
        out = f"{name}agreement_{earlier}"
        nodes += [
            _node("Mul", [f"e{earlier}_probabilities", f"{name}probabilities"], f"{out}_all"),
            _node("ReduceSum", [f"{out}_all", "axis_1"], out, keepdims=0),
        ]
        inputs.append(out)
    nodes += [
        _node("Concat", inputs, f"{name}statistics", axis=0),
        _node("Mul", [f"{name}statistics", f"{name}weights"], f"{name}weighted"),
        _node("ReduceSum", [f"{name}weighted", "axis_0"], f"{name}sum", keepdims=1),
        _node("Add", [f"{name}sum", f"{name}bias"], f"{name}logit"),
        _node("Sigmoid", [f"{name}logit"], f"{name}score"),
    ]
    bias, *weights = score.weights[exit]
    return nodes, [
        numpy_helper.from_array(np.array(weights, np.float32), f"{name}weights"),
        numpy_helper.from_array(np.array(bias, np.float32), f"{name}bias"),
    ]


def _max_probability(probabilities: str, out: str) -> list[onnx.NodeProto]:
    return [_node("ReduceMax", [probabilities, "axis_1"], out, keepdims=0)]


def _margin(probabilities: str, out: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("TopK", [probabilities, "two"], [f"{out}_top", f"{out}_places"], axis=1),
        helper.make_node("Split", [f"{out}_top"], [f"{out}_1", f"{out}_2"], axis=1, num_outputs=2),
        _node("Sub", [f"{out}_1", f"{out}_2"], f"{out}_row"),
        _node("Squeeze", [f"{out}_row", "axis_1"], out),
    ]


def _entropy(probabilities: str, out: str) -> list[onnx.NodeProto]:
    return [
        _node("Max", [probabilities, "smallest"], f"{out}_safe"),
        _node("Log", [f"{out}_safe"], f"{out}_logs"),
        _node("Mul", [probabilities, f"{out}_logs"], f"{out}_terms"),
        _node("ReduceSum", [f"{out}_terms", "axis_1"], f"{out}_negative", keepdims=0),
        _node("Div", [f"{out}_negative", "log_classes"], f"{out}_share"),
        _node("Add", [f"{out}_share", "one"], f"{out}_open"),
        _node("Clip", [f"{out}_open", "zero", "one"], out),
    ]


_PLAIN = {"max_probability": _max_probability, "margin": _margin, "entropy": _entropy}


def _node(kind: str, inputs: list[str], out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [out], **attributes)
