"""A codec in the training loop: features as a server will get them (docs/partition.md)."""

import torch
from torch import Tensor, nn

from edgeke.device.codec import Codec, channel_group


class Coding(nn.Module):
    """In training half of the images `[N, C, H, W]` as a codec lets them through, drawn anew.

    The others stay as they are, since a device may finish them itself. Where the codec keeps a
    share of the positions, an image keeps that share or more, also drawn.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features
        dice = torch.rand(2, len(features), device=features.device)
        shares = 1 - dice[0] * (1 - self.codec.share)
        coded = dice[1] < 0.5
        return torch.where(
            coded[:, None, None, None], pass_through(features, self.codec.bits, shares), features
        )


def pass_through(features: Tensor, bits: int, shares: Tensor) -> Tensor:
    """What `decode` makes of `encode`d features `[N, C, H, W]`, at each image's share of positions.

    Rounding counts as the identity for gradients; a dropped position has its share in the mean.
    """
    values = features.flatten(2).float()
    count, channels, positions = values.shape
    kept = (shares * positions).round().clamp(1, positions)[:, None]
    energy = values.detach().square().sum(1)
    rank = energy.argsort(1, descending=True).argsort(1)
    keeps = (rank < kept)[:, None]
    dropped = (positions - kept).clamp(min=1)[..., None]
    rest = (values * ~keeps).sum(2, keepdim=True) / dropped
    values = torch.where(keeps, values, rest)
    plain = values.detach()
    if bits > 8:
        coded = plain.half().float() if bits == 16 else plain
    else:
        rows = plain.reshape(count, channels // channel_group(channels), -1)
        low, high = rows.aminmax(dim=2, keepdim=True)
        step = (high - low) / (2**bits - 1)
        levels = ((rows - low) / step.clamp(min=1e-38) + 0.5).floor().clamp(max=2**bits - 1)
        coded = (levels * step + low).view_as(plain)
    return (values + (coded - plain)).view_as(features).to(features.dtype)
