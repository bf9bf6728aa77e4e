"""A backbone cut into blocks: traced once with torch.fx, cut where exactly one tensor is alive.

Blocks share the backbone's modules, so its parameters keep their names. Whatever owns a parameter
or buffer is called as a whole and never traced, so a block has no state of its own.
"""

import collections
import difflib
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from edgeke.errors import InputError
from edgeke.networks.architecture import TIMM, Backbone, ImageSize, sides
from edgeke.networks.build import build_network, require_timm

_STEP, _LARGEST = 8, 1024  # image sizes are multiples of 8 up to 1024
# Shapes at another size, this one or twice the image's, tell feature maps from what comes later.
_OTHER_SIZE = 512

_Shapes = dict[str, tuple[int, ...]]  # node -> shape


@dataclass(frozen=True)
class CutPoint:
    """A place in a backbone where exactly one tensor is alive, a feature map.

    `name`: the module whose output it is; `aliases`: others that end there, too. `shape`:
    `(C, H, W)`. `macs`: multiply-accumulates before it, per image. `node`: its place in the graph.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, int, int]
    macs: int
    node: int

    @property
    def values(self) -> int:
        """Numbers in the feature map of one image."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Traced:
    """A backbone's graph and its cut points, shallow to deep; the last is the last feature map.

    `macs`: multiply-accumulates of the whole backbone, per image. `layers`: its modules with
    weights, in order. `classifier`: the modules after the last feature map.
    """

    backbone: Backbone
    graph: fx.Graph
    cuts: tuple[CutPoint, ...]
    macs: int
    layers: tuple[str, ...]
    classifier: tuple[str, ...]

    def cut(self, name: str) -> CutPoint:
        """The cut point of this name. Errors: InputError with the nearest names."""
        for cut in self.cuts:
            if name in (cut.name, *cut.aliases):
                return cut
        network, names = self.backbone.network, [cut.name for cut in self.cuts]
        if name in self.classifier:
            raise InputError(
                f"an exit cannot be attached to {name}: it belongs to the classifier of {network}, "
                f"after the last feature map, {names[-1]}"
            )
        near = difflib.get_close_matches(name, names, 5, 0.5) or names
        raise InputError(
            f"exit attached to {name!r}, which is not a cut point of {network}; attach it to one "
            f"of {', '.join(near)} (`python -m edgeke.networks {network}` lists all)"
        )

    def next_block(self, cut: CutPoint) -> CutPoint | None:
        """Where the block that begins at a cut point ends; None after the last feature map."""
        return next((other for other in self.cuts if other.macs > cut.macs), None)

    def part(
        self, network: nn.Module, start: CutPoint | None, end: CutPoint | None
    ) -> fx.GraphModule:
        """The layers between two cut points as a module that shares those of `network`.

        `start` None: from the image on. `end` None: to the logits.
        """
        nodes = list(self.graph.nodes)
        first, last = start.node if start else 0, end.node if end else len(nodes) - 1
        graph = fx.Graph()
        copies = {nodes[first]: graph.placeholder("x")}
        for node in nodes[first + 1 : last + 1]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if end:
            graph.output(copies[nodes[last]])
        return fx.GraphModule(network, graph)


@functools.lru_cache(maxsize=32)
def trace(backbone: Backbone) -> Traced:
    """Trace a backbone and find its cut points.

    Errors: InputError when the network is unknown, cannot be traced, has no feature maps, or does
    not work at the image size.
    """
    network = build_network(backbone)
    try:
        in_training = _Tracer(backbone).trace(network.train())
        graph = _Tracer(backbone).trace(network.eval())
    except Exception as error:  # whatever a network's own code raises when it meets a proxy
        raise InputError(
            f"{backbone.network} cannot be traced by torch.fx, so it cannot be cut into blocks: "
            f"{_first_line(error)}"
        ) from error
    traced = _Analysis(backbone, network.to("meta"), graph).traced()
    _check_graph(backbone, graph, in_training)
    return traced


class _Tracer(fx.Tracer):
    """Notes in every node's `meta` the modules around it, and those whose output it is.

    `inside`: outermost first. `ends`: innermost first.
    """

    def __init__(self, backbone: Backbone) -> None:
        whole: tuple[type[nn.Module], ...] = ()
        functions: tuple[Any, ...] = ()
        if backbone.network.startswith(TIMM):
            layers = require_timm().layers
            whole = tuple(layers.get_notrace_modules())
            functions = tuple(layers.get_notrace_functions())
        super().__init__(autowrap_functions=functions)
        self._whole = whole
        self._open: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Called as a whole: torch's own layers, owners of state, and what reads its mode.

        A traced module that reads `self.training` would stay in the mode of now. One that holds
        layers with weights is traced all the same, and `_check_graph` decides.
        """
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, self._whole):
            return True
        if any(True for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False))):
            return True
        code = getattr(type(m).forward, "__code__", None)
        return code is not None and "training" in code.co_names and not _weights(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        self._open.append(name)
        output = super().call_module(m, forward, args, kwargs)
        self._open.pop()
        if isinstance(output, fx.Proxy):
            output.node.meta.setdefault("ends", []).append(name)
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["inside"] = tuple(self._open)
        return node


def _check_graph(backbone: Backbone, graph: fx.Graph, in_training: fx.Graph) -> None:
    """Refuse what blocks could not reproduce."""
    lines = [g.python_code("self").src.splitlines() for g in (in_training, graph)]
    for training, evaluation in itertools.zip_longest(*lines, fillvalue=""):
        if training != evaluation:
            raise InputError(
                f"{backbone.network} cannot be cut into blocks: a module with layers inside does "
                f"something else in training (`{training.strip()}`); move that step into a module "
                "of its own, such as nn.Dropout"
            )
    own = next((node.target for node in graph.nodes if node.op == "get_attr"), None)
    if own is not None:
        raise InputError(
            f"{backbone.network} cannot be cut into blocks: its own forward uses the tensor {own}; "
            "move that step, with the tensor, into a module of its own"
        )


class _Analysis:
    """Finds the cut points of a graph that are worth an exit.

    Those not inside a block, and not in front of a normalisation or an activation, which belong to
    the layer before them (and are merged with it on the device).
    """

    def __init__(self, backbone: Backbone, network: nn.Module, graph: fx.Graph) -> None:
        self.backbone, self.network, self.graph = backbone, network, graph
        self.modules = dict(network.named_modules())
        self.nodes = list(graph.nodes)
        ends = (name for node in self.nodes for name in node.meta.get("ends", ()))
        self.calls = collections.Counter(ends)
        self.shapes, self.macs = self._at_image_size()
        self.others = self._at_another_size()
        self.maps = {node for node in self.nodes if self._is_map(node)}
        self.alone = self.maps & _alone(self.nodes)
        self.blocks = self._find_blocks()
        self.chosen = {node for node in self.alone if self._is_worth_an_exit(node)}

    def traced(self) -> Traced:
        """The result. Errors: InputError when no exits can be attached."""
        total = self.macs[self.nodes[-1].name]
        cuts = tuple(self._cut(node) for node in self.nodes if node in self.chosen)
        self._check_maps(cuts, total)
        after = self.nodes[cuts[-1].node + 1 :]
        layers = tuple(str(node.target) for node in self.nodes if self._weights(node))
        classifier = tuple(name for node in after for name in node.meta.get("ends", ()))
        return Traced(self.backbone, self.graph, cuts, total, layers, classifier)

    def _at_image_size(self) -> tuple[_Shapes, dict[str, int]]:
        size, network = self.backbone.image_size, self.backbone.network
        try:
            return self._run(size)
        except Exception as error:  # whatever a layer raises at an impossible size
            smallest = self._smallest_above(min(sides(size)))
            remedy = f"; the smallest that works is {smallest}" if smallest else ""
            raise InputError(
                f"{network} does not work on images of {_named(size)}{remedy} "
                f"({_first_line(error)})"
            ) from error

    def _at_another_size(self) -> _Shapes | None:
        """Shapes at another size; None for a network that accepts only its own."""
        height, width = (max(_OTHER_SIZE, 2 * side) for side in sides(self.backbone.image_size))
        try:
            return self._run((height, width))[0]
        except Exception:
            return None

    def _smallest_above(self, size: int) -> int | None:
        """The smallest side above one that fails, by bisection; None where there is none."""
        low, high = size // _STEP, _LARGEST // _STEP
        if not self._works(high * _STEP):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._works(middle * _STEP) else (middle, high)
        return high * _STEP

    def _works(self, size: int) -> bool:
        try:
            self._run(size)
        except Exception:
            return False
        return True

    def _run(self, size: ImageSize) -> tuple[_Shapes, dict[str, int]]:
        """Shapes of all tensors, and operations up to each node, on tensors without data."""
        shapes: _Shapes = {}
        macs: dict[str, int] = {}

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                output = super().run_node(n)
                if isinstance(output, Tensor):
                    shapes[n.name] = tuple(output.shape)
                macs[n.name] = counter.get_total_flops() // 2
                return output

        images = torch.zeros(1, self.backbone.channels, *sides(size), device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            Interpreter(self.network, graph=self.graph).run(images)
        return shapes, macs

    def _is_map(self, node: fx.Node) -> bool:
        """Whether it gives `[N, C, H, W]` whose H and W, and not C, grow with the image."""
        shape = self.shapes.get(node.name, ())
        if node.op in ("placeholder", "output") or len(shape) != 4:
            return False
        if self.others is None:
            return shape[2] * shape[3] > 1
        other = self.others[node.name]
        return other[1] == shape[1] and other[2] > shape[2] and other[3] > shape[3]

    def _find_blocks(self) -> set[str]:
        """Modules with at least two layers that give feature maps, and end in a cut point."""
        layers = collections.Counter[str]()
        for node in self.maps:
            for name in node.meta["inside"]:
                layers[name] += self._weights(node)
        ending = {name for node in self.alone for name in node.meta.get("ends", ())}
        return {
            name
            for name in ending
            if layers[name] > 1 and not isinstance(self.modules[name], nn.Sequential)
        }

    def _is_worth_an_exit(self, node: fx.Node) -> bool:
        last = node  # of the normalisations and activations that finish this layer
        while len(last.users) == 1 and self._finishes(next(iter(last.users))):
            last = next(iter(last.users))
        return self._ends_a_block(node) and (last is node or not self._ends_a_block(last))

    def _ends_a_block(self, node: fx.Node) -> bool:
        """Whether a node is not inside a block, or its output."""
        around = [name for name in node.meta["inside"] if name in self.blocks]
        return not around or around[-1] in node.meta.get("ends", ())

    def _finishes(self, node: fx.Node) -> bool:
        """Whether a node only finishes the one before: a normalisation, an activation."""
        before = node.all_input_nodes
        if node not in self.alone or len(before) != 1 or self._weights(node):
            return False
        return self.shapes[before[0].name] == self.shapes[node.name]

    def _weights(self, node: fx.Node) -> int:
        return _weights(self.modules[str(node.target)]) if node.op == "call_module" else 0

    def _cut(self, node: fx.Node) -> CutPoint:
        channels, height, width = self.shapes[node.name][1:]
        # A module that is called twice ends in two places, and its name would be ambiguous.
        ends = [name for name in node.meta.get("ends", ()) if self.calls[name] == 1]
        blocks = [name for name in ends if name in self.blocks]
        around = collections.Counter(
            name for other in self.chosen for name in other.meta["inside"] if name in ends
        )
        single = [name for name in ends if around[name] == 1]  # not a list of several blocks
        name = blocks[0] if blocks else single[-1] if single else node.name
        aliases = tuple(end for end in ends if end != name)
        place = self.nodes.index(node)
        return CutPoint(name, aliases, (channels, height, width), self.macs[node.name], place)

    def _check_maps(self, cuts: tuple[CutPoint, ...], total: int) -> None:
        network, size = self.backbone.network, self.backbone.image_size
        share = cuts[-1].macs / total if cuts else 0.0
        if share < 0.5:
            where = f"after {cuts[-1].name}, {share:.0%} of its operations," if cuts else "anywhere"
            raise InputError(
                f"{network} has no feature maps {where} to attach exits to, as transformers have "
                "none: heads need maps [N, C, H, W]; use a convolutional network"
            )
        if self.others is not None:
            other = max(_OTHER_SIZE, 2 * sides(size)[1])
            side = self.others[self.nodes[cuts[-1].node].name][3]
            # A power of 2, as strides are; VGG's last layer also takes 6 positions off.
            stride = 2 ** int(math.log2(other // side))
            if min(sides(size)) < stride:
                smallest = math.ceil(stride / _STEP) * _STEP
                raise InputError(
                    f"images of {_named(size)} are too small for {network}, which divides the side "
                    f"by {stride}; the smallest size that works is {smallest}"
                )


def _alone(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes after which nothing but their own result is needed any more."""
    places = {node: place for place, node in enumerate(nodes)}
    last_use = [max((places[user] for user in node.users), default=-1) for node in nodes]
    alone, latest = set(), -1  # the last use of anything before this node
    for place, node in enumerate(nodes):
        if latest <= place and last_use[place] > place:
            alone.add(node)
        latest = max(latest, last_use[place])
    return alone


def _weights(module: nn.Module) -> int:
    """Layers with weight matrices or kernels inside a module, itself included."""
    return sum(
        any(parameter.dim() > 1 for parameter in each.parameters(recurse=False))
        for each in module.modules()
    )


def _named(size: ImageSize) -> str:
    return "x".join(map(str, sides(size)))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
