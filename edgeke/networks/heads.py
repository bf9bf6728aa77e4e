"""What an exit puts between a feature map and logits: bodies and heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_Shape = tuple[int, int, int]


class Attention(nn.Module):
    """Spatial attention: features times a sigmoid mask computed at half resolution.

    As in self-distillation's heads (Zhang et al. 2021).
    """

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        channels, height, width = shape
        self.mask = nn.Sequential(
            _separable(channels, channels, 2),
            nn.Upsample(size=(height, width), mode="bilinear", align_corners=False),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        weighted: Tensor = features * self.mask(features)
        return weighted


class Statistics(nn.Module):
    """Mean, maximum and standard deviation over positions: `[N, C, H, W]` to `[N, 3 C]`.

    Mean and deviation are those of a map that is averaged down to fewer than 32 positions a side:
    as good (docs/results.md), and on a map of 64x64 four times faster.
    """

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self.step = max(1, min(shape[1:]) // 16)

    def forward(self, features: Tensor) -> Tensor:
        features = features.float()  # in half precision a variance is noise
        maxima = F.adaptive_max_pool2d(features, 1).flatten(1)
        if self.step > 1:
            features = F.avg_pool2d(features, self.step)
        mean = features.mean((2, 3), keepdim=True)
        # Not the mean of squares less the squared mean: in a channel that is nearly constant
        # rounding alone would decide, and the norm after it would magnify that.
        variance = (features - mean).square().mean((2, 3))
        # The root has no slope at 0 (a 1x1 map).
        deviation = torch.sqrt(variance + 1e-5)
        return torch.cat([mean.flatten(1), maxima, deviation], dim=1)


def attention_body(shape: _Shape, outputs: int) -> nn.Sequential:
    """Attention, then separable convolutions that halve the side and double the channels.

    Until `outputs` channels are reached: `[N, C, H, W]` to `[N, outputs, H / 2^k, W / 2^k]`,
    rounded up. A map that has `outputs` channels or more keeps its shape.
    """
    layers: list[nn.Module] = [Attention(shape)]
    for channels, wider in _doublings(shape[0], outputs):
        layers.append(_separable(channels, wider, 2))
    return nn.Sequential(*layers)


def separable_body(shape: _Shape, outputs: int) -> nn.Sequential:
    """Per halving one depthwise 3x3 and one pointwise convolution, and no attention.

    Shapes as `attention_body`; cheaper (docs/results.md).
    """
    layers: list[nn.Module] = []
    for channels, wider in _doublings(shape[0], outputs):
        layers += [
            nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False),
            nn.Conv2d(channels, wider, 1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def pooled_head(shape: _Shape, classes: int) -> nn.Sequential:
    """Statistics over positions, normalised, and a linear layer; no body before it.

    What a fixed trunk knows at an early cut point is in the maximum and the deviation as much as
    in the mean. All of it costs microseconds.
    """
    width = 3 * shape[0]
    return nn.Sequential(
        Statistics(shape), nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)
    )


def linear_head(channels: int, classes: int) -> nn.Sequential:
    """The mean over positions and a linear layer: `[N, C, H, W]` to logits `[N, K]`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes))


def branch_head(channels: int, classes: int) -> nn.Sequential:
    """The paper's early-exit head: pooling and two linear layers, no activation between."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(channels, channels),
        nn.Linear(channels, classes),
    )


def _doublings(channels: int, outputs: int) -> list[tuple[int, int]]:
    steps = []
    while channels < outputs:
        wider = min(2 * channels, outputs)
        steps.append((channels, wider))
        channels = wider
    return steps


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
