"""What one device of a cluster does with one image: run graphs on its rows, pack and unpack rows.

NumPy and ONNX Runtime only. Nothing here knows how messages travel.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.device.session import open_session
from edgeke.errors import InputError

ORIGIN = -1  # the source of the image, in place of a device's number
Array = NDArray[Any]
Content = dict[str, Array]  # what a message carries: rows or pooled parts, by name


@dataclass(frozen=True)
class Assembly:
    """A value's rows put together: which rows (from, to) come from which device, top to bottom."""

    name: str
    axis: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Merge:
    """A value that is pooled over all rows: how many rows each device pooled, `(device, n)`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Message:
    """What a device has for a target after a phase: `rows` as (value, axis, from, to) of its array.

    A device's message to itself is kept; the target after the last device is the finals' worker.
    """

    target: int
    rows: tuple[tuple[str, int, int, int], ...]
    pooled: tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """What a device does between two exchanges.

    `graph`: its key; None where there is nothing to compute. `receives`: the messages it needs, as
    (phase, device). `drops`: values that no later phase reads.
    """

    graph: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    receives: tuple[tuple[int, int], ...]
    assemblies: tuple[Assembly, ...]
    merges: tuple[Merge, ...]
    messages: tuple[Message, ...]
    drops: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """What one device, number `device` of the plan, does for an image.

    `finals` `[E]`: how each exit's logits are computed, on the leading device alone.
    """

    device: int
    phases: tuple[Phase, ...]
    finals: tuple[Phase, ...] = ()


@dataclass
class Programs:
    """What all devices run.

    `ends` `[E]`: how many phases there are before each exit. `image_rows` `[D]`: the rows of the
    image that each device gets.
    """

    programs: list[Program]
    graphs: dict[str, bytes]
    ends: list[int]
    image_rows: list[tuple[int, int]]

    def keys(self, device: int) -> set[str]:
        """Keys of the graphs that a device runs."""
        program = self.programs[device]
        return {phase.graph for phase in (*program.phases, *program.finals) if phase.graph}

    @property
    def leader(self) -> int:
        """The device that computes logits."""
        return next(d for d, program in enumerate(self.programs) if program.finals)


@dataclass
class Worker:
    """Runs a device's programs, any number of images in turn. Not safe to share between threads."""

    threads: int = 1
    clock: Callable[[], float] = time.perf_counter
    programs: dict[int, Program] = field(default_factory=dict)
    _graphs: dict[str, onnxruntime.InferenceSession] = field(default_factory=dict)
    _values: dict[tuple[int, bool], Content] = field(default_factory=dict)

    @property
    def graphs(self) -> set[str]:
        """Keys of the graphs that are open."""
        return set(self._graphs)

    def load(self, plan: int, program: Program, graphs: Mapping[str, bytes]) -> None:
        """Be ready for a plan, by its number. Errors: InputError when a graph cannot be opened."""
        for key, content in graphs.items():
            if key not in self._graphs:
                self._graphs[key] = open_session(content, self.threads)
        self.programs[plan] = program
        needed = {phase.graph for phase in (*program.phases, *program.finals)} - {None}
        if missing := needed - set(self._graphs):
            raise InputError(f"graphs {sorted(map(str, missing))} were not sent; plan again")

    def unload(self, plan: int) -> None:
        """Forget a plan, and the graphs that no other one needs."""
        self.programs.pop(plan, None)
        phases = [p for one in self.programs.values() for p in (*one.phases, *one.finals)]
        needed = {phase.graph for phase in phases}
        self._graphs = {key: graph for key, graph in self._graphs.items() if key in needed}

    def forget(self, image: int) -> None:
        """The image is answered, or given up."""
        self._values.pop((image, False), None)
        self._values.pop((image, True), None)

    def phase(
        self, plan: int, image: int, number: int, contents: Sequence[Content]
    ) -> tuple[list[Content], float]:
        """Run a phase with the messages that it receives: those to send, and seconds."""
        program = self.programs[plan]
        values = self._values.setdefault((image, False), {})
        started = self.clock()
        messages = _run(self._graphs, values, program.phases[number], contents, program.device)
        return messages, self.clock() - started

    def final(
        self, plan: int, image: int, exit: int, contents: Sequence[Content]
    ) -> tuple[Array, float]:
        """An exit's logits `[K]`, and seconds."""
        phase = self.programs[plan].finals[exit]
        values = self._values.setdefault((image, True), {})
        started = self.clock()
        _run(self._graphs, values, phase, contents, None)
        logits: Array = values[phase.outputs[0]][0]
        return logits, self.clock() - started


def _run(
    graphs: Mapping[str, onnxruntime.InferenceSession],
    values: Content,
    phase: Phase,
    contents: Sequence[Content],
    me: int | None,
) -> list[Content]:
    for (_, device), content in zip(phase.receives, contents, strict=True):
        values |= {f"{name}@{device}": array for name, array in content.items()}
    for assembly in phase.assemblies:
        values[assembly.name] = _assemble(values, assembly)
    for merge in phase.merges:
        values[merge.name] = _merged(values, merge)
    if phase.graph is not None:
        feeds = {name: values[name] for name in phase.inputs}
        outputs = graphs[phase.graph].run(list(phase.outputs), feeds)
        values |= dict(zip(phase.outputs, outputs, strict=True))
    messages = []
    for message in phase.messages:
        content = {
            name: values[name][(slice(None),) * axis + (slice(low, high),)]
            for name, axis, low, high in message.rows
        }
        content |= {name: values[name] for name in message.pooled}
        if message.target == me:
            values |= {f"{name}@{me}": array for name, array in content.items()}
        else:
            messages.append(content)
    for name in phase.drops:
        values.pop(name, None)
    return messages


def _assemble(values: Content, assembly: Assembly) -> Array:
    axis, rows = assembly.axis, []
    for device, low, high in assembly.pieces:
        array = values[f"{assembly.name}@{device}"]
        assert array.shape[axis] == high - low, "the message has other rows than the plan"
        rows.append(array)
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis)


def _merged(values: Content, merge: Merge) -> Array:
    """The pooled value of all rows from those of each device's rows."""
    parts = [values[f"{merge.name}@{device}"].astype(np.float64) for device, _ in merge.counts]
    if merge.kind == "max":
        merged = np.maximum.reduce(parts)
    else:
        counts = np.array([count for _, count in merge.counts], np.float64)
        weights = counts / counts.sum()
        merged = np.tensordot(weights, np.stack(parts), 1)
        if merge.kind == "variance":
            # Within each device's rows, and between them.
            means = np.stack([values[f"{merge.name}/mean@{device}"] for device, _ in merge.counts])
            apart = means - np.tensordot(weights, means.astype(np.float64), 1)
            merged += np.tensordot(weights, apart**2, 1)
    assert merged.size == math.prod(merge.shape)
    answer: Array = merged.astype(np.float32).reshape(merge.shape)
    return answer


def run_together(
    workers: Sequence[Worker], plan: int, programs: Programs, image: Array
) -> tuple[Array, NDArray[np.float64], list[float]]:
    """All devices' programs in this process, in turn, on one image `[1, H, W, C]`.

    Returns the logits `[E, K]`, and the seconds of each phase `[phases, D]` and of each final.
    """
    sent: dict[tuple[int, int, int], Content] = {}
    count, leader = len(workers), programs.leader
    phases, finals, logits = np.zeros((programs.ends[-1], count)), [], []
    start = 0
    for exit, end in enumerate(programs.ends):
        for number in range(start, end):
            for device, program in enumerate(programs.programs):
                phase, rows = program.phases[number], programs.image_rows[device]
                contents = [
                    {"image": image[:, slice(*rows)]} if s == ORIGIN else sent[q, s, device]
                    for q, s in phase.receives
                ]
                messages, phases[number, device] = workers[device].phase(plan, 0, number, contents)
                targets = [m.target for m in phase.messages if m.target != device]
                for target, content in zip(targets, messages, strict=True):
                    sent[number, device, target] = content
        start = end
        receives = programs.programs[leader].finals[exit].receives
        contents = [{"image": image} if s == ORIGIN else sent[q, s, count] for q, s in receives]
        values, seconds = workers[leader].final(plan, 0, exit, contents)
        logits.append(values)
        finals.append(seconds)
    for worker in workers:
        worker.forget(0)
    return np.stack(logits), phases, finals
