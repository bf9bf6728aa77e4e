"""One process, or several under torchrun: which images each takes, and how they agree.

With several processes the backend is torch.distributed: NCCL on GPUs, Gloo on CPUs.
"""

import atexit
import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from edgeke.errors import InputError
from edgeke.files import process_number

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def first_process() -> bool:
    """Whether this process alone writes files, logs and prints."""
    return process_number() == 0


def local_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0)
    return torch.device("cpu")


def start(batch_size: int) -> None:
    """Connect the processes, once. Errors: InputError when they cannot share a batch evenly."""
    size = world_size()
    if batch_size % size:
        raise InputError(
            f"batch_size = {batch_size} cannot be shared evenly by {size} processes; use a "
            f"multiple of {size} in the profile's recipes"
        )
    if size > 1 and not distributed.is_initialized():
        device = local_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)


def wrap(network: nn.Module) -> nn.Module:
    """The network whose gradients are averaged over the processes."""
    if world_size() == 1:
        return network
    if local_device().type != "cuda":  # SyncBatchNorm refuses tensors on the CPU
        return DistributedDataParallel(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(type(m) not in _PLAIN_NORMS or "train" in vars(m) for m in norms):
        # The conversion would lose what they do beyond normalising (timm's activate, too), or
        # that they keep their statistics.
        return DistributedDataParallel(network, device_ids=[local_device()])
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(synchronised, device_ids=[local_device()])


def share(batch: Tensor) -> Tensor:
    """This process's part of a global batch: every size-th image."""
    return batch[process_number() :: world_size()]


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, on each of them."""
    if world_size() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / world_size()


def from_first(content: bytes) -> bytes:
    """What the first process passes, on each of them."""
    if world_size() == 1:
        return content
    device = local_device()
    length = torch.tensor([len(content)], device=device)
    distributed.broadcast(length, 0)
    if not length:
        return b""
    if not first_process():
        content = bytes(int(length))
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    distributed.broadcast(buffer, 0)
    return buffer.cpu().numpy().tobytes()
