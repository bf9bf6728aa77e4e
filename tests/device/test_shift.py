import json
import os
import signal
import subprocess
import sys
import threading
import time
from math import sqrt

import numpy as np
import pytest
from toys import ROOT

from edgeke.device.classifier import Classifier
from edgeke.device.shift import ALPHA, BINS, Monitor, bin_of, histogram
from edgeke.errors import InputError


def scores(count: int, mean: float = 0.84, seed: int = 0) -> list[float]:
    """Scores of a law with that mean."""
    return np.random.default_rng(seed).beta(10 * mean, 10 * (1 - mean), count).tolist()


def alarm_after(monitor: Monitor, stream: list[float]) -> int | None:
    """How many images it took; None without an alarm."""
    for number, score in enumerate(stream, 1):
        monitor.see(score)
        if monitor.alarm:
            return number
    return None


def test_bins_follow_the_scores():
    values = np.linspace(0, 1, 1001)
    bins = [bin_of(value) for value in values.tolist()]
    assert bins == sorted(bins)
    assert (bins[0], bins[-1], bin_of(1.0001), bin_of(-0.1)) == (0, BINS - 1, BINS - 1, 0)
    assert bin_of(float("nan")) == 0
    assert bin_of(0.999) < bin_of(0.9995) < bin_of(0.9999)
    assert sum(histogram(values)) == 1001


@pytest.mark.parametrize("calibration", [20, 300])
def test_false_alarms_are_as_rare_as_stated(calibration):
    """At alpha 0.1, where they can be counted. Scores have ties: 5 values, and a law of many."""
    alpha, streams, length, false = 0.1, 300, 200, 0
    for seed in range(streams):
        drawn = np.random.default_rng(seed).beta(8, 2, calibration + length)
        drawn = np.round(4 * drawn) / 4 if seed % 2 else drawn
        monitor = Monitor(histogram(drawn[:calibration]), alpha=alpha, seed=seed)
        false += alarm_after(monitor, drawn[calibration:].tolist()) is not None
    assert 0 < false / streams <= alpha + 3 * sqrt(alpha * (1 - alpha) / streams)


def test_ranks_among_calibration_alone_alarm_more_often_than_stated():
    """What the histogram of all images so far is for: the same count can exceed its bound."""
    alpha, streams, false = 0.1, 100, 0
    for seed in range(streams):
        drawn = np.random.default_rng(seed).beta(8, 2, 270)
        frozen = Monitor(histogram(drawn[:20]), alpha=alpha, seed=seed)
        for score in drawn[20:].tolist():
            frozen.see(score)
            frozen._counts[bin_of(score)] -= 1
            frozen._total -= 1
        false += frozen.alarm
    assert false / streams > 0.3


@pytest.mark.parametrize(("mean", "most"), [(0.73, 150), (0.93, 400)])
def test_a_shift_is_noticed_after_thousands_of_healthy_images(mean, most):
    monitor = Monitor(histogram(scores(500)), seed=0)
    assert alarm_after(monitor, scores(10_000, seed=1)) is None
    assert monitor.shift.evidence < 1 / ALPHA
    assert (alarm_after(monitor, scores(1000, mean, seed=2)) or 1000) < most
    seen = monitor.shift
    assert seen.alarm
    for score in scores(3000, seed=3):
        monitor.see(score)
    assert monitor.shift.alarm  # it stays, whatever comes after it
    assert monitor.shift.images == seen.images + 3000


def test_evidence_stays_finite():
    monitor = Monitor((0,) * 255 + (10**6,), seed=0)
    for _ in range(3000):
        monitor.see(0.0)
    assert 1 / ALPHA < monitor.shift.evidence < float("inf")


def test_an_image_takes_under_20_microseconds():
    monitor, stream = Monitor(histogram(scores(500))), scores(2000)
    times = []
    for _ in range(5):
        started = time.thread_time()
        for score in stream:
            monitor.see(score)
        times.append((time.thread_time() - started) / len(stream))
    assert min(times) < 20e-6


def test_the_state_outlives_its_process(tmp_path):
    """Two halves of a stream give what the whole gives."""
    path, stream = tmp_path / "shift.json", scores(400, 0.6, seed=1)
    counts = histogram(scores(300))
    whole, half, other = (Monitor(counts, "p", seed=0) for _ in range(3))
    half.keep(path)
    for score in stream[:200]:
        whole.see(score)
        half.see(score)
    half.save()
    other.keep(path)
    other._random = half._random  # ties are broken as in the whole
    for score in stream[200:]:
        whole.see(score)
        other.see(score)
    assert other.shift == whole.shift
    assert whole.shift.alarm


def test_the_state_of_another_policy_is_renewed(tmp_path):
    path, counts = tmp_path / "shift.json", histogram(scores(300))
    first = Monitor(counts, "one", seed=0)
    first.keep(path)
    alarm_after(first, scores(500, 0.5))
    first.release()
    second = Monitor(counts, "other")
    with pytest.warns(UserWarning, match="another policy; watching for shift begins anew"):
        second.keep(path)
    assert not second.shift.alarm
    assert second.shift.images == 0
    assert json.loads(path.read_text())["policy"] == "other"


def damaged(path, kind: str) -> None:
    text = path.read_text()
    new = {
        "empty": "",
        "truncated": text[:-40],
        "foreign": '{"precision": "int8"}',
        "a list": "[1, 2]",
        "edited": text.replace('"alarm": true', '"alarm": false'),
    }[kind]
    path.write_text(new)


@pytest.mark.parametrize("kind", ["empty", "truncated", "foreign", "a list", "edited"])
def test_a_damaged_or_foreign_file_is_refused_and_stays(tmp_path, kind):
    """An alarm may be in it: whoever begins anew must know."""
    path, counts = tmp_path / "shift.json", histogram(scores(300))
    monitor = Monitor(counts, "p", seed=0)
    monitor.keep(path)
    alarm_after(monitor, scores(500, 0.5))
    monitor.release()
    damaged(path, kind)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is no state of shift, or damaged.*delete the file"):
        Monitor(counts, "p").keep(path)
    assert path.read_bytes() == before


def test_a_state_that_cannot_be_written_is_said(tmp_path):
    counts = histogram(scores(300))
    with pytest.raises(InputError, match="cannot be written"):
        Monitor(counts).keep(tmp_path / "none" / "shift.json")
    monitor = Monitor(counts, seed=0)
    (tmp_path / "there").mkdir()
    monitor.keep(tmp_path / "there" / "shift.json")
    (tmp_path / "there").rename(tmp_path / "gone")
    monitor.see(0.9)
    with pytest.warns(UserWarning, match="kept in memory alone"):
        monitor.save()


WRITER = """
import sys
from pathlib import Path
from edgeke.device.shift import Monitor
monitor = Monitor((1,) * 256, "p", seed=0)
monitor.keep(Path(sys.argv[1]))
print("started", flush=True)
while True:
    monitor.see(0.5)
    monitor.save()
"""


def test_a_killed_process_leaves_a_whole_state(tmp_path):
    path = tmp_path / "shift.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    for seconds in (0.02, 0.05):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(seconds)
            os.kill(process.pid, signal.SIGKILL)
        monitor = Monitor((1,) * 256, "p")
        monitor.keep(path)
        assert monitor.shift.images > 0


def test_every_way_to_answer_counts_and_says_when_promises_are_void(bundle, images, tmp_path):
    state = tmp_path / "shift.json"
    classifier = Classifier(bundle, shift_state=state)
    assert classifier.shift is not None
    assert classifier.shift.images == 0
    assert classifier.predict(images[0]).promised
    classifier.predict_batch(images[:7])
    next(classifier.stream(images[0]))
    classifier.forced(1)(images[0])  # for measuring: does not count
    assert classifier.shift.images == 9
    dark = np.zeros_like(images[0])
    answers = [classifier.predict(dark) for _ in range(200)]
    assert [answers[0].promised, answers[-1].promised] == [True, False]
    assert not classifier.predict_batch(images[:2])[1].promised
    assert not next(classifier.stream(images[0])).promised
    evidence = classifier.shift
    classifier.close()
    again = Classifier(bundle, shift_state=state)
    assert again.shift == evidence
    assert not again.predict(images[0]).promised


def test_the_one_file_gives_exit_0_s_score_as_the_segments_do(bundles, images):
    for score, folder in bundles.items():
        one, batch = Classifier(folder), Classifier(folder)
        for image in images[:40]:
            one.predict(image)
        batch.predict_batch(images[:40])
        assert one._monitor is not None
        assert batch._monitor is not None
        difference = np.abs(np.subtract(one._monitor._counts, batch._monitor._counts)).sum()
        assert difference <= 2, score  # a score at the edge of a bin


def test_threads_lose_no_image(bundle, images):
    classifier = Classifier(bundle)

    def answer() -> None:
        for image in images[:25]:
            classifier.predict(image)

    threads = [threading.Thread(target=answer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert classifier.shift is not None
    assert classifier.shift.images == 200
    assert classifier._monitor is not None
    assert sum(classifier._monitor._counts) == classifier.policy.samples + 200


def test_a_policy_without_a_histogram_has_no_monitor(bundle, images, monkeypatch):
    from edgeke.device import bundle as module
    from edgeke.device.policy import parse_policy

    def older(text: str):
        content = json.loads(text) | {"schema": 4}
        del content["histogram"]
        return parse_policy(json.dumps(content))

    monkeypatch.setattr(module, "parse_policy", older)
    import onnx

    model = onnx.load(bundle / "edgeke.onnx")
    model.graph.output.pop()  # as exported before
    onnx.save(model, bundle / "edgeke.onnx")
    classifier = Classifier(bundle)
    assert classifier.shift is None
    assert classifier.predict(images[0]).promised
    with pytest.raises(InputError, match="has no histogram"):
        Classifier(bundle, shift_state=bundle / "shift.json")
