"""Networks, or parts of them, that can no longer learn, or no longer learn statistics."""

import types

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Frozen(nn.Module):
    """Runs a module without learning: no gradients, batch-norm statistics fixed.

    Frozen by class, not by convention: `train()` cannot switch it out of evaluation mode. The
    module's own parameters are shared, not copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The module's output as an ordinary tensor, which later layers may learn from."""
        with torch.inference_mode():
            out: Tensor = self.module(x)
        return out.clone()


def keep_statistics(module: nn.Module) -> None:
    """Let the module's batch norms keep their means and deviations, whatever mode they are put in.

    Their factors and offsets still learn.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.eval()
            norm.train = types.MethodType(_stay, norm)  # type: ignore[method-assign]


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm
