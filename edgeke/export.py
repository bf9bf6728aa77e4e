"""Stage `export`: trained networks become ONNX graphs that answer the same."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeke.data.augment import Normalise
from edgeke.files import write_bytes
from edgeke.graph.manifest import Manifest
from edgeke.graph.parity import check_close
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.graph.segments import export_segments, export_static
from edgeke.learning.checkpoints import Preprocessing
from edgeke.learning.images import predict
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.params import Export

__all__ = ["export"]


def export(
    network: BranchyNet,
    teacher: BranchyNet,
    preprocessing: Preprocessing,
    images: NDArray[np.uint8],
    settings: Export,
    models: Path,
) -> dict[str, float]:
    """Write `segments/` and `static/{teacher,main}.onnx` below `models`; returns the metrics.

    Every exit and both static networks are compared with PyTorch on `images`, uint8
    `[N, C, H, W]`. Errors: InputError, with nothing written, when one is off by more than the
    tolerance.
    """
    channels, _, size = preprocessing.image_shape
    normalisation = (preprocessing.mean, preprocessing.std, size)
    segments = [m.SerializeToString() for m in export_segments(network, *normalisation)]
    static = {
        "teacher": export_static(teacher, *normalisation).SerializeToString(),
        "main": export_static(network, *normalisation).SerializeToString(),
    }
    shown = images[: settings.parity_images]
    expected = _logits(network, preprocessing, shown)
    pairs = {
        f"exit_{e}": (found, expected[e])
        for e, found in enumerate(segment_logits(segments, channels_last(shown), threads=0))
    }
    for name, (model, reference) in {
        "teacher": (static["teacher"], _logits(teacher, preprocessing, shown)[-1]),
        "main": (static["main"], expected[-1]),
    }.items():
        pairs[name] = (segment_logits([model], channels_last(shown), threads=0)[0], reference)
    metrics: dict[str, float] = {}
    for name, (found, reference) in pairs.items():
        difference = check_close(
            f"{name} in ONNX", _softmax(found), _softmax(reference), settings.parity_tolerance
        )
        metrics[f"validation/{name}/parity_difference"] = difference

    costs, plain = exit_costs(network, size), exit_costs(network.branch(-1), size)[0]
    named = {f"exit_{e}": cost for e, cost in enumerate(costs)}
    named |= {"main": plain, "teacher": exit_costs(teacher, size)[0]}
    for name, cost in named.items():
        metrics |= {f"cost/{name}/{key}": value for key, value in asdict(cost).items()}
        metrics[f"cost/{name}/macs_share"] = cost.macs / plain.macs

    folder = models / "segments" / "fp32"
    names = tuple(f"{e}.onnx" for e in range(len(segments)))
    for name, model in zip(names, segments, strict=True):
        write_bytes(folder / name, model)
    for name, model in static.items():
        write_bytes(models / "static" / f"{name}.onnx", model)
    macs = tuple(cost.macs for cost in costs)
    manifest = Manifest(names, macs, plain.macs, preprocessing.classes, (size, size, channels))
    manifest.write(folder)
    return metrics


def _logits(
    network: BranchyNet, preprocessing: Preprocessing, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    normalise = Normalise(preprocessing.mean, preprocessing.std, torch.device("cpu"))
    logits: NDArray[np.float32] = predict(network, torch.from_numpy(images), normalise).numpy()
    return logits


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    probabilities: NDArray[np.float32] = torch.from_numpy(logits).softmax(-1).numpy()
    return probabilities
