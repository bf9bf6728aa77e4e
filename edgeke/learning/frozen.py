"""A network, or a part of one, that can no longer learn."""

import torch
from torch import Tensor, nn

__all__ = ["Frozen"]


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
