"""Stage `export`: trained networks become ONNX graphs that answer the same."""

import re
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
from edgeke.graph.quantise import has_depthwise, quantise_segments
from edgeke.graph.refit import refit_heads
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static, list_blocks
from edgeke.learning.checkpoints import Preprocessing
from edgeke.learning.predict import predict
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.params import Export
from edgeke.policy.exits import best_exit, last_useful, losses

Graphs = Sequence[onnx.ModelProto]
_Losses = list[tuple[float, float]]  # per exit: accuracy lost, and two standard errors of it
_Attempt = tuple[list[onnx.ModelProto], _Losses, _Losses]
_NOWHERE = 1_000_000  # beyond the last exit: no depthwise convolution in single precision
_REFIT_IMAGES = 5000


def export(
    network: BranchyNet,
    static: Mapping[str, tuple[BranchyNet, Preprocessing]],
    preprocessing: Preprocessing,
    train: Split,
    validation: Split,
    settings: Export,
    models: Path,
) -> dict[str, float]:
    """Write `segments/{fp32,int8}/` and `static/<name>[.int8].onnx` below `models`.

    `static` holds single-exit networks by name, each with its own normalisation, `main` (the main
    exit alone) among them; costs are shares of its. The last exits are left out, in both
    precisions, where on validation they are worse than an earlier one (`settings.exits`). Every
    exit and static network is compared with PyTorch on training images. In int8 the last linear
    layer of every exit is fitted again on training images. Where one loses more on validation than
    is tolerated, depthwise convolutions stay in single precision from there on, or everywhere, if
    that loses less; two standard errors beyond the tolerance are taken for chance. Returns the
    metrics. Errors: InputError, with nothing written, when anything is off by more than its
    tolerance.
    """
    channels, height, width = preprocessing.image_shape
    size = (height, width)
    metrics: dict[str, float] = {}
    if settings.exits == "useful":
        network, metrics = _useful(network, preprocessing, validation)
    segments = export_segments(network, preprocessing.mean, preprocessing.std, size)
    graphs = {
        name: export_static(alone, own.mean, own.std, size) for name, (alone, own) in static.items()
    }
    metrics |= _check_parity(segments, graphs, network, static, preprocessing, train, settings)
    segments_int8, changes = _to_int8("exit_", segments, train, validation, settings)
    metrics |= changes
    graphs_int8: dict[str, onnx.ModelProto] = {}
    same: dict[bytes, str] = {}  # some orders leave a branch, the main exit and `plain` equal
    for name, graph in graphs.items():
        first = same.setdefault(graph.SerializeToString(), name)
        if first in graphs_int8:
            graphs_int8[name] = graphs_int8[first]
            prefix = f"validation/{first}/"
            copied = {key: value for key, value in metrics.items() if key.startswith(prefix)}
            metrics |= {key.replace(first, name, 1): value for key, value in copied.items()}
            continue
        (graphs_int8[name],), changes = _to_int8(name, [graph], train, validation, settings)
        metrics |= changes

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
        (height, width, channels),
        preprocessing.bits,
        list_blocks(network, size),
        preprocessing.fit,
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


def _useful(
    network: BranchyNet, preprocessing: Preprocessing, validation: Split
) -> tuple[BranchyNet, dict[str, float]]:
    """The network without exits that cost more and know less than an earlier one on validation.

    Also returns how many are left out, and accuracy and loss of the best exit and of those.
    """
    logits, labels = _answers(network, preprocessing, validation.images), validation.labels
    last = last_useful(logits, labels)
    metrics = {"validation/exits_left_out": float(len(logits) - 1 - last)}
    if last == len(logits) - 1:
        return network, metrics
    loss = losses(logits, labels).mean(-1)
    for exit in (best_exit(logits, labels), *range(last + 1, len(logits))):
        right = logits[exit].argmax(-1) == labels
        metrics[f"validation/exit_{exit}/accuracy"] = float(right.mean())
        metrics[f"validation/exit_{exit}/loss"] = float(loss[exit])
    return network.until(last), metrics


def left_out(metrics: Mapping[str, float]) -> str | None:
    """A line that says which exits are not shipped and why; None where all are."""
    found = [re.fullmatch(r"validation/exit_(\d+)/loss", name) for name in metrics]
    words = [
        f"exit {exit} has {100 * metrics[f'validation/exit_{exit}/accuracy']:.1f} % right and a "
        f"loss of {metrics[f'validation/exit_{exit}/loss']:.3g}"
        for exit in (match[1] for match in found if match)
    ]
    if not words:
        return None
    return (
        f"note: not all exits are shipped, since some cost more and know less: on validation "
        f"{words[0]}; but {', '.join(words[1:])}. To ship them all: export.exits=all"
    )


def _answers(
    network: BranchyNet, own: Preprocessing, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """What PyTorch answers at every exit, `[E, N, K]`."""
    normalise = Normalise(own.mean, own.std, torch.device("cpu"))
    answers: NDArray[np.float32] = predict(network, torch.tensor(images), normalise).numpy()
    return answers


def _check_parity(
    segments: Graphs,
    graphs: Mapping[str, onnx.ModelProto],
    network: BranchyNet,
    static: Mapping[str, tuple[BranchyNet, Preprocessing]],
    preprocessing: Preprocessing,
    train: Split,
    settings: Export,
) -> dict[str, float]:
    """Compare probabilities with PyTorch's."""
    images = train.images[: settings.parity_images]
    for_onnx = channels_last(images)
    pairs = {
        f"exit_{exit}": pair
        for exit, pair in enumerate(
            zip(_answers(network, preprocessing, images), _logits(segments, for_onnx), strict=True)
        )
    }
    for name, graph in graphs.items():
        pairs[name] = (_answers(*static[name], images)[0], _logits([graph], for_onnx)[0])
    return {
        f"train/{name}/parity_difference": check_close(
            f"{name} in ONNX",
            calibrated_probabilities(answers[None], [1.0]),
            calibrated_probabilities(reference[None], [1.0]),
            settings.parity_tolerance,
        )
        for name, (reference, answers) in pairs.items()
    }


def _to_int8(
    name: str, exact: Graphs, train: Split, validation: Split, settings: Export
) -> tuple[list[onnx.ModelProto], dict[str, float]]:
    """Quantise the segments of one network; `name` is its own, or begins that of its exits.

    Returns them, and each exit's accuracy on validation that int8 lost before and after its last
    layer was fitted again.
    """
    samples = channels_last(train.images[: settings.quantisation_images])
    to_fit, to_compare = train.images[:_REFIT_IMAGES], channels_last(validation.images)
    labels, reference = validation.labels, _logits(exact, to_compare)
    labels_of = [name if len(exact) == 1 else f"{name}{exit}" for exit in range(len(exact))]

    def attempt(exact_from: int) -> _Attempt:
        bits = settings.weight_bits
        coarse = quantise_segments(exact, samples, exact_from=exact_from, weight_bits=bits)
        refitted = refit_heads(coarse, exact, channels_last(to_fit))
        before, after = (
            [
                _lost(a, b, labels)
                for a, b in zip(reference, _logits(graphs, to_compare), strict=True)
            ]
            for graphs in (coarse, refitted)
        )
        return refitted, before, after

    def beyond(losses: _Losses) -> list[int]:
        return [exit for exit, (lost, _) in enumerate(losses) if lost > settings.int8_tolerance]

    tried = {_NOWHERE: attempt(_NOWHERE)}
    if has_depthwise(exact):
        for exact_from in sorted({*beyond(tried[_NOWHERE][2])[:1], 0}, reverse=True):
            if not any(not beyond(after) for _, _, after in tried.values()):
                tried[exact_from] = attempt(exact_from)
    # The least beyond the tolerance at any exit; of equal ones the fastest, which was tried first.
    chosen = min(tried, key=lambda each: max(settings.int8_tolerance, max(tried[each][2])[0]))
    refitted, before, after = tried[chosen]
    metrics: dict[str, float] = {}
    for exit, label in enumerate(labels_of):
        metrics[f"validation/{label}/int8_accuracy_lost"] = after[exit][0]
        metrics[f"validation/{label}/int8_accuracy_lost_before_refit"] = before[exit][0]
        metrics[f"validation/{label}/int8_depthwise"] = float(exit < chosen)
    for label, (lost, chance) in zip(labels_of, after, strict=True):
        if lost > settings.int8_tolerance + chance:
            raise InputError(
                f"{label} answers {100 * lost:.1f} % fewer of {len(labels)} validation "
                "images right in int8 than in fp32: more than export.int8_tolerance = "
                f"{settings.int8_tolerance:g} allows. Quantise on more images "
                "(export.quantisation_images), train longer, or allow more"
            )
    return refitted, metrics


def _lost(
    exact: NDArray[np.float32], coarse: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[float, float]:
    """The accuracy lost, and two standard errors: many answers change both ways, by chance."""
    before, after = exact.argmax(-1) == labels, coarse.argmax(-1) == labels
    chance = 2 * float((before != after).sum()) ** 0.5 / len(labels)
    return float(before.mean() - after.mean()), chance


def _logits(segments: Graphs, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What ONNX Runtime answers at every exit, `[E, N, K]`, for images `[N, H, W, C]`."""
    return segment_logits([graph.SerializeToString() for graph in segments], images, threads=0)
