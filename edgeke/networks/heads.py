"""What an exit puts between features and logits: bodies and heads."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "attention_body", "branch_head", "main_head", "separable_body"]


class Attention(nn.Module):
    """Spatial attention: features times a sigmoid mask computed at half resolution.

    As in self-distillation's heads (Zhang et al. 2021).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = _separable(channels, channels, 2)

    def forward(self, features: Tensor) -> Tensor:
        small, size = self.mask(features), features.shape[-2:]
        mask = F.interpolate(small, size=size, mode="bilinear", align_corners=False)
        return features * mask.sigmoid()


def attention_body(channels: int, outputs: int) -> nn.Sequential:
    """Attention, then separable convolutions that halve the side and double the channels.

    Until `outputs` channels are reached: `[N, channels, H, W]` to `[N, outputs, H / 2^k, W / 2^k]`.
    """
    layers: list[nn.Module] = [Attention(channels)]
    while channels < outputs:
        layers.append(_separable(channels, 2 * channels, 2))
        channels *= 2
    return nn.Sequential(*layers)


def separable_body(channels: int, outputs: int) -> nn.Sequential:
    """Per halving one depthwise 3x3 and one pointwise convolution, and no attention.

    Shapes as `attention_body`; cheaper (docs/results.md).
    """
    layers: list[nn.Module] = []
    while channels < outputs:
        layers += [
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False),
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
        ]
        channels *= 2
    return nn.Sequential(*layers)


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


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Twice a depthwise 3x3 and a pointwise convolution; the first halves the side."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, inputs, 1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, inputs, 3, 1, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
