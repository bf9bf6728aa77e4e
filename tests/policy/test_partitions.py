"""What is promised about partitions, whoever of server and device gives the last answer."""

import dataclasses
import json

import numpy as np
import pytest
from draws import draw, settings

from edgeke.device.codec import Codec
from edgeke.device.partitions import (
    as_logits,
    parse_partitions,
    partitions_json,
    raw_partition,
)
from edgeke.device.policy import force_exit
from edgeke.device.scores import Score, calibrated_probabilities
from edgeke.errors import InputError
from edgeke.policy.cascade import run_cascade
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy
from edgeke.policy.partitions import certify_partition
from edgeke.policy.samples import EitherSamples, ExitLogits

MACS = (40, 70, 100)
CLASSES = tuple("abcde")


def noisy(logits, scale, seed):
    noise = np.random.default_rng(seed).normal(0, scale, logits.shape)
    return (logits + noise).astype(np.float32)


@pytest.fixture(scope="module")
def certified():
    chosen = settings(requirements=({"max_degradation": 0.1},), votes=(0.3, 0.3, 0.4))
    answers = {"validation": draw(400, 1), "calibration": draw(500, 2)}
    fitted, _ = fit_policy(answers["validation"], MACS, 100, chosen, CLASSES)
    policy = certify(fitted, answers["calibration"], chosen)
    remote = {name: noisy(split.logits[-1], 0.7, 3) for name, split in answers.items()}
    partition = certify_partition(
        0, Codec(4), answers, remote, policy, chosen, CLASSES, (100.0, 80.0)
    )
    return policy, partition, answers, remote


def degraded(policy, point, own, last):
    """Images that the full network answers right and the point wrong, with that last answer."""
    server = as_logits(calibrated_probabilities(last[None], (1.0,)))
    probabilities = calibrated_probabilities(
        np.concatenate([own.logits[:1], server]), policy.temperatures
    )
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    outcome = run_cascade(probabilities, scores, point.thresholds, point.votes)
    return own.correct_at(-1) & (outcome.probabilities.argmax(-1) != own.labels)


def test_a_point_counts_the_worse_of_server_and_device(certified):
    base, partition, answers, remote = certified
    temperature = base.temperatures[-1]
    own = answers["calibration"]
    for point in partition.policy.points:
        through = degraded(partition.policy, point, own, remote["calibration"] / temperature)
        local = degraded(partition.policy, point, own, own.logits[-1] / temperature)
        assert point.degraded == (through | local).sum()
    full = partition.policy.point("full")
    assert full.thresholds == force_exit(1, 2)
    assert full.degraded > 0, "the codec costs something"
    assert partition.policy.macs == (40, 100)


def test_unsure_and_wrong_answers_of_either_count(certified):
    base, partition, answers, remote = certified
    chosen = settings()
    rows = [
        ExitLogits(
            np.stack([answers["calibration"].logits[0], last]), answers["calibration"].labels
        )
        for last in (remote["calibration"], answers["calibration"].logits[-1])
    ]
    fitted, _ = fit_policy(rows[0], (40, 100), 100, chosen, CLASSES)
    one, other = (fitted.tuning.samples(each) for each in rows)
    both = EitherSamples(**vars(one), other=other)
    thresholds = (0.9, 0.6)
    labels = [each.labels_at(thresholds, (), True) for each in (one, other, both)]
    wrong = [(each >= 0) & (each != one.labels) for each in labels]
    assert (wrong[2] == (wrong[0] | wrong[1])).all()
    right = [each == one.labels for each in labels]
    assert (right[2] == (right[0] & right[1])).all()
    assert (wrong[0] != wrong[1]).any()
    assert (right[0] != right[1]).any()


def test_raw_promises_what_the_full_network_does(certified):
    policy, *_ = certified
    raw = raw_partition(policy, 321.0)
    point, full = raw.policy.points[0], policy.point("full")
    for risk in ("max_degradation", "max_error"):
        assert point.promised(risk, 0.1, 0) == full.promised(risk, 0.1, 2)
    assert raw.policy.macs == (100,)


def test_partitions_survive_the_file_and_foreign_ones_are_refused(certified):
    policy, partition, *_ = certified
    both = (partition, raw_partition(policy, 321.0))
    text = partitions_json(both)
    assert parse_partitions(text, policy) == both
    assert parse_partitions("[]", policy) == ()
    rows = json.loads(text)
    for key, value in {
        "after": 2, "codec": "q5", "sent_bytes": -1, "packed_bytes": "many", "policy": {},
    }.items():  # fmt: skip
        with pytest.raises(InputError):
            parse_partitions(json.dumps([{**rows[0], key: value}]), policy)
    with pytest.raises(InputError):
        parse_partitions(text, dataclasses.replace(policy, macs=(41, 70, 100)))
    with pytest.raises(InputError):
        parse_partitions("{", policy)
