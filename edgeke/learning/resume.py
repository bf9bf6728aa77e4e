"""Checkpoints of an unfinished training: a killed stage goes on to bit-identical weights."""

import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from edgeke.errors import InputError
from edgeke.files import process_number, repository, write_bytes
from edgeke.learning.parallel import first_process, from_first

FOLDER = Path(".edgeke/checkpoints")  # of the repository: DVC deletes copies with what is in them
_ABANDONED = 3600  # seconds after which a file that nobody finished has no writer any more

# What in the package `edgeke` computes weights.
_STAGES = ("train_teacher.py", "distill.py", "prune.py", "train_branchynet.py")
_CODE = ("data", "learning", "networks", *_STAGES)


@dataclass(frozen=True)
class Progress:
    """Where training stands: finished epochs, steps of the next, and the rows so far."""

    epoch: int
    step: int
    history: list[dict[str, float]]


class Stopped(KeyboardInterrupt):
    """Training was told to stop (SIGTERM) and has saved its state."""


class ResumeFile:
    """A file in the repository's `.edgeke/checkpoints`, outside DVC's outs, named by stage and key.

    The key is a hash of everything the weights depend on: what the caller names (parameters, data,
    teacher), our code and the version of torch. A state of other parameters or other code is
    therefore never picked up. The file holds tensors (weights, optimiser, moving average,
    generator) and the progress as JSON.
    """

    def __init__(self, slot: str, **depends_on: object) -> None:
        depends_on |= {"code": code_hash(), "torch": torch.__version__}
        text = json.dumps(depends_on, sort_keys=True, default=_plain)
        self.slot, self.key = slot, hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = repository() / FOLDER / f"{slot.replace('/', '-')}-{self.key}.safetensors"

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write the state atomically."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        encoded = bytearray(json.dumps(asdict(progress)).encode())
        state["progress"] = torch.frombuffer(encoded, dtype=torch.uint8)
        write_bytes(self.path, save(state))

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """The saved state, the first process's for all; None where there is none to be used.

        Errors: InputError when this process does not train from what the first one does.
        """
        if from_first(self.key.encode()) != self.key.encode():
            raise InputError(
                f"process {process_number()} has other parameters, code, data or models for "
                f"{self.slot} than process 0; give every machine the same copy of the project, "
                "data/ and models/ included"
            )
        content = from_first(self.path.read_bytes() if self.path.is_file() else b"")
        if not content:
            return None
        try:
            tensors = load(content)
            progress = Progress(**json.loads(tensors.pop("progress").numpy().tobytes()))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            self.refuse(f"it is damaged ({error})")
            return None
        return progress, tensors

    def refuse(self, reason: str) -> None:
        """Say that the file is not used; the next checkpoint replaces it."""
        if first_process():
            text = f"warning: {self.path} is ignored: {reason}; {self.slot} starts again"
            print(text, file=sys.stderr)

    def remove(self) -> None:
        """Delete the file: the stage has written its result.

        So are files that processes left which were killed while they wrote them; a young one may be
        another experiment's, which is being written.
        """
        if first_process():  # which alone writes results
            self.path.unlink(missing_ok=True)
            for path in self.path.parent.glob(".*.tmp"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - _ABANDONED:
                        path.unlink()


@cache
def code_hash(package: Path = Path(__file__).parents[1]) -> str:
    """A hash of the source files that weights depend on."""
    digest = hashlib.sha256()
    for name in _CODE:
        for path in sorted((package / name).rglob("*.py")) or [package / name]:
            digest.update(path.relative_to(package).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


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
    """Collect SIGTERM instead of stopping at once: the list is empty until it arrives."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # only the main thread may handle signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
