"""Points for partitions: fitted and certified on what the last exit answers through a codec."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.device.codec import Codec
from edgeke.device.partitions import Partition, as_logits
from edgeke.device.policy import Policy
from edgeke.device.scores import calibrated_probabilities
from edgeke.params import Calibrate
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy
from edgeke.policy.samples import ExitLogits

Floats = NDArray[np.float32]


def certify_partition(
    after: int,
    codec: Codec,
    answers: Mapping[str, ExitLogits],
    remote: Mapping[str, Floats],
    policy: Policy,
    settings: Calibrate,
    classes: Sequence[str],
    sizes: tuple[float, float],
) -> Partition:
    """A partition with its points.

    `answers` of `validation` and `calibration` are the device's own, `remote` `[N, K]` the last
    exit's logits through the codec. A server that does not answer in time is replaced by the
    device's own last exit, so an image counts as answered badly where either of the two answers
    badly: promises then hold for any mixture. `sizes`: bytes without and with zlib.
    """
    temperature = policy.temperatures[-1:]

    def rows(name: str, last: Floats) -> ExitLogits:
        own = answers[name]
        said = as_logits(calibrated_probabilities(last[None], temperature))
        reference = own.correct_at(-1) if own.reference is None else own.reference
        return ExitLogits(np.concatenate([own.logits[: after + 1], said]), own.labels, reference)

    exits = after + 2
    fixed = dataclasses.replace(
        settings,
        proportions=settings.proportions if isinstance(settings.proportions, float) else 0.5,
        votes="fitted",
    )
    macs = (*policy.macs[: after + 1], policy.macs[-1])
    assert len(macs) == exits
    fitted, _ = fit_policy(
        rows("validation", remote["validation"]), macs, policy.main_macs, fixed, classes
    )
    through = rows("calibration", remote["calibration"])
    own = rows("calibration", answers["calibration"].logits[-1])
    return Partition(after, codec.name, *sizes, certify(fitted, through, fixed, own))


def partition_metrics(partition: Partition) -> dict[str, float]:
    """What the default point of a partition sends, and what calibration says of its answers."""
    point = partition.policy.point(partition.policy.default)
    sent = point.reached[-1] / point.samples
    return {
        f"calibration/partition/{partition.name}/{name}": value
        for name, value in {
            "bytes": partition.sent_bytes,
            "packed_bytes": partition.packed_bytes,
            "sent_share": sent,
            "bytes_per_image": sent * partition.sent_bytes,
            "accuracy": point.accuracy,
            "degradation": point.degradation,
        }.items()
    }
