"""Straight-line ONNX graphs: one segment per exit, and static networks."""

import copy
import io
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx import symbolic_helper

from edgeke.device.manifest import Block
from edgeke.graph.compose import IR_VERSION, OPSET
from edgeke.graph.padding import fold_padding
from edgeke.networks.architecture import ImageSize, sides
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import count_module

_ADAPTIVE_POOL = "aten::adaptive_avg_pool2d"


class _Preprocess(nn.Module):
    """uint8 `[N, H, W, C]` to normalised float32 `[N, C, H, W]`."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255)

    def forward(self, image: Tensor) -> Tensor:
        return (image.permute(0, 3, 1, 2).float() - self.mean) / self.std


class _Segment(nn.Module):
    """The trunk between two attach points, and the exit after it."""

    def __init__(self, blocks: nn.Module, exit: nn.Module, last: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.exit = _folded(exit)
        self.last = last

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.blocks(features)
        logits: Tensor = self.exit(features)
        return logits if self.last else (logits, features)


def _folded(exit: nn.Module) -> nn.Module:
    """The exit with its head's normalisation folded into the linear layer after it."""
    exit = copy.deepcopy(exit).eval()
    head = exit.get_submodule("head")
    layers = list(head) if isinstance(head, nn.Sequential) else []
    for number, (norm, linear) in enumerate(itertools.pairwise(layers)):
        if isinstance(norm, nn.BatchNorm1d) and isinstance(linear, nn.Linear):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            with torch.no_grad():
                linear.weight.mul_(torch.rsqrt(norm.running_var + norm.eps))
                linear.bias.sub_(linear.weight @ norm.running_mean)
            head.set_submodule(str(number), nn.Identity())
    return exit


def export_segments(
    network: BranchyNet, mean: Sequence[float], std: Sequence[float], image_size: ImageSize
) -> list[onnx.ModelProto]:
    """One graph per exit, with a dynamic batch axis.

    The first takes `image`, uint8 `[N, H, W, C]`, and normalises it; the others take `features`,
    the output of the one before. All give `logits` `[N, K]`. Names of nodes begin as `list_blocks`
    says.
    """
    channels = network.architecture.channels
    inputs = torch.zeros(2, *sides(image_size), channels, dtype=torch.uint8)
    models = []
    for number, exit in enumerate(network.exits):
        first, last = number == 0, number == len(network.exits) - 1
        front = [_Preprocess(mean, std)] if first else []
        blocks = nn.Sequential(*front, *network.blocks(number).values())
        segment = _Segment(blocks, exit, last).eval()
        outputs = ["logits"] if last else ["logits", "features"]
        models.append(_export(segment, inputs, "image" if first else "features_in", outputs))
        if not last:
            with torch.no_grad():
                inputs = segment(inputs)[1]
            shape = models[-1].graph.output[1].type.tensor_type.shape
            for dimension, side in zip(shape.dim[1:], inputs.shape[1:], strict=True):
                dimension.dim_value = side
    return models


def list_blocks(network: BranchyNet, image_size: ImageSize) -> tuple[Block, ...]:
    """What the segments consist of, in order of execution: blocks of the trunk, and exits.

    The first is the normalisation of the image, without operations or parameters.
    """
    network.eval()
    features = torch.zeros(1, network.architecture.channels, *sides(image_size))
    rows = [Block("normalise", "block", 0, 0, 0, tuple(features.shape[1:]), "/blocks/blocks.0/")]
    for number, exit in enumerate(network.exits):
        for place, (name, block) in enumerate(network.blocks(number).items(), number == 0):
            features, macs, parameters = count_module(block.eval(), features)
            shape, nodes = tuple(features.shape[1:]), f"/blocks/blocks.{place}/"
            rows.append(Block(name, "block", number, macs, parameters, shape, nodes))
        logits, macs, parameters = count_module(exit, features)
        shape = tuple(logits.shape[1:])
        rows.append(Block(f"exit_{number}", "exit", number, macs, parameters, shape, "/exit/"))
    return tuple(rows)


def export_static(
    network: BranchyNet, mean: Sequence[float], std: Sequence[float], image_size: ImageSize
) -> onnx.ModelProto:
    """The last exit alone as one graph: `image` uint8 `[N, H, W, C]` to `logits` `[N, K]`."""
    return export_segments(network.branch(-1), mean, std, image_size)[0]


def _adaptive_pool(graph: Any, features: Any, size: Any) -> Any:
    """Adaptive average pooling as two matrix products: for sizes that ONNX cannot pool to.

    VGG pools to 7x7, whatever is left of the image.
    """
    shape: list[Any] = [symbolic_helper._get_tensor_dim_size(features, axis) for axis in (2, 3)]
    outputs = symbolic_helper._maybe_get_const(size, "is")
    if list(outputs) == [1, 1]:
        return graph.op("GlobalAveragePool", features)
    rows, columns = (
        F.adaptive_avg_pool1d(torch.eye(side)[None], output)[0].T
        for side, output in zip(shape, outputs, strict=True)
    )
    left = graph.op("Constant", value_t=rows.contiguous())
    right = graph.op("Constant", value_t=columns.T.contiguous())
    return graph.op("MatMul", graph.op("MatMul", left, features), right)


def _export(
    module: nn.Module, example: Tensor, name: str, outputs: Sequence[str]
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated, but writes opset 18 and IR 8 with batch norm folded,
        # twenty times faster than its successor (docs/decisions/002-onnx-exporter.md).
        warnings.simplefilter("ignore", DeprecationWarning)
        # Branches on a map's size, which is fixed.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
            _ADAPTIVE_POOL, _adaptive_pool, OPSET
        )
        try:
            torch.onnx.export(
                module.cpu(),
                (example,),
                buffer,  # type: ignore[arg-type]  # the tracing exporter writes to buffers
                dynamo=False,
                opset_version=OPSET,
                input_names=[name],
                output_names=list(outputs),
                dynamic_axes={tensor: {0: "N"} for tensor in [name, *outputs]},
            )
        finally:
            torch.onnx.unregister_custom_op_symbolic(  # type: ignore[attr-defined]
                _ADAPTIVE_POOL, OPSET
            )
    model = onnx.load_from_string(buffer.getvalue())
    model.ir_version = IR_VERSION
    fold_padding(model, example.numpy())
    onnx.checker.check_model(model)
    return model
