"""ResNets for small images as ordered blocks (He et al. 2016; 3x3 stem, stride 1, no pooling)."""

from torch import Tensor, nn

from edgeke.networks.architecture import Architecture, block_names

__all__ = ["BasicBlock", "block_channels", "make_block"]


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


def block_channels(architecture: Architecture, name: str) -> int:
    """Output channels of a block: the width in stage 1, doubled in each later stage."""
    stage = 1 if name == "stem" else int(name.removeprefix("layer").split(".")[0])
    return int(architecture.width * 2 ** (stage - 1))


def make_block(architecture: Architecture, name: str) -> nn.Module:
    """A freshly initialised block of the backbone."""
    names = block_names(architecture.backbone)
    outputs = block_channels(architecture, name)
    if name == "stem":
        return _initialise(
            nn.Sequential(
                nn.Conv2d(architecture.channels, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )
        )
    previous = names[names.index(name) - 1]
    first_of_stage = name.endswith(".0") and name != "layer1.0"
    inputs = block_channels(architecture, previous)
    return _initialise(BasicBlock(inputs, outputs, 2 if first_of_stage else 1))


def _initialise(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return block
