"""ResNets for small images (He et al. 2016; 3x3 stem, stride 1, no pooling)."""

from torch import Tensor, nn

from edgeke.errors import InputError
from edgeke.networks.architecture import Backbone


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the same function as torchvision's BasicBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: Tensor = self.relu(out + self.downsample(x))
        return activated


class Stem(nn.Module):
    """A 3x3 convolution that keeps the side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.relu(self.bn(self.conv(x)))
        return activated


class ResNet(nn.Module):
    """Stem, four stages of basic blocks (width doubled, side halved in each), mean, linear layer.

    `blocks`: residual blocks in each stage (He et al. 2016, table 1).
    """

    def __init__(self, backbone: Backbone, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        if backbone.width is None:
            raise InputError(
                f"{backbone.network} needs a width, the channels of its first stage; the paper's "
                "is 64"
            )
        width = backbone.width
        self.stem = Stem(backbone.channels, width)
        self.layer1 = _stage(width, width, blocks[0], 1)
        self.layer2 = _stage(width, 2 * width, blocks[1], 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], 2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(8 * width, backbone.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, K]` of images `[N, C, H, W]`."""
        features = self.layer2(self.layer1(self.stem(images)))
        features = self.layer4(self.layer3(features))
        logits: Tensor = self.fc(self.flatten(self.pool(features)))
        return logits


def resnet10(backbone: Backbone) -> ResNet:
    """One block in each stage."""
    return ResNet(backbone, (1, 1, 1, 1))


def resnet18(backbone: Backbone) -> ResNet:
    """Two blocks in each stage."""
    return ResNet(backbone, (2, 2, 2, 2))


def resnet34(backbone: Backbone) -> ResNet:
    """3, 4, 6 and 3 blocks."""
    return ResNet(backbone, (3, 4, 6, 3))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)
