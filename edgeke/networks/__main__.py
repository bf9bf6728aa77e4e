"""`python -m edgeke.networks NETWORK --image-size 224`: the cut points of a network.

Exits can be attached to them. Shapes and shares of operations are per image; bytes are those of
the feature map in fp32.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeke.errors import InputError
from edgeke.networks.architecture import Backbone

_CLASSES = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cut points, or save pretrained weights; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edgeke.networks", description=__doc__)
    parser.add_argument("network", help="such as resnet18, or timm/tf_efficientnet_lite0")
    parser.add_argument(
        "--image-size", type=int, nargs="+", default=[224], help="one side, or height and width"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--width", type=int, help="of our ResNets' first stage")
    parser.add_argument("--stem", choices=("standard", "small"), default="standard")
    parser.add_argument("--save", type=Path, help="save the pretrained weights to this file")
    options = parser.parse_args(arguments)
    if len(options.image_size) > 2:
        parser.error("--image-size takes one side, or height and width")
    try:
        backbone = Backbone(
            options.network,
            options.channels,
            _CLASSES,
            (options.image_size[0], options.image_size[-1]),
            options.width,
            options.stem,
        )
        if options.save:
            _save(backbone, options.save)
        else:
            _print_cuts(backbone)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_cuts(backbone: Backbone) -> None:
    from edgeke.networks.tracing import trace  # torch takes seconds: not for --help

    traced = trace(backbone)
    wide = max(len(cut.name) for cut in traced.cuts)
    print(f"{'cut point':{wide}}  {'C x H x W':>16} {'operations':>11} {'bytes':>10}")
    for cut in traced.cuts:
        shape = " x ".join(map(str, cut.shape))
        print(
            f"{cut.name:{wide}}  {shape:>16} {cut.macs / traced.macs:>11.1%} {4 * cut.values:>10,}"
        )
    print(f"{traced.macs / 1e6:,.1f} million multiply-accumulates in all")


def _save(backbone: Backbone, path: Path) -> None:
    from safetensors.torch import save_file

    from edgeke.networks.weights import pretrained_weights

    save_file(pretrained_weights(backbone), path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
