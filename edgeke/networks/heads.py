"""What turns features into logits."""

from torch import nn

__all__ = ["branch_head", "main_head"]


def main_head(channels: int, classes: int) -> nn.Sequential:
    """The backbone's classifier: `[N, channels, H, W]` to logits `[N, classes]`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes))


def branch_head(channels: int, classes: int) -> nn.Sequential:
    """The paper's early-exit head: pooling and two linear layers, no activation between."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(channels, channels),
        nn.Linear(channels, classes),
    )
