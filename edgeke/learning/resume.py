"""Checkpoints of a training under way: a killed stage goes on to bit-identical weights."""

import hashlib
import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgeke.files import write_bytes

__all__ = [
    "FOLDER",
    "Progress",
    "ResumeFile",
    "Stopped",
    "fingerprint",
    "load_optimiser",
    "optimiser_tensors",
    "stop_signals",
]

FOLDER = Path(".edgeke/checkpoints")


@dataclass(frozen=True)
class Progress:
    """Where training stands: epochs done, steps into the next, and the rows so far."""

    epoch: int
    step: int
    history: list[dict[str, float]]


class Stopped(KeyboardInterrupt):
    """Training was told to stop (SIGTERM) and has saved its state."""


class ResumeFile:
    """One file below `.edgeke/checkpoints`, outside DVC's outs, named by stage and key.

    The key is a hash of everything the weights depend on, so that a checkpoint of other parameters
    is never picked up. Holds tensors (weights, optimiser, moving average, generators) and, in its
    header, the progress as JSON.
    """

    def __init__(self, slot: str, **depends_on: object) -> None:
        text = json.dumps(depends_on, sort_keys=True, default=_plain)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = FOLDER / f"{slot.replace('/', '-')}-{key}.safetensors"

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write the state atomically."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self.path, save(held, {"progress": json.dumps(asdict(progress))}))

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The saved state, or None where there is none that can be read."""
        try:
            with safe_open(self.path, framework="pt") as file:
                progress = Progress(**json.loads(file.metadata()["progress"]))
                names = file.keys()
                return progress, {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None

    def remove(self) -> None:
        """Forget the state: the stage has written its artefact."""
        self.path.unlink(missing_ok=True)


def fingerprint(module: nn.Module | None) -> str:
    """A hash of a module's weights, for keys; empty for None."""
    digest = hashlib.sha256()
    for name, tensor in (module.state_dict() if module else {}).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    return {
        f"optimiser.{index}.{name}": torch.as_tensor(value)
        for index, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` named."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM instead of dying at once: the list stays empty until it came."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread: somebody else handles signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
