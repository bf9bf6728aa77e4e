"""Static int8 quantisation of straight-line graphs, by ONNX Runtime's own quantiser."""

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeke.device.session import open_session
from edgeke.graph.compose import IR_VERSION

_BATCH = 16  # larger ones leave the processor's cache: twice as slow at 128x128
# The first convolution is faster in fp32 if it reads an image's channels at up to 4x4 positions;
# at 7x7 (a ResNet's of timm) it is faster in int8 (docs/results.md).
_FEW_CHANNELS, _FEW_POSITIONS = 3, 16

_Inputs = NDArray[np.uint8] | NDArray[np.float32]


def quantise(
    model: onnx.ModelProto, inputs: _Inputs, *, depthwise: bool = True, weight_bits: int = 7
) -> onnx.ModelProto:
    """The graph with int8 weights per channel and uint8 activations, as QDQ pairs.

    Convolutions and matrix products are in int8. In single precision stay: residual additions,
    which cost accuracy and save nothing; the first convolution where it is small, which is faster
    so; linear layers, since logits in int8 take 256 values and scores would tie; and, without
    `depthwise`, depthwise convolutions (docs/results.md has what each costs).

    `inputs` `[N, ...]` are samples of its single input; the ranges of all activations come from
    them, so they must be training images. Without VNNI a CPU's products of 8-bit weights overflow
    16 bits, so 7 bits are used unless `weight_bits` is 8. Only standard operators appear; runtimes
    fuse them on loading.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    excluded: list[str] = []
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises what is done here already
    with tempfile.TemporaryDirectory() as folder:
        prepared, target = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            # Biases that the exporter shares through Identity nodes would stay in single precision,
            # and their convolutions with them: four times slower.
            quant_pre_process(copy.deepcopy(model), prepared, skip_symbolic_shape=True)
            excluded = _left_out(onnx.load(prepared), depthwise)
            quantize_static(
                prepared,
                target,
                _Reader(model.graph.input[0].name, inputs),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=weight_bits == 7,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul", "Relu", "Clip", "MaxPool"],
                nodes_to_exclude=excluded,
            )
        finally:
            root.setLevel(level)
        quantised = onnx.load(target)
    _shield(quantised, excluded)
    quantised.ir_version = IR_VERSION
    standard = [opset for opset in quantised.opset_import if opset.domain == ""]
    del quantised.opset_import[:]
    quantised.opset_import.extend(standard)
    del quantised.metadata_props[:]
    onnx.checker.check_model(quantised)
    return quantised


def quantise_segments(
    segments: Sequence[onnx.ModelProto],
    images: NDArray[np.uint8],
    *,
    exact_from: int = 1_000_000,
    weight_bits: int = 7,
) -> list[onnx.ModelProto]:
    """Each segment, quantised on what those before it (fp32) make of `images` `[N, H, W, C]`.

    Depthwise convolutions stay in single precision in the segments from `exact_from` on.
    """
    features: _Inputs = images
    quantised = []
    for number, segment in enumerate(segments):
        depthwise = number < exact_from
        quantised.append(quantise(segment, features, depthwise=depthwise, weight_bits=weight_bits))
        session = open_session(segment.SerializeToString(), 0)
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: part}) for part in _batches(features)]
        if len(parts[0]) > 1:
            features = np.concatenate([features for _, features in parts])
    return quantised


def has_depthwise(segments: Sequence[onnx.ModelProto]) -> bool:
    """Whether there is a depthwise (or another grouped) convolution."""
    return any(_groups(node) > 1 for segment in segments for node in segment.graph.node)


def _left_out(model: onnx.ModelProto, depthwise: bool) -> list[str]:
    """The convolutions that stay in single precision."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in shapes:
            _, channels, *kernel = shapes[node.input[1]]
            few = channels <= _FEW_CHANNELS and math.prod(kernel) <= _FEW_POSITIONS
            if (few and _groups(node) == 1) or (not depthwise and _groups(node) > 1):
                names.append(node.name)
    return names


def _shield(model: onnx.ModelProto, excluded: Sequence[str]) -> None:
    """Keep ONNX Runtime from quantising the excluded convolutions after all.

    On loading it quantises the weights of a convolution between a DequantizeLinear and a
    QuantizeLinear (or a Relu or Clip before that), with one scale for all channels, which ruins
    depthwise ones. The maximum of a single tensor, that tensor, hides the QuantizeLinear from it.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            source = made_by.get(node.input[0])
            if source is not None and source.op_type in ("Relu", "Clip"):
                source = made_by.get(source.input[0])
            before = None if source is None else made_by.get(source.input[0])
            between = before is not None and before.op_type == "DequantizeLinear"
            if source is not None and source.name in excluded and between:
                shielded = f"{node.input[0]}_shielded"
                nodes.append(onnx.helper.make_node("Max", [node.input[0]], [shielded], shielded))
                node.input[0] = shielded
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


class _Reader:
    """Batches of the calibration samples, as the quantiser asks for them."""

    def __init__(self, name: str, inputs: _Inputs) -> None:
        self._feeds = ({name: part} for part in _batches(inputs))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _batches(inputs: _Inputs) -> Iterator[_Inputs]:
    for start in range(0, len(inputs), _BATCH):
        yield inputs[start : start + _BATCH]
