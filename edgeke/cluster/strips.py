"""From heights to programs: which rows each device computes, and the graphs that compute them.

A device owns some rows of every value. Where a value is exchanged, devices have their own rows of
it, and get the rows that their next windows reach into from those who own them. Between two
exchanges they compute rows near a border twice. A graph's windows are padded only where a strip
ends at the image's border, so it has three variants: for the top, for the middle, for the bottom.
"""

import bisect
import copy
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeke.cluster.network import Network, Step, attribute, finished, sources
from edgeke.cluster.worker import ORIGIN, Assembly, Merge, Message, Phase, Program, Programs

_END = np.iinfo(np.int64).max
Rows = tuple[int, int]  # from, to


@dataclass(frozen=True)
class Layout:
    """How a network is shared.

    `exchanged`: the values whose rows travel, in order; the image is always among them. `gathered`:
    the value from which on the leading device works alone. `heights` `[D]`: how much each device
    owns of every map, in units of `step` rows of the image (0: those of one row of `gathered`);
    where a map's rows are coarser, a boundary is the next row. `leader`: who leads, 0..D-1.
    """

    exchanged: tuple[str, ...]
    gathered: str
    heights: tuple[int, ...]
    leader: int = 0
    step: int = 0


@dataclass
class _Build:
    """What is known while programs are built: phases of values, and ranges of rows by device.

    `lead`: what the leading device computes alone; `live`: what devices compute that is needed.
    `phase` of an exchanged or pooled value is that of its producer: it is read in a later one.
    """

    network: Network
    layout: Layout
    lead: set[str] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    phase: dict[str, int] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)  # the first phase of each segment
    own: list[dict[str, Rows]] = field(default_factory=list)
    want: list[dict[str, Rows]] = field(default_factory=list)
    graphs: dict[str, bytes] = field(default_factory=dict)

    @property
    def shared(self) -> set[str]:
        return {"image", *self.layout.exchanged}

    @property
    def devices(self) -> range:
        return range(len(self.layout.heights))

    def steps(self) -> list[Step]:
        """What devices compute, in order."""
        return [s for s in self.network.steps if not self.live.isdisjoint(s.node.output)]

    def segment(self, phase: int) -> int:
        """Which segment a phase belongs to."""
        return bisect.bisect_right(self.first, phase) - 1

    def computed(self, device: int, name: str) -> Rows | None:
        """The rows of a value that a device computes itself."""
        rows = self.own[device][name] if name in self.shared else self.want[device].get(name)
        return rows if rows is not None and rows[0] < rows[1] else None

    def add_graph(self, graph: onnx.GraphProto) -> str:
        """Keep a graph; equal graphs have one key."""
        content = finished(graph)
        key = hashlib.sha256(content).hexdigest()
        self.graphs[key] = content
        return key


@dataclass
class _Final:
    """What an exit's logits are computed from: whole maps, pooled values, earlier results."""

    steps: list[Step]
    gathers: list[str]
    merges: list[str]
    earlier: list[str]


def build(network: Network, layout: Layout) -> Programs:
    """The programs of all devices."""
    state = _Build(network, layout)
    _find_lead(state)
    finals = _find_finals(state)
    _find_live(state, finals)
    _find_phases(state)
    gathers = {name for final in finals for name in final.gathers}
    merges = {name for final in finals for name in final.merges}
    for device in state.devices:
        state.own.append(_own_rows(state, device))
        state.want.append({})
        _find_ranges(state, device, gathers - {"image"})
    ends: list[int] = []
    for final in finals:
        known = [state.phase[name] + 1 for name in (*final.gathers, *final.merges)]
        ends.append(max([0, *ends, *known]))
    readers = [_readers(state, device) for device in state.devices]
    lead_phases = _final_phases(state, finals)
    programs = []
    for device in state.devices:
        phases = _device_phases(state, device, ends[-1], readers, gathers, merges)
        own = lead_phases if device == layout.leader else ()
        programs.append(Program(device, tuple(phases), own))
    rows = [state.want[device].get("image", (0, 0)) for device in state.devices]
    return Programs(programs, state.graphs, ends, rows)


def alone(network: Network) -> Layout:
    """All for one device."""
    return Layout((), "image", (network.height("image"),))


def own_rows(network: Network, name: str, layout: Layout, device: int) -> Rows:
    """The rows of a value that a device owns: none twice, and none left out."""
    step, height = layout.step or network.stride[layout.gathered], network.height(name)
    ends = [0, *itertools.accumulate(layout.heights)]
    low, high = (min(height, -(-end * step // network.stride[name])) for end in ends[device:][:2])
    return low, height if device == len(layout.heights) - 1 else high


def _find_lead(state: _Build) -> None:
    lead = {state.layout.gathered}
    for step in state.network.steps:
        alone = step.kind == "lead" or not lead.isdisjoint(step.node.input)
        if alone and step.kind != "constant":
            lead.update(step.node.output)
    state.lead = lead - {state.layout.gathered}


def _find_finals(state: _Build) -> list[_Final]:
    network, done = state.network, set[str]()
    finals = []
    for exit in network.exits:
        final, needed = _Final([], [], [], []), {exit}
        for step in reversed(network.steps):
            names = needed.intersection(step.node.output)
            if not names or step.kind == "constant":
                continue
            if not done.isdisjoint(names):
                final.earlier += sorted(names)
            elif not state.lead.isdisjoint(names) or (step.kind == "whole" and not step.pooled):
                final.steps.insert(0, step)
                needed.update(name for name in step.node.input if name)
            elif step.pooled:
                final.merges += names
            else:
                final.gathers += names
        if "image" in needed and "image" not in final.gathers:
            final.gathers.append("image")
        done |= {name for step in final.steps for name in step.node.output} & state.lead
        finals.append(final)
    return finals


def _find_live(state: _Build, finals: Sequence[_Final]) -> None:
    needed = {name for final in finals for name in (*final.gathers, *final.merges)}
    for step in reversed(state.network.steps):
        mine = step.kind != "constant" and state.lead.isdisjoint(step.node.output)
        if mine and not needed.isdisjoint(step.node.output):
            state.live.update(step.node.output)
            needed.update(sources(step))


def _find_phases(state: _Build) -> None:
    """In which phase each value is computed; a segment's phases come after those before it."""
    phase, base, top = state.phase, 0, -1
    phase["image"], state.first = -1, [0]
    for step in state.steps():
        while step.segment >= len(state.first):
            base = top + 1
            state.first.append(base)
        if step.pooled:
            at = max(phase[step.source], 0)
        else:
            known = [name for name in sources(step) if name in phase]
            at = max([base, *(phase[name] + _waits(state, name) for name in known)])
        phase |= dict.fromkeys(step.node.output, at)
        if step.kind != "whole" or step.pooled:
            top = max(top, at)


def _waits(state: _Build, name: str) -> bool:
    """Whether a value can be read only after an exchange."""
    step = state.network.producer(name)
    return name in state.shared or (step is not None and step.pooled is not None)


def _own_rows(state: _Build, device: int) -> dict[str, Rows]:
    network = state.network
    names = [name for name, kind in network.kinds.items() if kind == "rows"]
    return {name: own_rows(network, name, state.layout, device) for name in names}


def _find_ranges(state: _Build, device: int, gathers: Iterable[str]) -> None:
    """The rows of each value that a device has: of an exchanged one, after the exchange."""
    network, own, want = state.network, state.own[device], state.want[device]

    def add(name: str, rows: Rows) -> None:
        if rows[0] < rows[1]:
            low, high = want.get(name, rows)
            want[name] = (min(low, rows[0]), max(high, rows[1]))

    for name in gathers:
        if name not in state.shared:
            add(name, own[name])
    for step in reversed(state.steps()):
        if step.pooled:
            if step.source not in state.shared:
                add(step.source, own[step.source])
        elif step.kind == "rows":
            rows = _output_rows(state, device, step)
            for name in set(sources(step)) if rows else ():
                if network.kinds[name] == "rows":
                    add(name, _input_rows(network, step, name, rows))  # type: ignore[arg-type]


def _output_rows(state: _Build, device: int, step: Step) -> Rows | None:
    """The rows of a step's outputs that a device computes."""
    every = [state.computed(device, name) for name in step.node.output]
    rows = [each for each in every if each is not None]
    return (min(r[0] for r in rows), max(r[1] for r in rows)) if rows else None


def _input_rows(network: Network, step: Step, name: str, rows: Rows) -> Rows:
    if step.window is None:
        return rows
    start, end = step.window.rows(*rows)
    return max(0, start), min(network.height(name), end)


def _readers(state: _Build, device: int) -> dict[str, list[int]]:
    """In which phases a device reads a value, ascending: rows, and what is pooled."""
    readers: dict[str, set[int]] = defaultdict(set)
    for step in state.steps():
        if step.pooled and step.source not in state.shared:
            if state.computed(device, step.source):
                readers[step.source].add(state.phase[step.node.output[0]])
        elif step.kind == "rows" and _output_rows(state, device, step):
            at = state.phase[step.node.output[0]]
            for name in _real_inputs(state, step):
                readers[name].add(at)
    return {name: sorted(phases) for name, phases in readers.items()}


def _real_inputs(state: _Build, step: Step) -> set[str]:
    """The rows and pooled values that a step reads, itself or through small steps between."""
    network, names = state.network, set[str]()
    for name in sources(step):
        before = network.producer(name)
        if network.kinds[name] == "rows" or (before is not None and before.pooled):
            names.add(name)
        elif network.kinds[name] == "whole" and before is not None:
            names |= _real_inputs(state, before)
    return names


def _final_phases(state: _Build, finals: Sequence[_Final]) -> tuple[Phase, ...]:
    """How the leading device computes each exit's logits."""
    network, target = state.network, len(state.layout.heights)
    phases = []
    gathered = set[str]()
    for number, final in enumerate(finals):
        graph = _Graph(state)
        outputs = [network.exits[number]]
        for later in finals[number + 1 :]:
            own = {name for step in final.steps for name in step.node.output}
            outputs += [name for name in later.earlier if name in own and name not in outputs]
        for name in (*final.gathers, *final.merges, *final.earlier):
            graph.add_input(name)
        for step in final.steps:
            graph.add_node(step.node)
        fresh = [name for name in final.gathers if name not in gathered]
        gathered |= set(final.gathers)
        assemblies = tuple(_assembly(state, n, (0, network.height(n))) for n in fresh)
        merges = tuple(_merge(state, name) for name in final.merges)
        receives = _receives(state, assemblies, merges)
        key = state.add_graph(graph.finished(outputs)) if final.steps else None
        inputs = tuple(graph.inputs) if final.steps else ()
        phases.append(Phase(key, inputs, tuple(outputs), receives, assemblies, merges, (), ()))
    assert target == len(state.own)
    return tuple(phases)


def _assembly(state: _Build, name: str, rows: Rows) -> Assembly:
    """Where a value's rows come from."""
    axis = state.network.axis[name]
    if name == "image":
        return Assembly(name, axis, ((ORIGIN, *rows),))
    pieces = []
    for device in state.devices:
        low, high = state.own[device][name]
        low, high = max(low, rows[0]), min(high, rows[1])
        if low < high:
            pieces.append((device, low, high))
    return Assembly(name, axis, tuple(pieces))


def _merge(state: _Build, name: str) -> Merge:
    step = state.network.producer(name)
    assert step is not None
    counts = [
        (d, state.own[d][step.source][1] - state.own[d][step.source][0]) for d in state.devices
    ]
    shape = state.network.shapes[name]
    return Merge(name, str(step.pooled), shape, tuple((d, n) for d, n in counts if n > 0))


def _receives(
    state: _Build, assemblies: Iterable[Assembly], merges: Iterable[Merge], me: int | None = None
) -> tuple[tuple[int, int], ...]:
    """The messages that bring these rows and pooled values, as (phase, device)."""
    needed = {(state.phase[a.name], piece[0]) for a in assemblies for piece in a.pieces}
    needed |= {(state.phase[m.name], device) for m in merges for device, _ in m.counts}
    return tuple(sorted((phase, device) for phase, device in needed if device != me))


def _device_phases(
    state: _Build,
    device: int,
    count: int,
    readers: Sequence[dict[str, list[int]]],
    gathers: set[str],
    merges: set[str],
) -> list[Phase]:
    """All phases of one device."""
    mine, phases = readers[device], []
    received = set[tuple[int, int]]()
    for number in range(count):
        fresh = sorted(name for name, at in mine.items() if at[0] == number)
        assemblies = tuple(
            _assembly(state, name, state.want[device][name])
            for name in fresh
            if name in state.shared
        )
        pooled = tuple(_merge(state, n) for n in fresh if state.network.kinds[n] == "whole")
        receives = tuple(
            m for m in _receives(state, assemblies, pooled, device) if m not in received
        )
        received |= set(receives)
        messages = _messages(state, device, number, readers, gathers, merges)
        key, inputs, outputs = _phase_graph(state, device, number, mine, messages)
        drops = _drops(state, device, number, mine, assemblies, pooled, outputs)
        phases.append(
            Phase(key, inputs, outputs, receives, assemblies, pooled, tuple(messages), drops)
        )
    return phases


def _messages(
    state: _Build,
    device: int,
    number: int,
    readers: Sequence[dict[str, list[int]]],
    gathers: set[str],
    merges: set[str],
) -> list[Message]:
    """What a device has for others, and for itself, after a phase."""
    network, last = state.network, len(state.layout.heights)
    rows: dict[int, list[tuple[str, int, int, int]]] = defaultdict(list)
    pooled: dict[int, list[str]] = defaultdict(list)
    for step in state.steps():
        name = step.node.output[0]
        if state.phase[name] != number:
            continue
        if step.pooled and _count(state, device, step.source):
            targets = [d for d in state.devices if name in readers[d]]
            for target in (*targets, *([last] if name in merges else [])):
                extra = [f"{name}/mean"] if step.pooled == "variance" else []
                pooled[target] += [name, *extra]
        if step.kind != "rows":
            continue
        for name in step.node.output:
            mine = state.computed(device, name)
            if mine is None:
                continue
            targets = [d for d in state.devices if name in state.shared and name in readers[d]]
            ranges = [(d, state.want[d][name]) for d in targets]
            ranges += [(last, (0, network.height(name)))] if name in gathers else []
            for target, (low, high) in ranges:
                own = state.own[device][name]
                low, high = max(low, own[0]), min(high, own[1])
                if low < high:
                    start = low - mine[0]
                    rows[target].append((name, network.axis[name], start, start + high - low))
    targets = sorted({*rows, *pooled})
    return [Message(t, tuple(rows[t]), tuple(pooled[t])) for t in targets]


def _count(state: _Build, device: int, name: str) -> int:
    low, high = state.own[device][name]
    return max(0, high - low)


def _drops(
    state: _Build,
    device: int,
    number: int,
    mine: dict[str, list[int]],
    assemblies: Iterable[Assembly],
    merges: Iterable[Merge],
    outputs: Iterable[str],
) -> tuple[str, ...]:
    """What no later phase reads; a segment's inputs stay, so that it can be run again."""
    names = [f"{a.name}@{d}" for a in assemblies for d, *_ in a.pieces if d != device]
    names += [f"{m.name}@{d}" for m in merges for d, _ in m.counts if d != device]
    for name, at in mine.items():
        since = state.phase[name] + (name in state.shared or _waits(state, name))
        if at[-1] == number and state.segment(since) == state.segment(number):
            names.append(name)
    names += [name for name in outputs if name not in mine or name in state.shared]
    return tuple(names)


@dataclass
class _Graph:
    """A graph in the making, with the constants that its nodes read."""

    state: _Build
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def add_input(self, name: str) -> None:
        network = self.state.network
        shape: list[int | str] = list(network.shapes[name])
        if name in network.axis:
            shape[network.axis[name]] = f"rows of {name}"
        self.inputs[name] = helper.make_tensor_value_info(name, network.types[name], shape)
        self.names.add(name)

    def add_node(self, node: onnx.NodeProto) -> None:
        """Add a node, and before it the constants, and their nodes, that it reads."""
        network = self.state.network
        for name in filter(None, node.input):
            if name in network.constants:
                self.constants[name] = network.constants[name]
            elif network.kinds.get(name) == "constant" and name not in self.names:
                step = network.producer(name)
                assert step is not None
                self.add_node(step.node)
        self.nodes.append(node)
        self.names.update(node.output)

    def add_constant(self, values: Sequence[int]) -> str:
        name = "rows_" + "_".join(map(str, values))
        array = np.array(values, np.int64)
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def finished(self, outputs: Sequence[str]) -> onnx.GraphProto:
        return helper.make_graph(
            self.nodes,
            "strip",
            list(self.inputs.values()),
            [onnx.ValueInfoProto(name=name) for name in outputs],
            list(self.constants.values()),
        )


def _phase_graph(
    state: _Build,
    device: int,
    number: int,
    mine: dict[str, list[int]],
    messages: Sequence[Message],
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The graph of a phase on one device: its key, inputs and outputs."""
    network, want = state.network, state.want[device]
    graph, crops = _Graph(state), dict[tuple[str, Rows], str]()
    ranges: dict[str, Rows] = {}  # of what the graph has

    def read(name: str, rows: Rows) -> str:
        """The name under which exactly these rows can be read."""
        if name not in ranges:
            ranges[name] = want[name]
            graph.add_input(name)
        low, high = ranges[name]
        if (low, high) == rows:
            return name
        if (name, rows) not in crops:
            crops[name, rows] = f"{name} from {rows[0] - low} to {high - rows[1]} before the end"
            start = graph.add_constant([rows[0] - low])
            end = graph.add_constant([_END if rows[1] == high else rows[1] - high])
            axis = graph.add_constant([network.axis[name]])
            inputs = [name, start, end, axis]
            graph.add_node(helper.make_node("Slice", inputs, [crops[name, rows]]))
        return crops[name, rows]

    def small(name: str) -> None:
        """Compute a small value from pooled ones."""
        step = network.producer(name)
        if name in graph.names or step is None or network.kinds[name] != "whole":
            return
        if step.pooled:
            graph.add_input(name)
            return
        for each in filter(None, step.node.input):
            small(each)
        graph.add_node(step.node)

    pools = []
    for step in state.steps():
        if state.phase[step.node.output[0]] != number:
            continue
        if step.pooled:
            if _count(state, device, step.source):
                pools.append(step)
            continue
        rows = _output_rows(state, device, step) if step.kind == "rows" else None
        if rows is None:
            continue
        node = copy.deepcopy(step.node)
        for place, name in enumerate(node.input):
            if network.kinds.get(name) == "rows":
                node.input[place] = read(name, _input_rows(network, step, name, rows))
            elif name:
                small(name)
        if step.window is not None:
            _pad_rows(network, node, step, rows)
        graph.add_node(node)
        ranges |= dict.fromkeys(node.output, rows)
    for step in pools:
        _add_pool(graph, step, read(step.source, state.own[device][step.source]))
    outputs = [name for m in messages for name in (*(r[0] for r in m.rows), *m.pooled)]
    outputs += [name for name, at in mine.items() if state.phase[name] == number < at[-1]]
    made = {name for node in graph.nodes for name in node.output}
    names = tuple(name for name in dict.fromkeys(outputs) if name in made)
    if not names:
        return None, (), ()
    return state.add_graph(graph.finished(names)), tuple(graph.inputs), names


def _pad_rows(network: Network, node: onnx.NodeProto, step: Step, rows: Rows) -> None:
    """Pad a window's rows only where they are outside of the image's map."""
    assert step.window is not None
    start, end = step.window.rows(*rows)
    height = network.height(next(n for n in step.node.input if network.kinds[n] == "rows"))
    pads = list(attribute(node, "pads", None) or [0, 0, 0, 0])
    pads[0], pads[2] = max(0, -start), max(0, end - height)
    kept = [each for each in node.attribute if each.name not in ("pads", "ceil_mode")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _add_pool(graph: _Graph, step: Step, source: str) -> None:
    """A device's part of a pooled value: of its own rows."""
    name, axes = step.node.output[0], graph.add_constant(step.axes)
    if step.pooled == "max":
        graph.add_node(helper.make_node("ReduceMax", [source, axes], [name], keepdims=1))
        return
    mean = name if step.pooled == "mean" else f"{name}/mean"
    graph.add_node(helper.make_node("ReduceMean", [source, axes], [mean], keepdims=1))
    if step.pooled == "variance":
        away, square = f"{name}/away", f"{name}/square"
        graph.add_node(helper.make_node("Sub", [source, mean], [away]))
        graph.add_node(helper.make_node("Mul", [away, away], [square]))
        graph.add_node(helper.make_node("ReduceMean", [square, axes], [name], keepdims=1))
