"""One process, or several under torchrun: who takes which images, and how they agree.

Several processes go through Hugging Face Accelerate (docs/decisions/005-accelerate.md), which is
imported only then.
"""

import os
from typing import Protocol

import torch
from torch import Tensor, nn

from edgeke.errors import InputError

__all__ = ["Parallel", "current_parallel", "local_device", "world_size"]


class Parallel(Protocol):
    """What the fit loop asks of the processes that train together."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over the processes."""

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a global batch."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, on each of them."""


class _Alone:
    """One process: nothing to share, nothing to agree on."""

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def share(self, batch: Tensor) -> Tensor:
        return batch

    def mean(self, values: Tensor) -> Tensor:
        return values


class _Together:
    """Processes started by torchrun, each with every size-th image of the global batch."""

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ModuleNotFoundError:
            raise InputError(
                "several processes were started, which needs accelerate; install it with "
                "`pip install accelerate`, or start one process without torchrun"
            ) from None
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())

    def wrap(self, network: nn.Module) -> nn.Module:
        if self.accelerator.device.type == "cuda":  # refuses tensors on the CPU
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
            network = convert(network)  # type: ignore[no-untyped-call]
        wrapped: nn.Module = self.accelerator.prepare_model(network)
        return wrapped

    def share(self, batch: Tensor) -> Tensor:
        return batch[self.accelerator.process_index :: self.accelerator.num_processes]

    def mean(self, values: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(values, reduction="mean")
        return reduced


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current_parallel(batch_size: int) -> Parallel:
    """How this process trains. Errors: InputError when the batch cannot be shared evenly."""
    size = world_size()
    if size == 1:
        return _Alone()
    if batch_size % size:
        raise InputError(
            f"batch_size = {batch_size} cannot be shared evenly by {size} processes; use a "
            f"multiple of {size} in the profile's recipes"
        )
    return _Together()


def local_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
