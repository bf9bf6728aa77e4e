"""Heads fitted again to a quantised trunk.

int8 moves pooled features by more than they differ between images, and a head that learnt from
single precision misreads them. Its last linear layer is fitted again, from what it reads in int8
to the logits that it had in single precision, by ridge regression.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeke.device.session import open_session

# Weight of the old layer against the images, where features have variance 1 (docs/results.md).
_RIDGE = 1.0
_BATCH = 16  # larger ones leave the processor's cache: twice as slow at 128x128

_Array = NDArray[np.float64]


def refit_heads(
    quantised: Sequence[onnx.ModelProto],
    exact: Sequence[onnx.ModelProto],
    images: NDArray[np.uint8],
) -> list[onnx.ModelProto]:
    """The quantised segments, their last linear layers fitted to the logits of the `exact` ones.

    `images` uint8 `[N, H, W, C]`: training images. A segment whose logits do not come from a linear
    layer stays as it is.
    """
    layers = [_last_layer(model) for model in quantised]
    sums = [_Sums() if layer else None for layer in layers]
    with_inputs = []
    for model, layer in zip(quantised, layers, strict=True):
        with_inputs.append(copy.deepcopy(model))
        if layer:
            with_inputs[-1].graph.output.append(onnx.ValueInfoProto(name=layer.input[0]))
    targets = _outputs(exact, images)
    for coarse, fine in zip(_outputs(with_inputs, images), targets, strict=True):
        for one, outputs, (target, *_) in zip(sums, coarse, fine, strict=True):
            if one:
                missing = target - outputs[0]
                one.add(outputs[-1].astype(np.float64), missing.astype(np.float64))
    refitted = []
    for model, layer, one in zip(quantised, layers, sums, strict=True):
        refitted.append(copy.deepcopy(model))
        if layer and one:
            weight, bias = one.correction()
            tensors = {tensor.name: tensor for tensor in refitted[-1].graph.initializer}
            _add(tensors[layer.input[1]], weight)
            _add(tensors[layer.input[2]], bias)
    return refitted


class _Sums:
    """What ridge regression needs of features `[N, D]` and missing logits `[N, K]`."""

    def __init__(self) -> None:
        self.count = 0
        self.features: _Array = np.zeros(1)
        self.missing: _Array = np.zeros(1)
        self.squares: _Array = np.zeros(1)
        self.products: _Array = np.zeros(1)

    def add(self, features: _Array, missing: _Array) -> None:
        self.count += len(features)
        self.features = self.features + features.sum(0)
        self.missing = self.missing + missing.sum(0)
        self.squares = self.squares + features.T @ features
        self.products = self.products + features.T @ missing

    def correction(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """What to add to weight `[K, D]` and bias `[K]`."""
        mean, missing = self.features / self.count, self.missing / self.count
        covariance = self.squares / self.count - np.outer(mean, mean)
        variances = np.diag(covariance).clip(min=0)
        penalty = _RIDGE * variances + 1e-6 * variances.max() + 1e-12
        change: NDArray[Any] = np.linalg.solve(
            covariance + np.diag(penalty), self.products / self.count - np.outer(mean, missing)
        )
        return change.T, missing - mean @ change


def _last_layer(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The linear layer that gives the logits, with weights `[K, D]` of its own."""
    own = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
        if node.op_type == "Gemm" and transposed and node.output[0] == model.graph.output[0].name:
            return node if len(node.input) == 3 and own >= set(node.input[1:]) else None
    return None


def _outputs(
    segments: Sequence[onnx.ModelProto], images: NDArray[np.uint8]
) -> Iterator[list[list[NDArray[np.float32]]]]:
    """All outputs of all segments, batch by batch; each reads the one before it."""
    sessions = [open_session(segment.SerializeToString(), 0) for segment in segments]
    for start in range(0, len(images), _BATCH):
        features, outputs = images[start : start + _BATCH], []
        for session in sessions:
            outputs.append(session.run(None, {session.get_inputs()[0].name: features}))
            features = outputs[-1][1] if len(outputs[-1]) > 1 else features
        yield outputs


def _add(tensor: onnx.TensorProto, change: NDArray[Any]) -> None:
    values = numpy_helper.to_array(tensor) + change
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
