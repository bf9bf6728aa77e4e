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
from edgeke.device.scores import calibrated_probabilities
from edgeke.errors import InputError
from edgeke.files import write_files
from edgeke.graph.parity import check_close
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static, list_blocks
from edgeke.learning.checkpoints import Preprocessing
from edgeke.learning.predict import predict
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.params import Export

Graphs = Sequence[onnx.ModelProto]
Logits = dict[str, NDArray[np.float32]]  # [N, K] by exit or static network


def export(
    network: BranchyNet,
    static: Mapping[str, tuple[BranchyNet, Preprocessing]],
    preprocessing: Preprocessing,
    train: Split,
    settings: Export,
    models: Path,
) -> dict[str, float]:
    """Write `segments/{fp32,int8}/` and `static/<name>[.int8].onnx` below `models`.

    `static` holds single-exit networks by name, each with its own normalisation, `main` (the main
    exit alone) among them; costs are shares of its. Every exit and static network is compared with
    PyTorch on training images, and int8 by its accuracy, where possible on other images than it
    was quantised on; two standard errors beyond the tolerance are taken for chance. Returns the
    metrics. Errors: InputError, with nothing written, when one is off by more than the tolerance.
    """
    channels, _, size = preprocessing.image_shape
    samples, compared = _split(train, settings)
    segments = export_segments(network, preprocessing.mean, preprocessing.std, size)
    graphs = {
        name: export_static(alone, own.mean, own.std, size) for name, (alone, own) in static.items()
    }
    fp32 = _run(segments, graphs, compared)
    metrics = _check_fp32(fp32, network, static, preprocessing, compared, settings)
    images = channels_last(samples.images)
    segments_int8 = quantise_segments(segments, images)
    graphs_int8 = {name: quantise(graph, images) for name, graph in graphs.items()}
    int8 = _run(segments_int8, graphs_int8, compared)
    metrics |= _check_int8(fp32, int8, compared, settings)

    exits = exit_costs(network, size)
    costs = {f"exit_{exit}": cost for exit, cost in enumerate(exits)}
    costs |= {name: exit_costs(alone, size)[0] for name, (alone, _) in static.items()}
    main_macs = costs["main"].macs
    for name, cost in costs.items():
        metrics |= {f"cost/{name}/{key}": value for key, value in asdict(cost).items()}
        metrics[f"cost/{name}/macs_share"] = cost.macs / main_macs

    names = tuple(f"{exit}.onnx" for exit in range(len(exits)))
    macs = tuple(cost.macs for cost in exits)
    manifest = Manifest(
        names,
        macs,
        main_macs,
        preprocessing.classes,
        (size, size, channels),
        preprocessing.bits,
        list_blocks(network, size),
    )
    files = {}
    for precision, parts in (("fp32", segments), ("int8", segments_int8)):
        folder = models / "segments" / precision
        for name, graph in zip(names, parts, strict=True):
            files[folder / name] = graph.SerializeToString()
        files[folder / MANIFEST] = manifest.to_json().encode()
    for suffix, networks in (("", graphs), (".int8", graphs_int8)):
        for name, graph in networks.items():
            files[models / "static" / f"{name}{suffix}.onnx"] = graph.SerializeToString()
    write_files(files)
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
    logits: Logits,
    network: BranchyNet,
    static: Mapping[str, tuple[BranchyNet, Preprocessing]],
    preprocessing: Preprocessing,
    compared: Split,
    settings: Export,
) -> dict[str, float]:
    """Compare probabilities with PyTorch's."""
    images = torch.from_numpy(compared.images)

    def logits_of(alone: BranchyNet, own: Preprocessing) -> NDArray[np.float32]:
        normalise = Normalise(own.mean, own.std, torch.device("cpu"))
        answers: NDArray[np.float32] = predict(alone, images, normalise).numpy()
        return answers

    exits = enumerate(logits_of(network, preprocessing))
    references = {f"exit_{exit}": at_exit for exit, at_exit in exits}
    references |= {name: logits_of(*own)[0] for name, own in static.items()}
    metrics = {}
    for name, reference in references.items():
        difference = check_close(
            f"{name} in ONNX",
            calibrated_probabilities(logits[name][None], [1.0]),
            calibrated_probabilities(reference[None], [1.0]),
            settings.parity_tolerance,
        )
        metrics[f"train/{name}/parity_difference"] = difference
    return metrics


def _check_int8(fp32: Logits, int8: Logits, compared: Split, settings: Export) -> dict[str, float]:
    """Compare accuracies."""
    metrics = {}
    for name in fp32:
        fp32_correct = fp32[name].argmax(-1) == compared.labels
        int8_correct = int8[name].argmax(-1) == compared.labels
        before, after = float(fp32_correct.mean()), float(int8_correct.mean())
        metrics[f"train/{name}/int8_accuracy_lost"] = before - after
        # Many answers of an undertrained network change, both ways: that much is chance.
        chance = 2 * float((fp32_correct != int8_correct).sum()) ** 0.5 / len(compared.labels)
        if before - after > settings.int8_tolerance + chance:
            raise InputError(
                f"{name} answers {100 * after:.1f} % of {len(compared.labels)} training images "
                f"right in int8 and {100 * before:.1f} % in fp32: it loses more than "
                f"export.int8_tolerance = {settings.int8_tolerance:g} allows. Quantise on more "
                "images (export.quantisation_images), train longer, or allow more"
            )
    return metrics


def _run(segments: Graphs, static: Mapping[str, onnx.ModelProto], compared: Split) -> Logits:
    """What ONNX Runtime answers at every exit and with every static network."""
    images = channels_last(compared.images)
    exits = segment_logits([graph.SerializeToString() for graph in segments], images, threads=0)
    logits = {f"exit_{exit}": at_exit for exit, at_exit in enumerate(exits)}
    for name, graph in static.items():
        logits[name] = segment_logits([graph.SerializeToString()], images, threads=0)[0]
    return logits
