import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from draws import settings
from PIL import Image
from toys import CLASSES, SIZE, randomise, replace

from edgeke.calibrate import calibrate
from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.device.codec import RAW, decode, encode, parse_codec
from edgeke.device.manifest import MANIFEST, Manifest
from edgeke.device.partitions import as_logits
from edgeke.device.policy import RequirementResult
from edgeke.device.scores import Score, calibrated_probabilities
from edgeke.errors import InputError
from edgeke.evaluate import (
    Evaluation,
    divided,
    evaluate,
    headline,
    inspected,
    kept,
    through_partition,
    write_samples,
)
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static, list_blocks
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout
from edgeke.params import Evaluate, PartitionSettings, Requirement
from edgeke.policy.cascade import run_cascade

MACS, MAIN = (60, 80, 110), 90
SETTINGS = Evaluate(
    device="local", python="python3", latency_images=12, deadline_ms=None, threads=(1, 2)
)
STATIC_MACS = {"main": MAIN, "branch_0": 50}
PREFIXES = {"fp32": "test/", "int8": "test/int8/"}


@pytest.fixture(scope="module")
def built(dataset, tmp_path_factory):
    """A whole bundle: segments, composed files and static networks in both precisions."""
    models = tmp_path_factory.mktemp("models")
    network = randomise(BranchyNet(with_layout("edgeke", Backbone("resnet10", 1, 3, SIZE, 4))))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    images = channels_last(dataset["train"].images)
    both = {"fp32": segments, "int8": quantise_segments(segments, images)}
    (models / "static").mkdir()
    for name, alone in {"main": network, "branch_0": network.branch(0)}.items():
        static = export_static(alone, dataset.mean, dataset.std, SIZE)
        onnx.save(static, models / "static" / f"{name}.onnx")
        onnx.save(quantise(static, images), models / "static" / f"{name}.int8.onnx")
    chosen = settings(
        score="learned",
        requirements=(Requirement(max_degradation=0.6),),
        partitions=(PartitionSettings(0, ("q2",)), PartitionSettings(1, ("q4_r50",))),
    )
    fp32 = None
    policies = {}
    for precision, graphs in both.items():
        folder = models / "segments" / precision
        folder.mkdir(parents=True)
        for number, graph in enumerate(graphs):
            onnx.save(graph, folder / f"{number}.onnx")
        names, blocks = ("0.onnx", "1.onnx", "2.onnx"), list_blocks(network, SIZE)
        manifest = Manifest(names, MACS, MAIN, CLASSES, (SIZE, SIZE, 1), blocks=blocks)
        (folder / MANIFEST).write_text(manifest.to_json())
        files = [folder / name for name in manifest.segments]
        done = calibrate(files, manifest, dataset.splits, chosen, fp32)
        fp32 = fp32 or done
        suffix = "" if precision == "fp32" else ".int8"
        (models / f"edgeke{suffix}.onnx").write_bytes(done.model)
        logits = segment_logits(files, channels_last(dataset["test"].images), 1)
        policies[precision] = (done.policy, logits)
    return models, policies


@pytest.fixture(scope="module")
def evaluation(built, dataset) -> Evaluation:
    return evaluate(built[0], STATIC_MACS, dataset["test"], SETTINGS)


@pytest.mark.parametrize("precision", PREFIXES)
def test_points_and_those_who_leave_at_each_exit_follow_from_the_file(
    built, evaluation, dataset, precision
):
    policy, logits = built[1][precision]
    assert evaluation.policies[precision] == policy
    metrics, prefix, labels = evaluation.metrics, PREFIXES[precision], dataset["test"].labels
    probabilities = calibrated_probabilities(logits, policy.temperatures)
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    full = built[1]["fp32"][1][-1].argmax(-1) == labels
    assert {"full", "default", "max_degradation_0.6"} <= set(policy.named)
    for label, point in policy.named.items():
        expected = run_cascade(probabilities, scores, point.thresholds, point.votes)
        correct = expected.probabilities.argmax(-1) == labels
        start = f"{prefix}{label}"
        assert metrics[f"{start}/accuracy"] == pytest.approx(correct.mean())
        cost = np.array([*MACS, MACS[-1]])[expected.exit].mean() / MAIN
        assert metrics[f"{start}/cost_share"] == pytest.approx(cost)
        lost = (full & ~correct).mean()
        assert metrics[f"{start}/degradation"] == pytest.approx(lost), "int8 against fp32's network"
        for exit, name in enumerate(("exit_0", "exit_1", "exit_2", "voted")):
            left = expected.exit == exit
            assert metrics[f"{start}/{name}/share"] == pytest.approx(left.mean())
            if left.any():
                accuracy = metrics[f"{start}/{name}/accuracy"]
                assert accuracy == pytest.approx(correct[left].mean())
            timed = f"{start}/{name}/latency_ms_mean" in metrics
            assert timed == left[: SETTINGS.latency_images].any()
    rows = [row for row in evaluation.leavers if row["point"] == f"{prefix}full".split("/", 1)[1]]
    assert [row["share"] for row in rows] == [0, 0, 1, 0]
    assert [row["accuracy"] is None for row in rows] == [True, True, False, True]


@pytest.mark.parametrize("precision", PREFIXES)
def test_partitions_are_reported_as_device_and_server_would_answer(
    built, evaluation, dataset, precision
):
    """Image by image, as they would travel; also at a point that sends about half of them."""
    device, prefix = Classifier(built[0], precision), PREFIXES[precision].removeprefix("test/")
    images, labels = dataset["test"].images, dataset["test"].labels
    segments, shares = device.open_segments(), []
    files = [built[0] / "segments" / precision / f"{exit}.onnx" for exit in range(3)]
    own = calibrated_probabilities(built[1][precision][1], device.policy.temperatures)
    assert [each.name for each in device.partitions] == ["after_0_q2", "after_1_q4_r50", "raw"]
    for partition in device.partitions:
        policy, after = partition.policy, partition.after
        score, rows = Score(policy.score, policy.score_weights), []
        for image in channels_last(images):
            features, logits = image[None], []
            for exit in range(3):
                if exit == after + 1 and partition.codec != RAW:
                    message = encode(features, parse_codec(partition.codec))
                    features = decode(message, features.shape[1:], 1)
                answer, features = segments.logits(exit, features)
                logits.append(answer)
            last = calibrated_probabilities(logits[-1][None], device.policy.temperatures[-1:])
            rows.append(np.stack([*logits[: after + 1], as_logits(last)[0]]))
        probabilities = calibrated_probabilities(np.concatenate(rows, 1), policy.temperatures)
        half = min(policy.points, key=lambda p: abs(p.reached[-1] / p.samples - 0.5)).name
        for point in (policy.point(policy.default), policy.point(half)):
            changed = replace(partition, policy=replace(policy, default=point.name))
            values = divided(
                changed, device.policy, list(own), through_partition(changed, files, images),
                labels, labels >= 0, evaluation.metrics, prefix,
            )  # fmt: skip
            if point.name == policy.default:
                start = f"test/{prefix}partition/{partition.name}/"
                assert evaluation.metrics[f"{start}accuracy"] == pytest.approx(values["accuracy"])
                assert evaluation.metrics[f"{start}sent_share"] == values["sent_share"]
            outcome = run_cascade(
                probabilities, score.of(probabilities), point.thresholds, point.votes
            )
            right, sent = outcome.probabilities.argmax(-1) == labels, outcome.exit > after
            shares.append(sent.mean())
            assert values["accuracy"] == pytest.approx(right.mean())
            assert values["degradation"] == pytest.approx(1 - right.mean())
            assert values["sent_share"] == pytest.approx(sent.mean())
            server = probabilities[-1].argmax(-1) == labels
            assert values["server_accuracy"] == pytest.approx(server.mean())
            size = sent.mean() * min(partition.sent_bytes, partition.packed_bytes)
            assert values["bytes_per_image"] == pytest.approx(size)
            slow, fast = (values[f"latency_ms_at_{rate}_mbit"] for rate in (1, 100))
            assert slow - fast == pytest.approx(size * 8e-3 * 0.99)
            assert fast >= 20 * sent.mean() + size * 8e-5
    assert any(0 < share < 1 for share in shares)


@pytest.mark.parametrize("precision", PREFIXES)
def test_classes_are_counted_for_the_default_and_the_full_network(
    built, evaluation, dataset, precision
):
    policy, logits = built[1][precision]
    labels, prefix = dataset["test"].labels, PREFIXES[precision].removeprefix("test/")
    answers = logits[-1].argmax(-1)
    rows = [row for row in evaluation.classes if row["point"] == f"{prefix}full"]
    assert [row["class"] for row in rows] == list(CLASSES)
    recall = [(answers[labels == k] == k).mean() for k in range(len(CLASSES))]
    assert [row["recall"] for row in rows] == pytest.approx(recall)
    start = f"{PREFIXES[precision]}full"
    assert evaluation.metrics[f"{start}/least_recall"] == pytest.approx(min(recall))
    assert 0 <= evaluation.metrics[f"{start}/macro_f1"] < 1
    columns = {key: [row[key] for row in evaluation.confusion] for key in evaluation.confusion[0]}
    assert set(columns) == {"actual", "default", "full", "int8/default", "int8/full"}
    assert columns["actual"] == [CLASSES[k] for k in labels]
    assert columns[f"{prefix}full"] == [CLASSES[k] for k in answers]
    never = [CLASSES[k] for k in range(len(CLASSES)) if k not in answers]
    told = [words for words in evaluation.warnings if words.startswith(f"the point {prefix}full ")]
    assert all(name in " ".join(told) for name in never)


def test_everything_is_measured_for_each_number_of_threads(evaluation):
    metrics = evaluation.metrics
    for prefix in PREFIXES.values():
        for name in ("exit_0", "exit_2", "main", "branch_0", "full", "default"):
            for where in ("", "threads_2/"):
                start = f"{prefix}{name}/{where}"
                ordered = [metrics[f"{start}latency_ms_{key}"]
                           for key in ("min", "median", "p95", "p99")]  # fmt: skip
                assert ordered[0] > 0
                assert ordered == sorted(ordered)
                assert 0 <= metrics[f"{start}deadline_misses"] <= 1
        for name in ("edgeke", "main", "branch_0"):
            assert 20 < metrics[f"{prefix}{name}/peak_memory_mib"] < 300
            assert metrics[f"{prefix}{name}/file_mib"] > 0.001
            assert metrics[f"{prefix}{name}/load_ms"] > 0
        for name in ("default", "main"):
            for size in (8, 32):
                assert metrics[f"{prefix}{name}/images_per_second_batch_{size}"] > 0
    assert evaluation.device["device"] == "local"
    assert evaluation.device["threads"] == [1, 2]
    assert set(evaluation.device["machine"]) >= {"processor", "onnxruntime"}


def test_the_profile_has_every_block_of_both_precisions(evaluation):
    tables = {
        precision: [row for row in evaluation.profile if row["precision"] == precision]
        for precision in PREFIXES
    }
    names = ["normalise", "stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    for precision, rows in tables.items():
        assert [row["name"] for row in rows if row["kind"] == "block"] == names
        assert [row["name"] for row in rows if row["kind"] == "exit"] == [
            "exit_0",
            "exit_1",
            "exit_2",
        ]
        until = [row["cumulative_ms"] for row in rows[:-1]]
        assert until[0] > 0
        assert until == sorted(until)
        whole = evaluation.metrics[f"{PREFIXES[precision]}exit_2/latency_ms_median"]
        assert rows[-1]["cumulative_ms"] == pytest.approx(whole, rel=0.8), "the same path"
    costs = ("name", "macs", "parameters", "output_bytes_fp32", "output_bytes_int8")
    fp32, int8 = ([[row[key] for key in costs] for row in rows] for rows in tables.values())
    assert fp32 == int8


def test_static_networks_are_baselines_of_the_exits(evaluation):
    metrics = evaluation.metrics
    assert metrics["test/main/accuracy"] == metrics["test/exit_2/accuracy"]
    assert metrics["test/branch_0/accuracy"] == metrics["test/exit_0/accuracy"]
    assert metrics["test/branch_0/cost_share"] == pytest.approx(50 / MAIN)
    rows = {row["name"]: row for row in evaluation.frontier}
    assert {row["kind"] for row in rows.values()} == {
        "operating point", "frontier", "exit", "static network",
    }  # fmt: skip
    assert rows["int8/main"]["label"] == "int8/main"
    assert rows["int8/branch_0"]["label"] == "", "labels of all networks would cover each other"
    assert rows["int8/branch_0"]["latency_ms"] == metrics["test/int8/branch_0/latency_ms_mean"]


def test_the_headline_is_the_default_point_and_the_requirements(evaluation):
    of_calibrate = ("validation/default/accuracy", "calibration/default/cost_share",
                    "calibration/max_degradation_0.6/met",
                    "validation/composed/parity_difference")  # fmt: skip
    measured = {"test/default/accuracy", "test/default/cost_share",
                "test/default/latency_ms_mean", "test/max_degradation_0.6/kept"}  # fmt: skip
    calibrated = dict.fromkeys((*of_calibrate, "validation/exit_0/accuracy"), 0.5)
    names = headline(evaluation, calibrated)
    assert {name for name in names if "int8" not in name} == {*of_calibrate, *measured}
    assert {name.replace("int8/", "") for name in names if "int8" in name} == measured


def test_a_device_through_ssh_measures_the_same_accuracy(built, evaluation, dataset, server):
    there = replace(SETTINGS, device=server, python=sys.executable, threads=(1,))
    remote = evaluate(built[0], STATIC_MACS, dataset["test"], there)
    assert remote.device["device"] == server
    same = [key for key in evaluation.metrics if key.endswith(("accuracy", "degradation", "share"))]
    assert {k: remote.metrics[k] for k in same} == {k: evaluation.metrics[k] for k in same}
    assert remote.metrics["test/int8/full/latency_ms_mean"] > 0


def test_kept_compares_each_requirement_with_its_own_number(built):
    policy = built[1]["fp32"][0]
    requirements = (
        RequirementResult("max_cost_0.9", "max_cost", 0.9, 0.1, "full", None),
        RequirementResult("min_accuracy_0.9", "min_accuracy", 0.9, 0.1, "full", None),
        RequirementResult("max_degradation_0.1", "max_degradation", 0.1, 0.1, None, 0.2),
    )
    metrics = {"test/max_cost_0.9/cost_share": 0.95, "test/min_accuracy_0.9/accuracy": 0.95}
    assert kept(replace(policy, requirements=requirements), metrics) == {
        "test/max_cost_0.9/kept": 0,
        "test/min_accuracy_0.9/kept": 1,
    }


def test_promises_about_some_images_are_compared_with_the_test_split(built):
    labels, full = np.array([0, 0, 1, 1, 1, 1]), np.array([True, True, True, True, True, False])
    named = {
        "int8/max_miss_b_0.3": np.array([1, 0, 0, 1, 1, 0]),
        "int8/min_recall_b_0.7": np.array([1, 0, 0, 1, 1, 1]),
        "int8/max_sure_error_0.1": np.array([0, -1, 1, 0, -1, 1]),
    }
    rows = (("max_miss", 0.3, "b"), ("min_recall", 0.7, "b"), ("max_sure_error", 0.1, None))
    requirements = tuple(
        RequirementResult(name.removeprefix("int8/"), kind, bound, 0.1, "full", None, class_name)
        for name, (kind, bound, class_name) in zip(named, rows, strict=True)
    )
    policy = replace(built[1]["int8"][0], requirements=requirements)
    metrics = inspected(policy, "int8/", named, labels, full, ("a", "b"))
    assert metrics == {
        "test/int8/max_miss_b_0.3/miss": 1 / 4,  # the full network misses the last one, too
        "test/int8/min_recall_b_0.7/recall": 3 / 4,
        "test/int8/min_recall_b_0.7/false_alarms": 1 / 6,
        "test/int8/max_sure_error_0.1/sure_error": 1 / 4,
        "test/int8/max_sure_error_0.1/automation": pytest.approx(4 / 6),
    }
    assert list(kept(policy, metrics, "int8/").values()) == [1, 1, 0]


def test_broken_files_are_refused(built, dataset, tmp_path: Path):
    models = shutil.copytree(built[0], tmp_path / "models")
    static = models / "static" / "branch_0.onnx"
    whole = static.read_bytes()
    static.write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"device process failed: error: .*branch_0.*truncated"):
        evaluate(models, STATIC_MACS, dataset["test"], SETTINGS)
    (models / "edgeke.onnx").write_bytes(whole)
    with pytest.raises(InputError, match=r"edgeke\.onnx is no one-file model of EdgeKE"):
        evaluate(models, STATIC_MACS, dataset["test"], SETTINGS)


def test_samples_go_from_easy_to_hard_where_the_licence_permits(
    evaluation, dataset, tmp_path: Path
):
    images, order = channels_last(dataset["test"].images), evaluation.by_certainty
    assert sorted(order) == list(range(len(images)))
    write_samples(tmp_path, "digits", images, order)
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 12
    for file, number in ((files[0], order[0]), (files[-1], order[-1])):
        assert (np.asarray(Image.open(file)) == images[number, ..., 0]).all()
    write_samples(tmp_path, "folder", images, order)
    assert not list(tmp_path.iterdir()), "nobody else's pictures, and no older ones"
