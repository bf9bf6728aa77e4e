"""The segments as one graph, and which of its values have rows that devices can share.

A value has rows (`rows`) where row y depends on rows near y alone; it is `whole` where it was
pooled over all rows, and small; `lead` where it must be computed from a whole map by one device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper

from edgeke.device.manifest import Manifest, read_manifest
from edgeke.device.session import open_session
from edgeke.errors import InputError

Kind = Literal["constant", "rows", "whole", "lead"]
Pooled = Literal["mean", "max", "variance"]

# A value's row depends on the same row of its inputs.
_POINTWISE = {
    *("Add", "BatchNormalization", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Elu"),
    *("Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min"),
    *("Mul", "Neg", "PRelu", "Pow", "QuantizeLinear", "Reciprocal", "Relu", "Sigmoid", "Softplus"),
    *("Split", "Sqrt", "Sub", "Tanh"),
}
_WINDOWS = {"Conv", "MaxPool", "AveragePool"}
# Where one device would do more than this share of the work, sharing the rest is not worth it.
_MOST_ALONE = 0.5


@dataclass(frozen=True)
class Window:
    """How rows of the output depend on rows of the input: row y on `kernel` rows, dilation counted,
    from `stride * y - before` on. `after`: rows of padding at the bottom.
    """

    kernel: int
    stride: int
    before: int
    after: int

    def rows(self, low: int, high: int) -> tuple[int, int]:
        """The rows that output rows `low` to `high` need; those outside of the map are padding."""
        start = low * self.stride - self.before
        return start, start + (high - 1 - low) * self.stride + self.kernel


@dataclass(frozen=True)
class Step:
    """A node, and how rows pass through it.

    `window`: None where each row depends on the same row. `pooled`: what it pools over all rows of
    `source`, along `axes`. `segment`: which exit's graph it is from. `lead`: why one device must
    compute it, None where it need not.
    """

    node: onnx.NodeProto
    segment: int
    kind: Kind
    window: Window | None = None
    pooled: Pooled | None = None
    source: str = ""
    axes: tuple[int, ...] = ()
    lead: str | None = None
    macs: int = 0


@dataclass
class Network:
    """One network: its steps in order, and what is known about every value by name.

    `axis`: the axis of the rows, of values that have rows. `stride`: image rows for one row of it.
    `cuts`: where the trunk can be cut, since one value with rows is all that later steps read.
    `exits`: the logits.
    """

    steps: list[Step]
    constants: dict[str, onnx.TensorProto]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    kinds: dict[str, Kind]
    axis: dict[str, int]
    stride: dict[str, int]
    exits: list[str]
    manifest: Manifest
    cuts: list[str] = field(default_factory=list)

    def height(self, name: str) -> int:
        """How many rows a value has."""
        return self.shapes[name][self.axis[name]]

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a value."""
        item = helper.tensor_dtype_to_np_dtype(self.types[name]).itemsize
        return math.prod(self.shapes[name]) // self.height(name) * int(item)

    def producer(self, name: str) -> Step | None:
        """The step that computes a value; None for the image and for constants."""
        return self._producers.get(name)

    def trunk(self) -> list[bool]:
        """For each step, whether the last exit needs it."""
        needed, marks = {self.exits[-1]}, []
        for step in reversed(self.steps):
            mark = not needed.isdisjoint(step.node.output)
            if mark:
                needed.update(sources(step))
            marks.append(mark)
        return marks[::-1]

    def __post_init__(self) -> None:
        self._producers = {name: step for step in self.steps for name in step.node.output}


def sources(step: Step) -> list[str]:
    """The values that a step reads."""
    return [step.source] if step.pooled else [name for name in step.node.input if name]


def read_network(folder: Path) -> Network:
    """The network whose segments are in a folder such as `models/segments/int8`.

    Errors: InputError for files that cannot be read, and for a network that cannot be shared.
    """
    manifest = read_manifest(folder)
    try:
        models = [onnx.load(folder / name) for name in manifest.segments]
    except Exception as error:  # protobuf's own, and OSError
        raise InputError(
            f"{folder} cannot be read ({error}); copy the whole bundle again"
        ) from error
    return join(models, manifest)


def join(models: Sequence[onnx.ModelProto], manifest: Manifest) -> Network:
    """One network of its segments. Errors: InputError, with the layer, when it cannot be shared."""
    nodes: list[tuple[int, onnx.NodeProto]] = []
    constants: dict[str, onnx.TensorProto] = {}
    before = "image"
    exits = []
    for number, model in enumerate(models):
        graph = compose.add_prefix(model, f"s{number}_").graph
        names = {graph.input[0].name: before}
        for tensor in graph.initializer:
            constants[tensor.name] = tensor
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant(node)
            elif node.op_type == "Identity":
                names[node.output[0]] = node.input[0]
            else:
                nodes.append((number, node))
        outputs = [names.get(tensor.name, tensor.name) for tensor in graph.output]
        exits.append(outputs[0])
        before = outputs[-1]
    shapes, types = _probe([node for _, node in nodes], constants, manifest)
    network = Network([], constants, shapes, types, {}, {}, {}, exits, manifest)
    network.kinds |= dict.fromkeys(constants, "constant")
    network.kinds["image"], network.axis["image"], network.stride["image"] = "rows", 1, 1
    for number, node in nodes:
        step = _step(network, node, number)
        network.steps.append(step)
        network.kinds |= dict.fromkeys(node.output, step.kind)
        for name in node.output:
            if step.kind == "rows":
                _place_rows(network, step, name)
    network.__post_init__()
    _fuse_variances(network)
    network.__post_init__()
    network.cuts = _cuts(network)
    _check(network)
    return network


def _constant(node: onnx.NodeProto) -> onnx.TensorProto:
    value = onnx.TensorProto()
    value.CopyFrom(next(a.t for a in node.attribute if a.name == "value"))
    value.name = node.output[0]
    return value


def _probe(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, onnx.TensorProto], manifest: Manifest
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes and types of all values; what follows from shapes alone becomes a constant."""
    image = np.zeros((1, *manifest.image_shape), np.uint8)
    names = [name for node in nodes for name in node.output if name]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, image.shape)],
        [onnx.ValueInfoProto(name=name) for name in names],
        list(constants.values()),
    )
    session = open_session(finished(graph), 1)
    values: dict[str, NDArray[Any]] = dict(
        zip(names, session.run(names, {"image": image}), strict=True)
    )
    values["image"] = image
    for node in nodes:
        if node.op_type == "Shape":
            name = node.output[0]
            constants[name] = numpy_helper.from_array(values[name], name)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    types = {n: int(helper.np_dtype_to_tensor_dtype(v.dtype)) for n, v in values.items()}
    shapes |= {name: tuple(tensor.dims) for name, tensor in constants.items()}
    types |= {name: int(tensor.data_type) for name, tensor in constants.items()}
    return shapes, types


def finished(graph: onnx.GraphProto) -> bytes:
    """The graph as a file, in the form that ONNX Runtime 1.15.1 and newer read."""
    model = helper.make_model(
        graph, producer_name="edgeke", opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    content: bytes = model.SerializeToString()
    return content


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or the default."""
    for each in node.attribute:
        if each.name == name:
            return helper.get_attribute_value(each)
    return default


def _step(network: Network, node: onnx.NodeProto, segment: int) -> Step:
    """How rows pass through a node, from what is known about its inputs."""
    kinds = [network.kinds[name] for name in node.input if name]
    rows = [name for name in node.input if name and network.kinds[name] == "rows"]
    step = Step(node, segment, "lead", macs=_macs(network, node))
    if all(kind == "constant" for kind in kinds):
        return replace(step, kind="constant")
    if "lead" in kinds:
        return replace(step, lead="reads what one device computes")
    if not rows:
        return replace(step, kind="whole")
    reason = f"{node.op_type} mixes positions"
    axis, name = network.axis[rows[0]], rows[0]
    if any((network.axis[r], network.height(r)) != (axis, network.height(name)) for r in rows):
        return replace(step, lead=reason)
    pooled = _pooled(network, node, axis)
    if pooled is not None:
        kind, axes = pooled
        if axis in axes:
            return replace(step, kind="whole", pooled=kind, source=name, axes=axes)
        return replace(step, kind="rows") if _keeps(node) else replace(step, lead=reason)
    if node.op_type == "Shape":
        return replace(step, kind="constant")
    if node.op_type in _WINDOWS:
        window = _window(network, node)
        if window is None or network.shapes[node.output[0]][2] < 2:
            return replace(step, lead=f"{reason} or gives a map of one row")
        return replace(step, kind="rows", window=window)
    return (
        replace(step, kind="rows")
        if _keeps_rows(network, node, axis)
        else replace(step, lead=reason)
    )


def _macs(network: Network, node: onnx.NodeProto) -> int:
    if node.op_type == "Conv":
        weight = network.shapes[node.input[1]]
        return math.prod(network.shapes[node.output[0]]) * math.prod(weight[1:])
    if node.op_type in ("Gemm", "MatMul"):
        return math.prod(network.shapes[node.output[0]]) * network.shapes[node.input[0]][-1]
    return 0


def _pooled(
    network: Network, node: onnx.NodeProto, axis: int
) -> tuple[Pooled, tuple[int, ...]] | None:
    """What a node pools, and along which axes; None where it does not."""
    shape = network.shapes[node.input[0]]
    if node.op_type in ("GlobalAveragePool", "GlobalMaxPool"):
        return ("max" if "Max" in node.op_type else "mean"), tuple(range(2, len(shape)))
    if node.op_type in ("ReduceMean", "ReduceMax"):
        axes: Any = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1:
            axes = numpy_helper.to_array(network.constants[node.input[1]]).tolist()
        axes = tuple(each % len(shape) for each in axes or range(len(shape)))
        return ("max" if "Max" in node.op_type else "mean"), axes
    if node.op_type in ("MaxPool", "AveragePool") and axis == 2:
        whole = list(shape[2:])
        pads = attribute(node, "pads", [0, 0, 0, 0])
        if list(attribute(node, "kernel_shape", [])) == whole and not any(pads):
            return ("max" if "Max" in node.op_type else "mean"), (2, 3)
    return None


def _keeps(node: onnx.NodeProto) -> bool:
    return bool(attribute(node, "keepdims", 1))


def _window(network: Network, node: onnx.NodeProto) -> Window | None:
    """The window along rows; None where strips would not give the same."""
    kernel = attribute(node, "kernel_shape", None) or network.shapes[node.input[1]][2:]
    if len(kernel) != 2 or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
        return None
    if len(node.output) > 1 or (node.op_type == "Conv" and network.kinds[node.input[1]] == "rows"):
        return None
    dilation = (attribute(node, "dilations", None) or [1, 1])[0]
    stride = (attribute(node, "strides", None) or [1, 1])[0]
    before, _, after, _ = attribute(node, "pads", None) or [0, 0, 0, 0]
    size = (kernel[0] - 1) * dilation + 1
    height, output = network.shapes[node.input[0]][2], network.shapes[node.output[0]][2]
    used = (output - 1) * stride + size - before - height
    if used > after:  # ceil_mode: the last window reaches beyond the padding
        if attribute(node, "count_include_pad", 0):
            return None
        after = used
    return Window(size, stride, before, after)


def _keeps_rows(network: Network, node: onnx.NodeProto, axis: int) -> bool:
    """Whether each row of the output depends on the same row of the inputs."""
    output = network.shapes[node.output[0]]
    kind, rank = node.op_type, len(output)
    if kind == "Transpose":
        return True
    if kind == "MatMul":
        return network.kinds[node.input[1]] == "constant" and axis < rank - 1
    if kind == "LayerNormalization":
        return bool(attribute(node, "axis", -1) % rank > axis)
    if kind == "Softmax":
        return bool(attribute(node, "axis", -1) % rank != axis)
    if kind == "Pad":
        pads = numpy_helper.to_array(network.constants[node.input[1]])
        return len(pads) == 2 * rank and not pads[axis] and not pads[axis + rank]
    if kind not in _POINTWISE:
        return False
    if kind in ("Concat", "Split"):
        return bool(attribute(node, "axis", 0) % rank != axis)
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        return math.prod(network.shapes[node.input[1]]) == 1 or axis != attribute(node, "axis", 1)
    if kind == "BatchNormalization":
        return axis != 1
    for name in filter(None, node.input):
        shape = network.shapes[name]
        place = len(shape) - rank + axis
        if network.kinds[name] == "rows" and len(shape) != rank:
            return False
        if network.kinds[name] != "rows" and place >= 0 and shape[place] != 1:
            return False
    return True


def _place_rows(network: Network, step: Step, name: str) -> None:
    """Where the rows of a step's output are."""
    source = next(n for n in step.node.input if n and network.kinds[n] == "rows")
    axis = network.axis[source]
    if step.node.op_type == "Transpose":
        axis = list(attribute(step.node, "perm", [])).index(axis)
    network.axis[name] = axis
    network.stride[name] = network.stride[source] * (step.window.stride if step.window else 1)


def _fuse_variances(network: Network) -> None:
    """A mean of squared distances from the mean is exchanged with the mean, not a round later."""
    for number, step in enumerate(network.steps):
        if step.pooled != "mean":
            continue
        square = network.producer(step.source)
        if square is None or square.node.op_type != "Mul" or len(set(square.node.input)) != 1:
            continue
        distance = network.producer(square.node.input[0])
        if distance is None or distance.node.op_type != "Sub":
            continue
        values, mean = distance.node.input
        pool = network.producer(mean)
        if pool is not None and (pool.pooled, pool.source, pool.axes) == (
            "mean",
            values,
            step.axes,
        ):
            network.steps[number] = replace(step, pooled="variance", source=values)


def _cuts(network: Network) -> list[str]:
    """The values between two windows higher than one row at which one value alone is alive.

    Of those between the same two windows it is the smallest, of equal ones the last: in int8 one
    of eight bits, and after the activation.
    """
    marks = network.trunk()
    last: dict[str, int] = {}
    for number, step in enumerate(network.steps):
        if marks[number]:
            last |= dict.fromkeys(sources(step), number)
    alive: set[str] = {"image"}
    cuts: list[str] = ["image"]
    fresh = False  # whether there was such a window since the last cut
    for number, step in enumerate(network.steps):
        if not marks[number] or step.kind == "constant":
            continue
        if step.kind == "lead":
            break
        alive |= {name for name in step.node.output if last.get(name, -1) > number}
        alive = {name for name in alive if last[name] > number}
        fresh |= step.window is not None and step.window.kernel > 1
        if len(alive) != 1:
            continue
        (name,) = alive
        if network.kinds[name] != "rows":
            continue
        if fresh:
            cuts.append(name)
            fresh = False
        elif network.row_bytes(name) * network.height(name) <= (
            network.row_bytes(cuts[-1]) * network.height(cuts[-1])
        ):
            cuts[-1] = name if cuts[-1] != "image" else "image"
    return cuts


def _check(network: Network) -> None:
    """Errors: InputError when most of the work is for one device alone, with the layer's name."""
    marks = network.trunk()
    steps = [step for step, mark in zip(network.steps, marks, strict=True) if mark]
    total = sum(step.macs for step in steps)
    alone = sum(step.macs for step in steps if step.kind == "lead")
    if alone > _MOST_ALONE * total:
        first = next(step for step in steps if step.kind == "lead")
        raise InputError(
            f"{layer(first.node)} cannot be split into strips of rows ({first.lead}), and "
            f"{100 * alone / total:.0f} % of the network's work comes after it; serve this network "
            "on one device, or train one of convolutions alone"
        )


def layer(node: onnx.NodeProto) -> str:
    """A node's name as people know the layer."""
    name = node.name or node.output[0]
    return name.split("_", 1)[-1].strip("/")


def names_of(steps: Iterable[Step]) -> set[str]:
    """All that the steps compute."""
    return {name for step in steps for name in step.node.output}
