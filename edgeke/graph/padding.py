"""Padding as part of convolutions.

TensorFlow's "same" padding, which timm's `tf_` networks have, depends on the input's size: traced,
it becomes a dozen nodes before a Pad node. The size of an image is fixed, and so is the padding.
"""

import copy

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeke.device.session import open_session


def fold_padding(model: onnx.ModelProto, example: NDArray[np.generic]) -> None:
    """Make the padding of inputs of this shape constant, and part of a convolution that follows.

    `example`: any value of the only input.
    """
    graph = model.graph
    pads = [node for node in graph.node if node.op_type == "Pad"]
    if not pads:
        return
    names = sorted({name for node in pads for name in node.input[1:] if name})
    probe = copy.deepcopy(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(probe.SerializeToString(), 1)
    values = dict(zip(names, session.run(names, {graph.input[0].name: example}), strict=True))
    for pad in pads:
        users = [node for node in graph.node if pad.output[0] in node.input]
        sizes, value = values[pad.input[1]], values.get("".join(pad.input[2:3]), 0)
        mode = [a.s for a in pad.attribute if a.name == "mode"] or [b"constant"]
        conv = len(users) == 1 and users[0].op_type == "Conv" and len(sizes) == 8
        if conv and mode == [b"constant"] and value == 0 and not sizes[[0, 1, 4, 5]].any():
            _pad_more(users[0], sizes[[2, 3, 6, 7]])
            users[0].input[0] = pad.input[0]
        else:
            pad.input[1] = f"{pad.output[0]}_sizes"
            graph.initializer.append(numpy_helper.from_array(sizes, pad.input[1]))
    _remove_unused(graph)


def _pad_more(conv: onnx.NodeProto, sizes: NDArray[np.int64]) -> None:
    """Add to a convolution's padding: top, left, bottom, right."""
    for attribute in conv.attribute:
        if attribute.name == "pads":
            attribute.ints[:] = (np.asarray(attribute.ints) + sizes).tolist()
            return
    conv.attribute.append(helper.make_attribute("pads", sizes.tolist()))


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nobody reads."""
    used = {tensor.name for tensor in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used |= set(node.input)
