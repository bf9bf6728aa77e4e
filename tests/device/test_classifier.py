import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import helper
from toys import CLASSES, SIZE, replace

from edgeke.device import classifier as module
from edgeke.device.bundle import describe_pixels
from edgeke.device.choice import UnmetError
from edgeke.device.classifier import Classifier
from edgeke.device.policy import force_exit
from edgeke.device.profile import Profile
from edgeke.errors import InputError

COSTS = Profile((1.0, 2.0, 4.0), (1.5, 3.0, 9.0), 20)


def with_costs(classifier: Classifier, monkeypatch, costs: Profile = COSTS) -> Classifier:
    """The classifier on a device of known costs; `calls` holds the arguments of measurements."""
    calls = []
    monkeypatch.setattr(module, "measure_costs", lambda *a: calls.append(a) or costs)
    classifier.calls = calls
    return classifier


def same(one, other) -> bool:
    """Whether two answers agree but for rounding and time."""
    close = np.allclose(one.probabilities, other.probabilities, atol=1e-5)
    return close and (one.label, one.exit, one.point) == (other.label, other.exit, other.point)


def test_a_prediction_says_what_and_from_where(classifier, images):
    answer = classifier.predict(images[0])
    assert answer.class_name == CLASSES[answer.label]
    assert answer.label == answer.probabilities.argmax()
    assert answer.probabilities.dtype == np.float32
    assert answer.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert answer.point == classifier.policy.point(classifier.policy.default)
    assert 0 <= answer.exit <= 3
    assert answer.latency_ms > 0
    assert classifier.measured is None, "nothing asked for a latency"


@pytest.mark.parametrize("name", ["max_probability", "margin", "entropy", "learned", "int8"])
def test_a_batch_answers_as_one_by_one(bundles, images, name):
    classifier = Classifier(bundles[name])
    points, exits = classifier.policy.points, set()
    unsure = replace(points[0], name="unsure", thresholds=(2.0, 2.0, 2.0), votes=(1.0, 2.0, 3.0))
    for point in [*points[::5], classifier.policy.point("proportions"), unsure]:
        classifier.policy = replace(classifier.policy, points=(point,), default=point.name)
        classifier._plans.clear()
        batch = classifier.predict_batch(images)
        assert all(map(same, batch, map(classifier.predict, images)))
        exits |= {answer.exit for answer in batch}
    assert exits == {0, 1, 2, 3}


def test_only_unsure_images_go_on(classifier, images, monkeypatch):
    """The batch costs what its images need: segment e sees as many as reach exit e."""
    segments, seen = classifier.open_segments(), []
    run = segments.logits
    monkeypatch.setattr(segments, "logits", lambda e, x: seen.append((e, len(x))) or run(e, x))
    point = classifier.policy.point("proportions")
    found = segments.answer(images, point.thresholds, point.votes)
    reached = [(e, int((found.exit >= e).sum())) for e in range(3)]
    assert seen == reached
    assert len(images) > reached[1][1] > reached[2][1] > 0
    seen.clear()
    segments.answer(images, force_exit(0, 3), point.votes)
    assert seen == [(0, len(images))]


def test_the_single_file_loops_and_says_so(bundle, classifier, images):
    alone = Classifier(bundle / "edgeke.onnx")
    with pytest.warns(UserWarning, match="image by image; give the bundle folder") as caught:
        looped = alone.predict_batch(images)
    assert caught[0].filename == __file__
    assert all(map(same, looped, classifier.predict_batch(images)))
    alone.predict_batch(images[:1])


def test_a_large_batch_is_worked_through_in_chunks(bundles, images, monkeypatch):
    """Its memory, which ONNX Runtime keeps for ever, is that of 64 images."""
    classifier, sizes = Classifier(bundles["margin"]), []
    segments = classifier.open_segments()
    answer = segments.answer
    monkeypatch.setattr(segments, "answer", lambda x, *a: sizes.append(len(x)) or answer(x, *a))
    many = np.concatenate([images] * 4)
    answers = classifier.predict_batch(many)
    assert sizes == [64, 64, 52]
    assert all(map(same, answers, 4 * classifier.predict_batch(images)))
    times = [answer.latency_ms for answer in answers]
    assert max(times[:64]) < min(times[64:128]) < max(times[128:])


def test_a_stream_gives_every_exits_answer(classifier, images):
    for image in images[:5]:
        answers = list(classifier.stream(image))
        assert [answer.exit for answer in answers] == [0, 1, 2]
        assert [a.latency_ms for a in answers] == sorted(a.latency_ms for a in answers)
        for answer in answers:
            assert answer.point is None
            assert same(answer, classifier.forced(answer.exit)(image))


def test_a_stream_runs_no_further_than_it_is_read(classifier, images, monkeypatch):
    segments, ran = classifier.open_segments(), []
    run = segments.logits
    monkeypatch.setattr(segments, "logits", lambda e, x: ran.append(e) or run(e, x))
    stream = classifier.stream(images[0])
    assert ran == []
    next(stream)
    assert ran == [0]
    stream.close()
    with pytest.raises(InputError, match="not uint8"):
        classifier.stream(np.zeros((SIZE, SIZE)))
    assert ran == [0]


def test_a_stream_needs_segments(bundle, images):
    with pytest.raises(InputError, match=r"a stream needs the segments.*bundle folder"):
        Classifier(bundle / "edgeke.onnx").stream(images[0])
    shutil.rmtree(bundle / "segments")
    with pytest.raises(InputError, match="a stream needs the segments"):
        Classifier(bundle).stream(images[0])


def test_a_latency_measures_the_device_once(classifier, images, monkeypatch):
    with_costs(classifier, monkeypatch)
    classifier.predict(images[0])
    classifier.predict(images[0], max_degradation=0.9)
    assert classifier.calls == []
    answer = classifier.predict(images[0], mean_latency_ms=1.0)
    assert answer.point.deepest == 0
    classifier.predict_batch(images[:2], deadline_ms=3.0)
    assert len(classifier.calls) == 1
    assert classifier.measured == COSTS
    assert Classifier(classifier.bundle.model.parent).measured == COSTS


def test_latency_counts_from_the_call(classifier, images, monkeypatch):
    """A first profile, and checks, are part of what the caller waits for."""
    with_costs(classifier, monkeypatch)
    measure = classifier._measure
    monkeypatch.setattr(classifier, "_measure", lambda *a: time.sleep(0.2) or measure(*a))
    assert classifier.predict(images[0], mean_latency_ms=100.0).latency_ms > 200
    assert classifier.predict(images[0], mean_latency_ms=100.0).latency_ms < 200
    opened = classifier.open_segments
    monkeypatch.setattr(classifier, "open_segments", lambda: time.sleep(0.2) or opened())
    assert classifier.predict_batch(images[:2])[0].latency_ms > 200


def test_the_risk_of_a_promise_can_be_requested(classifier, images):
    known = classifier.predict(images[0], max_degradation=0.9)
    assert same(classifier.predict(images[0], max_degradation=0.9, delta=0.1), known)
    with pytest.raises(UnmetError, match="samples are too few"):
        classifier.predict_batch(images, max_degradation=0.1, delta=1e-9)


@pytest.mark.parametrize("exit", [-1, 4, 7])
def test_only_exits_and_the_vote_can_be_forced(classifier, exit):
    with pytest.raises(InputError, match=rf"exit = {exit} must be 0 to 2, or 3 for the vote"):
        classifier.forced(exit)


def test_what_cannot_be_met_names_the_nearest(classifier, images, monkeypatch):
    with_costs(classifier, monkeypatch)
    with pytest.raises(UnmetError, match=r"first exit alone takes 1\.5.*deadline_ms") as caught:
        classifier.predict(images[0], deadline_ms=1.0)
    assert caught.value.nearest == 1.5
    with pytest.raises(UnmetError, match=r"mean_latency_ms") as caught:
        classifier.predict(images[0], mean_latency_ms=0.5)
    assert classifier.predict(images[0], mean_latency_ms=caught.value.nearest)
    with pytest.raises(UnmetError, match=r"min_accuracy 0\.999 cannot be promised") as caught:
        classifier.predict(images[0], min_accuracy=0.999)
    with pytest.raises(InputError, match=r"must be a positive number.*mean_latency_ms"):
        classifier.predict_batch(images, mean_latency_ms=-1)


def test_int8_is_preferred_and_fp32_can_be_asked_for(bundle):
    shutil.copyfile(bundle / "edgeke.onnx", bundle / "edgeke.int8.onnx")
    assert Classifier(bundle).bundle.precision == "int8"
    assert Classifier(bundle).bundle.segments is None
    chosen = Classifier(str(bundle), precision="fp32").bundle
    assert (chosen.precision, chosen.model.name) == ("fp32", "edgeke.onnx")
    assert chosen.segments == bundle / "segments" / "fp32"
    assert Classifier(bundle / "edgeke.int8.onnx").bundle.precision == "int8"


@pytest.mark.parametrize(
    ("path", "precision", "words"),
    [
        ("none", None, "none is missing; give a bundle folder"),
        ("segments", None, r"holds no edgeke\.int8\.onnx or edgeke\.onnx; copy the whole bundle"),
        ("", "int8", r"has no model of precision 'int8', only fp32"),
        ("edgeke.onnx", "bf16", r"has no model of precision 'bf16', only fp32"),
        ("segments/fp32/segments.json", None, "is JSON; give the .onnx file"),
        (
            "segments/fp32/0.onnx",
            None,
            "is no one-file model of EdgeKE: its metadata lacks classes",
        ),
    ],
)
def test_what_is_no_bundle_is_refused(bundle, path, precision, words):
    with pytest.raises(InputError, match=words):
        Classifier(bundle / path, precision)


@pytest.mark.parametrize("threads", [-1, 1.5, True, "2", 99999999999])
def test_threads_are_checked(bundle, threads):
    with pytest.raises(InputError, match="threads = .* must be 0"):
        Classifier(bundle, threads=threads)


def test_segments_of_another_training_or_damaged_are_refused(bundles, bundle, images):
    """Of the same architecture: only the hash in the one file's metadata tells them apart."""
    shutil.copyfile(bundles["int8"] / "edgeke.int8.onnx", bundle / "edgeke.onnx")
    classifier = Classifier(bundle)
    assert classifier.predict(images[0])
    with pytest.raises(InputError, match=r"fp32 belongs to another model than .*edgeke\.onnx, or"):
        classifier.predict_batch(images)
    shutil.copyfile(bundles["margin"] / "edgeke.onnx", bundle / "edgeke.onnx")
    segment = bundle / "segments" / "fp32" / "1.onnx"
    segment.write_bytes(segment.read_bytes()[:-500])
    with pytest.raises(InputError, match="or is damaged; copy both from the same bundle"):
        Classifier(bundle).stream(images[0])
    segment.unlink()
    with pytest.raises(InputError, match=r"1\.onnx cannot be read"):
        Classifier(bundle).stream(images[0])


@pytest.mark.parametrize(("before", "after"), [('"macs"', '"mac"'), ("{", ""), ("{", "[{")])
def test_a_damaged_list_of_segments_is_named(bundle, images, before, after):
    manifest = bundle / "segments" / "fp32" / "segments.json"
    manifest.write_text(manifest.read_text().replace(before, after, 1))
    with pytest.raises(InputError, match=r"segments\.json is damaged"):
        Classifier(bundle).predict_batch(images)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "{}"}, "is damaged: not an EdgeKE policy"),
        ({"policy": '{"schema": 2}'}, "is of another version: policy schema 2 is not"),
        ({"classes": "[1"}, "is damaged: Expecting"),
        ({"classes": '["one"]'}, "its metadata does not fit its graph"),
        ({"image_shape": "[8, 8, 3]"}, "its metadata does not fit its graph"),
        ({"bits": "99"}, "its metadata does not fit its graph"),
    ],
)
def test_changed_metadata_is_refused(bundle, changes, words):
    model = onnx.load(bundle / "edgeke.onnx")
    carried = {prop.key: prop.value for prop in model.metadata_props}
    helper.set_model_props(model, {**carried, **changes})
    onnx.save(model, bundle / "edgeke.onnx")
    with pytest.raises(InputError, match=words):
        Classifier(bundle)


def test_no_file_outside_the_bundle_is_read(bundle, images, tmp_path):
    """Neither by a name in the list of segments nor by a symbolic link."""
    outside, segment = tmp_path / "0.onnx", bundle / "segments" / "fp32" / "0.onnx"
    segment.rename(outside)
    manifest = bundle / "segments" / "fp32" / "segments.json"
    text = manifest.read_text()
    for name in ("../../../0.onnx", str(outside), "a/../0.onnx", "..", "\\u0000"):
        manifest.write_text(text.replace("0.onnx", name))
        with pytest.raises(InputError, match="are not all plain names of files"):
            Classifier(bundle).predict_batch(images)
    manifest.write_text(text)
    for link, target in ((segment, outside), (bundle / "edgeke.onnx", tmp_path / "edgeke.onnx")):
        if link.exists():
            link.rename(target)
        link.symlink_to(target)
        with pytest.raises(InputError, match=f"{link.name} leads out of .*, and nothing outside"):
            Classifier(bundle).predict_batch(images)
    assert Classifier(bundle / "edgeke.onnx").predict(images[0]), "named by the user"


def test_links_within_a_bundle_are_followed(bundle, images, tmp_path):
    """As Kubernetes mounts files, below a link to the whole folder."""
    (bundle / "..data").mkdir()
    (bundle / "edgeke.onnx").rename(bundle / "..data" / "edgeke.onnx")
    (bundle / "edgeke.onnx").symlink_to("..data/edgeke.onnx")
    (tmp_path / "current").symlink_to(bundle)
    assert len(Classifier(tmp_path / "current").predict_batch(images)) == len(images)


@pytest.mark.parametrize("name", ["margin", "int8"])
def test_the_model_says_what_its_pixels_are(bundles, name):
    (file,) = bundles[name].glob("edgeke*.onnx")
    carried = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    pixels = json.loads(carried["pixels"])
    assert pixels["resampling"].startswith("bicubic")
    del pixels["resampling"]
    assert pixels == {
        "type": "uint8", "range": [0, 255], "layout": "HWC", "height": 8, "width": 8,
        "order": "grey", "fit": "crop", "normalisation": "in the model",
    }  # fmt: skip
    assert describe_pixels((3, 4, 3))["order"] == "RGB"


def test_colours_may_be_blue_first(bundle, images, monkeypatch):
    with pytest.raises(InputError, match="order = 'grb' must be rgb or bgr"):
        Classifier(bundle, order="grb")
    assert same(
        Classifier(bundle, order="bgr").predict(images[0]), Classifier(bundle).predict(images[0])
    )


def test_a_plain_session_opens_the_file_without_a_warning(bundles):
    """As the README does: no options of ours, ONNX Runtime's own level of messages."""
    files = [str(file) for folder in bundles.values() for file in folder.glob("edgeke*.onnx")]
    code = "import sys, onnxruntime as o; [o.InferenceSession(file) for file in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True
    )
    assert len(files) == len(bundles)
    assert done.stderr == ""


def test_threads_share_one_classifier(classifier, images, monkeypatch):
    """Answers are those of a single thread; the device is measured, and segments opened, once."""
    with_costs(classifier, monkeypatch)
    expected = [classifier.predict(image) for image in images]
    opened = []
    read = module.read_segments
    monkeypatch.setattr(module, "read_segments", lambda *a: opened.append(a) or read(*a))
    together = threading.Barrier(8)

    def work(number: int) -> bool:
        together.wait(30)
        timed = classifier.predict(images[number], mean_latency_ms=100.0)
        batch = classifier.predict_batch(images)
        streamed = [a.label for a in classifier.stream(images[number])]
        right = streamed == [classifier.forced(e)(images[number]).label for e in range(3)]
        singles = [classifier.predict(image) for image in images]
        return (
            right
            and bool(timed)
            and all(map(same, batch, expected))
            and all(map(same, singles, expected))
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(classifier.calls) == 1
    assert len(opened) == 1
