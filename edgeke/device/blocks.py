"""What each block and each exit costs on this device, by ONNX Runtime's own profiler.

It gives the time of every kernel by the name of its node. The file is also timed without it, in
turn: what passes between kernels is in no block.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.manifest import Block
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved

# The profiler writes half a kilobyte for each kernel of each run.
_MOST_ROUNDS = 100
# Sums are compared at this percentile: other processes disturb the quicker runs least.
_QUIET = 10
# The profiler's time for a kernel, in units of its time for a tensor (measured: 1.5 and 0.33 us).
_FIXED = 4.5

_Event = dict[str, Any]


@dataclass(frozen=True)
class BlockRow:
    """One line of a profile: a block, an exit, the decision after it, or the whole run (`kind`).

    `median_ms` and `p95_ms`: its kernels together. `cumulative_ms`: the medians up to this row
    together. The whole run is timed without the profiler. Bytes are those of one image's output; an
    exit's logits are fp32 in any precision.
    """

    kind: str
    name: str
    median_ms: float
    p95_ms: float
    cumulative_ms: float
    macs: int
    parameters: int
    output_bytes_fp32: int
    output_bytes_int8: int


@dataclass(frozen=True, eq=False)
class BlockProfile:
    """Blocks, exits and decisions in order of execution, and their milliseconds `[runs, blocks]`.

    `whole_ms` `[runs]`: one image on the longest path, timed without the profiler. `overhead_ms`
    was subtracted from the time of each of the `kernels`, in the mean: see `profile_blocks`.
    """

    blocks: tuple[Block, ...]
    milliseconds: NDArray[np.float64]
    whole_ms: NDArray[np.float64]
    kernels: int
    overhead_ms: float

    @property
    def share(self) -> float:
        """The kernels' time over that of the whole run: the rest passes between kernels."""
        quiet = np.percentile(self.milliseconds, _QUIET, axis=0).sum()
        return float(quiet / np.percentile(self.whole_ms, _QUIET))

    def cascade(self) -> list[BlockRow]:
        """All that an image meets which no exit is sure of, and the whole run."""
        rows = self._rows(range(len(self.blocks)))
        median, p95 = float(np.median(self.whole_ms)), float(np.percentile(self.whole_ms, 95))
        macs, parameters = sum(row.macs for row in rows), sum(row.parameters for row in rows)
        return [*rows, BlockRow("whole", "whole", median, p95, median, macs, parameters, 0, 0)]

    def path(self, exit: int) -> list[BlockRow]:
        """The trunk and one exit alone: no other exit, no decision. -1: the main exit."""
        last = exit % (1 + max(block.exit for block in self.blocks))
        return self._rows(
            place
            for place, block in enumerate(self.blocks)
            if (block.kind == "block" and block.exit <= last)
            or (block.kind == "exit" and block.exit == last)
        )

    def _rows(self, places: Any) -> list[BlockRow]:
        chosen = list(places)
        medians, p95 = np.percentile(self.milliseconds[:, chosen], [50, 95], axis=0)
        rows = []
        for place, median, high, total in zip(chosen, medians, p95, medians.cumsum(), strict=True):
            block = self.blocks[place]
            values = math.prod(block.shape) if block.shape else 0
            size = values if block.kind == "block" else 4 * values
            times = (float(median), float(high), float(total))
            costs = (block.macs, block.parameters, 4 * values, size)
            rows.append(BlockRow(block.kind, block.name, *times, *costs))
        return rows


def profile_blocks(
    model: Path,
    blocks: Sequence[Block],
    feeds: Mapping[str, NDArray[Any]],
    threads: int,
    rounds: int,
    seconds: float,
) -> BlockProfile:
    """Run a one-file model with and without the profiler in turn, in up to `rounds` (100) rounds.

    `feeds` are its inputs, with thresholds that lead to the last exit. Within a kernel's time the
    profiler describes the tensors that the kernel reads and writes, which takes microseconds. Where
    kernels add up to more than the whole run, the surplus is subtracted in proportion to these
    tensors, but no kernel's time becomes negative. All of it ends within about `seconds`. Errors:
    InputError for fewer than one round, or a damaged file.
    """
    steps = _with_decisions(blocks)
    with tempfile.TemporaryDirectory() as folder:
        plain, profiled = (
            open_session(model, threads),
            open_session(model, threads, Path(folder) / "run"),
        )
        sessions = {"plain": plain, "profiled": profiled}
        calls = {name: partial(each.run, None, feeds) for name, each in sessions.items()}
        whole = time_interleaved(calls, min(rounds, _MOST_ROUNDS), seconds)["plain"]
        events = json.loads(Path(profiled.end_profiling()).read_text())
    # As the plain runs, those that follow another run of the same session.
    runs = list(_runs(events))[1 - 2 * len(whole) :: 2]
    count = len(runs[0])
    kernels = np.array([[event["dur"] for event in run] for run in runs]) / 1e3
    weights = np.array([_FIXED + _tensors(event) for event in runs[0]])
    low = np.percentile(kernels, _QUIET, axis=0)
    surplus = max(float(low.sum() - np.percentile(whole, _QUIET)), 0.0) / weights.sum()
    overhead = weights * min(surplus, float(((low + 1e-3) / weights).min()))
    belongs = np.zeros((count, len(steps)))
    belongs[range(count), _owners([event["name"] for event in runs[0]], steps)] = 1
    milliseconds = np.maximum(kernels - overhead, 0) @ belongs
    return BlockProfile(steps, milliseconds, np.array(whole), count, float(overhead.mean()))


def _with_decisions(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks, and after every exit its decision: softmax, score, and what leads to the next."""
    steps = []
    for block in blocks:
        steps.append(block)
        if block.kind == "exit":
            steps.append(Block(f"decision_{block.exit}", "decision", block.exit, 0, 0, (), ""))
    return tuple(steps)


def _runs(events: Sequence[_Event]) -> Iterator[list[_Event]]:
    """Every run's kernels in order. An If node is none: its time is that of the kernels inside."""
    kernels: list[_Event] = []
    for event in events:
        if event["name"] == "model_run":
            yield sorted(kernels, key=lambda kernel: kernel["ts"])
            kernels = []
        elif event["name"].endswith("_kernel_time") and event["args"]["op_name"] != "If":
            kernels.append(event)


def _tensors(event: _Event) -> int:
    return len(event["args"]["input_type_shape"]) + len(event["args"]["output_type_shape"])


def _owners(names: Sequence[str], steps: Sequence[Block]) -> list[int]:
    """To which row each kernel's time belongs, `[kernels]`.

    Names are those of a composed file: `s<e>_` and the name in segment e, `e<e>_` for decisions.
    Optimisers name some nodes after their output (`features`), and others (reorders) after nothing
    of ours: these belong to the row of the kernel before.
    """
    starts: dict[str, int] = {}
    for place, step in enumerate(steps):
        if step.kind == "decision":
            starts[f"e{step.exit}_"] = place
            continue
        starts[f"s{step.exit}_{step.nodes}"] = place
        starts.setdefault(f"s{step.exit}_features_in", place)  # the segment's first
        if step.kind == "block":
            starts[f"s{step.exit}_features"] = place  # its last
    owners: list[int] = []
    for name in names:
        fitting = [start for start in starts if name.startswith(start)]
        before = owners[-1] if owners else 0
        owners.append(starts[max(fitting, key=len)] if fitting else before)
    return owners
