"""Stage `export`: trained networks become ONNX graphs that answer the same."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgeke.data.augment import Normalise
from edgeke.data.dataset import Split, channels_last
from edgeke.device.manifest import MANIFEST, Manifest
from edgeke.errors import InputError
from edgeke.files import write_bytes, write_text
from edgeke.graph.parity import check_close
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.runner import segment_logits
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
    train: Split,
    settings: Export,
    models: Path,
) -> dict[str, float]:
    """Write `segments/{fp32,int8}/` and `static/{teacher,main}[.int8].onnx` below `models`.

    Every exit and both static networks are compared with PyTorch on training images; int8 by its
    accuracy, on images that it was not quantised on where there are enough, and two standard errors
    beyond the tolerance are put down to chance. Returns the metrics.
    Errors: InputError, with nothing written, when one is off by more than the tolerance.
    """
    channels, _, size = preprocessing.image_shape
    normalisation = (preprocessing.mean, preprocessing.std, size)
    segments = export_segments(network, *normalisation)
    static = {
        "teacher": export_static(teacher, *normalisation),
        "main": export_static(network, *normalisation),
    }
    samples, shown = _split(train, settings)
    metrics = _check_fp32(segments, static, network, teacher, preprocessing, shown, settings)
    images = channels_last(samples.images)
    quantised = quantise_segments(segments, images)
    static |= {f"{name}.int8": quantise(static[name], images) for name in ("teacher", "main")}
    metrics |= _check_int8(segments, quantised, static, shown, settings)

    costs, plain = exit_costs(network, size), exit_costs(network.branch(-1), size)[0]
    named = {f"exit_{e}": cost for e, cost in enumerate(costs)}
    named |= {"main": plain, "teacher": exit_costs(teacher, size)[0]}
    for name, cost in named.items():
        metrics |= {f"cost/{name}/{key}": value for key, value in asdict(cost).items()}
        metrics[f"cost/{name}/macs_share"] = cost.macs / plain.macs

    names = tuple(f"{e}.onnx" for e in range(len(segments)))
    macs = tuple(cost.macs for cost in costs)
    manifest = Manifest(names, macs, plain.macs, preprocessing.classes, (size, size, channels))
    for precision, graphs in (("fp32", segments), ("int8", quantised)):
        folder = models / "segments" / precision
        for file, graph in zip(names, graphs, strict=True):
            write_bytes(folder / file, graph.SerializeToString())
        write_text(folder / MANIFEST, manifest.to_json())
    for name, graph in static.items():
        write_bytes(models / "static" / f"{name}.onnx", graph.SerializeToString())
    return metrics


def _split(train: Split, settings: Export) -> tuple[Split, Split]:
    """Images that int8 is quantised on, and those that everything is compared on."""
    samples, count = settings.quantisation_images, len(train.labels)
    start = samples if count > samples else 0
    end = start + settings.parity_images
    return (
        Split(train.images[:samples], train.labels[:samples]),
        Split(train.images[start:end], train.labels[start:end]),
    )


def _check_fp32(
    segments: Sequence[onnx.ModelProto],
    static: Mapping[str, onnx.ModelProto],
    network: BranchyNet,
    teacher: BranchyNet,
    preprocessing: Preprocessing,
    shown: Split,
    settings: Export,
) -> dict[str, float]:
    expected = _logits(network, preprocessing, shown.images)
    references = {f"exit_{e}": at_exit for e, at_exit in enumerate(expected)}
    references |= {"teacher": _logits(teacher, preprocessing, shown.images)[-1]}
    references |= {"main": expected[-1]}
    metrics = {}
    for name, found in _run(segments, static, shown).items():
        difference = check_close(
            f"{name} in ONNX",
            _softmax(found),
            _softmax(references[name]),
            settings.parity_tolerance,
        )
        metrics[f"train/{name}/parity_difference"] = difference
    return metrics


def _check_int8(
    segments: Sequence[onnx.ModelProto],
    quantised: Sequence[onnx.ModelProto],
    static: Mapping[str, onnx.ModelProto],
    shown: Split,
    settings: Export,
) -> dict[str, float]:
    names = ("teacher", "main")
    exact = _run(segments, {name: static[name] for name in names}, shown)
    coarse = _run(quantised, {name: static[f"{name}.int8"] for name in names}, shown)
    metrics = {}
    for name in exact:
        was, is_now = (of[name].argmax(-1) == shown.labels for of in (exact, coarse))
        before, after = float(was.mean()), float(is_now.mean())
        metrics[f"train/{name}/int8_accuracy_lost"] = before - after
        # Of an undertrained network many answers change, both ways: that much is chance.
        chance = 2 * float((was != is_now).sum()) ** 0.5 / len(was)
        if before - after > settings.int8_tolerance + chance:
            raise InputError(
                f"{name} in int8 answers {100 * after:.1f} % of {len(shown.labels)} training "
                f"images right and {100 * before:.1f} % in fp32: more is lost than "
                f"export.int8_tolerance = {settings.int8_tolerance:g} allows. Quantise on more "
                "images (export.quantisation_images), train longer, or allow more"
            )
    return metrics


def _run(
    segments: Sequence[onnx.ModelProto], static: Mapping[str, onnx.ModelProto], shown: Split
) -> dict[str, NDArray[np.float32]]:
    """Logits `[N, K]` by name: every exit, then the static networks."""
    images = channels_last(shown.images)
    exits = segment_logits([m.SerializeToString() for m in segments], images, threads=0)
    found = {f"exit_{e}": at_exit for e, at_exit in enumerate(exits)}
    for name, model in static.items():
        found[name] = segment_logits([model.SerializeToString()], images, threads=0)[0]
    return found


def _logits(
    network: BranchyNet, preprocessing: Preprocessing, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    normalise = Normalise(preprocessing.mean, preprocessing.std, torch.device("cpu"))
    logits: NDArray[np.float32] = predict(network, torch.from_numpy(images), normalise).numpy()
    return logits


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    probabilities: NDArray[np.float32] = torch.from_numpy(logits).softmax(-1).numpy()
    return probabilities
