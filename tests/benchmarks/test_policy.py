import numpy as np
import pytest
from bundles import MACS, build
from draws import draw, settings
from toys import SIZE, randomise

from benchmarks.policy import eenet, of_bundle, safe_kd
from edgeke.data.dataset import channels_last, save_dataset
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.policy.tuning import tune

COSTS = (0.3, 0.6, 1.0)


def test_the_rules_of_others_by_hand():
    split = draw(999)
    samples = tune(split, settings()).samples(split)
    probability = samples.answers[0, np.arange(999), split.labels]  # of the true class at exit 0
    first, _, last = safe_kd(samples, 0.1)
    assert last == -1
    # The 900th smallest of 1 - p: one in ten images has a true class less likely than that.
    assert first == pytest.approx(np.sort(probability)[99], abs=1e-6)
    thresholds = eenet(samples, COSTS, 0.65)
    assert samples.cost(thresholds, COSTS) == pytest.approx(0.65, abs=0.01)


def test_a_bundles_exits_answer_what_its_segments_do(architecture, dataset, tmp_path):
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    folder = build(tmp_path / "models", segments, "margin", "", dataset)
    save_dataset(dataset, tmp_path / "dataset.safetensors")
    validation, pool, macs, count = of_bundle(folder, tmp_path / "dataset.safetensors")
    splits = [dataset["calibration"], dataset["test"]]
    assert macs == MACS
    assert count == len(splits[0].labels)
    assert len(validation.labels) == len(dataset["validation"].labels)
    assert pool.labels.tolist() == [label for split in splits for label in split.labels]
    images = np.concatenate([channels_last(split.images) for split in splits])
    expected = segment_logits(sorted((folder / "segments" / "fp32").glob("*.onnx")), images, 1)
    # A temperature divides logits, and a softmax forgets what is common to them.
    ratio = (expected - expected.mean(-1, keepdims=True)).std(-1) / (
        pool.logits - pool.logits.mean(-1, keepdims=True)
    ).std(-1)
    assert (pool.logits.argmax(-1) == expected.argmax(-1)).all()
    assert ratio.std(-1) == pytest.approx(0, abs=1e-3)
