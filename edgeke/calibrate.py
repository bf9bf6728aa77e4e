"""Stage `calibrate`: from segments to operating points, and the one file that computes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeke.data.dataset import Split, channels_last
from edgeke.device.bundle import describe_pixels, segments_hash
from edgeke.device.codec import Codec, decode, encode, encode_picture, parse_codec
from edgeke.device.manifest import Manifest
from edgeke.device.partitions import Partition, parse_partitions, partitions_json, raw_partition
from edgeke.device.policy import Policy, force_exit, parse_policy
from edgeke.device.scores import Score, biased, calibrated_probabilities
from edgeke.device.session import open_session
from edgeke.device.shift import histogram
from edgeke.graph.compose import compose_cascade
from edgeke.graph.parity import check_close, check_exits
from edgeke.graph.runner import Floats, logits_through, segment_logits
from edgeke.params import Calibrate
from edgeke.policy.cascade import run_cascade
from edgeke.policy.certify import certify
from edgeke.policy.exits import best_exit
from edgeke.policy.fit import fit_policy
from edgeke.policy.partitions import certify_partition, partition_metrics
from edgeke.policy.report import exit_metrics, point_metrics, reliability_rows
from edgeke.policy.samples import ExitLogits, one_of_each

# Probabilities of the composed file and of NumPy differ by rounding alone.
_TOLERANCE = 1e-5
_IMAGES = 500
_OTHERS = 8


@dataclass(frozen=True)
class Calibrated:
    """A policy, the one file that carries it, and what was measured on the way.

    `reference` `[N]` by split: where the network is right that degradation is measured against.
    `reliability` has the rows of the diagram.
    """

    policy: Policy
    model: bytes
    metrics: dict[str, float]
    reference: Mapping[str, NDArray[np.bool_]]
    reliability: list[dict[str, object]]


def calibrate(
    segments: Sequence[Path],
    manifest: Manifest,
    splits: Mapping[str, Split],
    settings: Calibrate,
    fp32: Calibrated | None = None,
) -> Calibrated:
    """Fit a policy to what the segments answer, certify it, and compose the one file.

    `splits` are `validation` and `calibration`; of the latter's groups one image each is used
    (docs/promises.md). Degradation is measured against the exit that is best on validation, in
    other precisions against that of `fp32`, the same network's.
    Errors: InputError when the file does not compute its policy.
    """
    answers = {
        name: ExitLogits(segment_logits(segments, channels_last(split.images), 0), split.labels)
        for name, split in splits.items()
        if name in ("validation", "calibration")
    }
    if fp32 is None:
        on_validation = answers["validation"]
        exit = best_exit(on_validation.logits, on_validation.labels)
        reference = {name: split.correct_at(exit) for name, split in answers.items()}
    else:
        exit, reference = fp32.policy.reference_exit, dict(fp32.reference)
    answers = {name: replace(split, reference=reference[name]) for name, split in answers.items()}
    validation = answers["validation"]
    fitted, metrics = fit_policy(
        validation, manifest.macs, manifest.main_macs, settings, manifest.classes
    )
    groups = splits["calibration"].groups
    drawn = np.arange(len(splits["calibration"].labels)) if groups is None else one_of_each(groups)
    answers["calibration"] = answers["calibration"].at(drawn)
    policy = certify(fitted, answers["calibration"], settings)
    policy = with_histogram(replace(policy, reference_exit=exit), answers["calibration"])
    images = {name: channels_last(splits[name].images) for name in answers}
    images["calibration"] = images["calibration"][drawn]
    partitions = certify_partitions(segments, images, answers, policy, settings, manifest)
    metrics |= point_metrics(policy, validation)
    for name, split in answers.items():
        metrics |= exit_metrics(split, policy.temperatures, name)
    for partition in partitions:
        metrics |= partition_metrics(partition)
    model = compose(segments, policy, manifest, partitions)
    metrics |= check_composed(model, policy, validation, splits["validation"])
    rows = reliability_rows(answers["calibration"], policy.temperatures)
    return Calibrated(policy, model, metrics, reference, rows)


def with_histogram(policy: Policy, calibration: ExitLogits) -> Policy:
    """The policy with exit 0's scores of the calibration images, by which devices notice shift."""
    first = calibrated_probabilities(calibration.logits[:1], policy.temperatures[:1])
    score = Score(policy.score, policy.score_weights)
    return replace(policy, histogram=histogram(score.at(first, 0)))


def certify_partitions(
    segments: Sequence[Path],
    images: Mapping[str, NDArray[np.uint8]],
    answers: Mapping[str, ExitLogits],
    policy: Policy,
    settings: Calibrate,
    manifest: Manifest,
) -> tuple[Partition, ...]:
    """The partitions of the settings, and `raw` beside them; `images` by split, as `answers`.

    One after the last exit, or one that is left out of the model, would leave nothing to a server
    and is skipped.
    """
    partitions = []
    for wanted in settings.partitions:
        after = wanted.after
        if after > len(policy.macs) - 2:
            continue
        sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in wanted.codecs}
        codecs = {name: parse_codec(name) for name in wanted.codecs}
        changes = {name: partial(_through, codec, sizes[name]) for name, codec in codecs.items()}
        remote = {
            split: logits_through(segments, images[split], after, changes, 0) for split in images
        }
        for name, codec in codecs.items():
            plain, packed = np.mean(sizes[name], axis=0).tolist()
            last = {split: logits[name] for split, logits in remote.items()}
            partitions.append(
                certify_partition(
                    after, codec, answers, last, policy, settings, manifest.classes, (plain, packed)
                )
            )
    if partitions:
        pictures = [len(encode_picture(image)) for image in images["validation"]]
        partitions.append(raw_partition(policy, float(np.mean(pictures))))
    return tuple(partitions)


def _through(codec: Codec, sizes: list[tuple[int, int]], features: Floats) -> Floats:
    """The features as they arrive; `sizes` grows by each image's bytes, without and with zlib."""
    for each in features:
        sizes.append((len(encode(each[None], codec)), len(encode(each[None], codec, True))))
    return decode(encode(features, codec), features.shape[1:], len(features))


def compose(
    segments: Sequence[Path],
    policy: Policy,
    manifest: Manifest,
    partitions: Sequence[Partition] = (),
) -> bytes:
    """The one file: the segments in one model, with what a device must know in its metadata.

    That is the policy, the partitions, class names, input shape `[H, W, C]`, what its pixels are,
    significant bits of 16-bit pictures, how pictures are fitted to the shape, the blocks, and the
    segments' hash, by which a device tells whether the segments beside the file are its. Errors:
    InputError for a policy that a device would refuse.
    """
    text = json.dumps(policy.to_json())
    parse_policy(text)
    other = partitions_json(partitions)
    parse_partitions(other, policy)
    metadata = {
        "policy": text,
        "partitions": other,
        "classes": json.dumps(list(manifest.classes)),
        "image_shape": json.dumps(list(manifest.image_shape)),
        "pixels": json.dumps(describe_pixels(manifest.image_shape, manifest.fit)),
        "bits": json.dumps(manifest.bits),
        "fit": json.dumps(manifest.fit),
        "segments_sha256": segments_hash(segments),
        "blocks": json.dumps([asdict(block) for block in manifest.blocks]),
    }
    model = compose_cascade(
        [onnx.load(segment) for segment in segments],
        score=Score(policy.score, policy.score_weights),
        temperatures=policy.temperatures,
        image_shape=manifest.image_shape,
        classes=len(manifest.classes),
        metadata=metadata,
        watched=bool(policy.histogram),
    )
    return bytes(model.SerializeToString())


def check_composed(
    model: bytes, policy: Policy, answers: ExitLogits, split: Split
) -> dict[str, float]:
    """Compare the file with the vectorised cascade: named points, forced exits, the vote and more.

    Of the other points eight are taken, spread from conservative to aggressive. Runs up to 500
    images of the split that `answers` belong to. Errors: InputError when exits differ away from
    ties or probabilities differ at all.
    """
    session = open_session(model)
    pixels = channels_last(split.images[:_IMAGES])
    probabilities = calibrated_probabilities(answers.logits, policy.temperatures)[:, :_IMAGES]
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    exits, votes = len(probabilities), policy.points[0].votes
    spread = np.linspace(0, len(policy.points) - 1, _OTHERS).astype(int)
    points = [*policy.named.values(), *(policy.points[i] for i in spread)]
    settings = {point.name: (point.thresholds, point.bias) for point in points}
    settings |= {f"exit {exit}": (force_exit(exit, exits), ()) for exit in range(exits)}
    settings["vote"] = (force_exit(exits, exits), ())
    ties, difference = 0, 0.0
    for name, (thresholds, bias) in settings.items():
        limits = np.asarray(thresholds, np.float32)
        feeds = {"thresholds": limits, "votes": np.asarray(votes, np.float32)}
        feeds["bias"] = np.asarray(bias or [0.0] * probabilities.shape[-1], np.float32)
        outputs = [session.run(None, {"image": image[None], **feeds}) for image in pixels]
        composed = np.concatenate([each[0] for each in outputs])
        exit = np.concatenate([each[1] for each in outputs])
        expected = run_cascade(probabilities, scores, thresholds, votes)
        ties += check_exits(exit, expected.exit, scores, limits, _TOLERANCE)
        same = exit == expected.exit
        answers_there = expected.probabilities[same]
        what, close = f"the composed file at {name}", biased(answers_there, feeds["bias"].tolist())
        difference = max(difference, check_close(what, composed[same], close, _TOLERANCE))
    return {
        "validation/composed/parity_difference": difference,
        "validation/composed/ties": ties,
    }
