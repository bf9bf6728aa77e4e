"""Static int8 quantisation of straight-line graphs, by ONNX Runtime's own quantiser."""

import copy
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeke.device.session import open_session
from edgeke.graph.compose import IR_VERSION

_BATCH = 50

_Inputs = NDArray[np.uint8] | NDArray[np.float32]


def quantise(model: onnx.ModelProto, inputs: _Inputs) -> onnx.ModelProto:
    """The graph with int8 weights per channel and uint8 activations, as QDQ pairs.

    Linear layers stay in single precision.

    `inputs` `[N, ...]` are samples of its single input; the ranges of all activations come from
    them, so they must be training images. Weights use 7 bits (`reduce_range`): without VNNI a CPU's
    8-bit products overflow 16 bits. Only standard operators appear; runtimes fuse them on loading.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises what is done here already
    with tempfile.TemporaryDirectory() as folder:
        prepared, target = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            # Biases that the exporter shares through Identity nodes would stay in single precision,
            # and their convolutions with them: four times slower.
            quant_pre_process(copy.deepcopy(model), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Reader(model.graph.input[0].name, inputs),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_linear(onnx.load(prepared)),
            )
        finally:
            root.setLevel(level)
        quantised = onnx.load(target)
    quantised.ir_version = IR_VERSION
    standard = [opset for opset in quantised.opset_import if opset.domain == ""]
    del quantised.opset_import[:]
    quantised.opset_import.extend(standard)
    del quantised.metadata_props[:]
    onnx.checker.check_model(quantised)
    return quantised


def quantise_segments(
    segments: Sequence[onnx.ModelProto], images: NDArray[np.uint8]
) -> list[onnx.ModelProto]:
    """Each segment, quantised on what those before it (fp32) make of `images` `[N, H, W, C]`."""
    features: _Inputs = images
    quantised = []
    for segment in segments:
        quantised.append(quantise(segment, features))
        session = open_session(segment.SerializeToString(), 0)
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: part}) for part in _batches(features)]
        if len(parts[0]) > 1:
            features = np.concatenate([features for _, features in parts])
    return quantised


def _linear(model: onnx.ModelProto) -> list[str]:
    """The linear layers: in int8 an exit's logits would take 256 values and scores would tie."""
    return [node.name for node in model.graph.node if node.op_type == "Gemm"]


class _Reader:
    """Batches of the calibration samples, as the quantiser asks for them."""

    def __init__(self, name: str, inputs: _Inputs) -> None:
        self._feeds = ({name: part} for part in _batches(inputs))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _batches(inputs: _Inputs) -> Iterator[_Inputs]:
    for start in range(0, len(inputs), _BATCH):
        yield inputs[start : start + _BATCH]
