"""Partitions: after which exit an image leaves the device, through which codec, at which points.

They are in the one file's metadata, beside the policy, each with a policy of its own. Its exits are
those of the device, 0 to `after`, and one more: the server's answer, which is that of the last
exit. `raw` sends the picture: after -1, and the server's answer is the only exit.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.codec import RAW, parse_codec
from edgeke.device.policy import ALWAYS, Policy, parse_policy
from edgeke.errors import InputError

_SMALLEST = np.float32(1e-30)


@dataclass(frozen=True)
class Partition:
    """`after` an exit the features travel as `codec`; `policy` was fitted and certified for that.

    `sent_bytes` and `packed_bytes` are those of a mean image on validation, without and with zlib;
    for `raw` both are the PNG's.
    """

    after: int
    codec: str
    sent_bytes: float
    packed_bytes: float
    policy: Policy

    @property
    def name(self) -> str:
        """Such as `after_0_q4`, or `raw`."""
        return RAW if self.codec == RAW else f"after_{self.after}_{self.codec}"


def raw_partition(policy: Policy, sent_bytes: float) -> Partition:
    """The picture itself travels: the point `full`, with what it promises, is the only one."""
    full, last = policy.point("full"), len(policy.macs) - 1
    evidence = tuple(dataclasses.replace(each, cap=0) for each in full.evidence if each.cap == last)
    inspections = tuple(
        dataclasses.replace(each, cap=None if each.cap is None else 0)
        for each in full.inspections
        if each.cap in (None, last)
    )
    point = dataclasses.replace(
        full,
        thresholds=(ALWAYS,),
        votes=(1.0,),
        reached=(full.samples,),
        evidence=evidence,
        inspections=inspections,
    )
    only = dataclasses.replace(
        policy,
        score="max_probability",
        score_weights=(),
        temperatures=(1.0,),
        macs=policy.macs[-1:],
        points=(point,),
        requirements=(),
        default=point.name,
        reference_exit=-1,
        histogram=(),
    )
    return Partition(-1, RAW, sent_bytes, sent_bytes, only)


def as_logits(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a partition's policy takes from the last exit: logarithms of its probabilities.

    A server sends probabilities, at the temperature of the model's own policy.
    """
    logits: NDArray[np.float32] = np.log(np.maximum(probabilities, _SMALLEST))
    return logits


def partitions_json(partitions: Sequence[Partition]) -> str:
    """The metadata's text; `parse_partitions` reads it back."""
    rows = [{**vars(each), "policy": each.policy.to_json()} for each in partitions]
    return json.dumps(rows)


def parse_partitions(text: str, policy: Policy) -> tuple[Partition, ...]:
    """Read and check partitions of a model with that policy.

    Errors: InputError where one is incomplete or does not belong to the model.
    """
    try:
        return tuple(_partition(row, policy) for row in json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the model's partitions are damaged ({error}); copy it again") from error


def _partition(row: Any, policy: Policy) -> Partition:
    own = parse_policy(json.dumps(row["policy"]))
    partition = Partition(
        int(row["after"]),
        str(row["codec"]),
        float(row["sent_bytes"]),
        float(row["packed_bytes"]),
        own,
    )
    after, macs = partition.after, policy.macs
    if partition.codec != RAW:
        parse_codec(partition.codec)
    sound = (after == -1) == (partition.codec == RAW) and after in range(-1, len(macs) - 1)
    sizes = (partition.sent_bytes, partition.packed_bytes)
    sound = sound and all(math.isfinite(size) and size > 0 for size in sizes)
    if not sound or own.macs != (*macs[: after + 1], macs[-1]):
        raise ValueError(f"{partition.name} does not fit the model")
    return partition
