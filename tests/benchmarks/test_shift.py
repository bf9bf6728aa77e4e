import json

import numpy as np
import pytest
import torch
from bundles import build
from toys import SIZE, randomise

from benchmarks import shift
from edgeke.data.dataset import channels_last, save_dataset
from edgeke.device.classifier import Classifier
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.branchynet import BranchyNet


def test_costs_are_the_classifier_s_and_every_change_has_a_row(
    architecture, dataset, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    folder = build(tmp_path / "b", segments, "margin", "", dataset, list_blocks(network, SIZE))
    save_dataset(dataset, tmp_path / "dataset.safetensors")
    for name, value in {"_STREAMS": 20, "_LONG": 50, "_TRIALS": 3, "_MOST": 60}.items():
        monkeypatch.setattr(shift, name, value)
    out = tmp_path / "summary.json"
    shift.main(
        ["--models", str(folder), "--dataset", str(tmp_path / "dataset.safetensors"),
         "--out", str(out)]
    )  # fmt: skip
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["false_alarms"] == {
        "streams": 20, "orders": 0, "order_images": 45, "drawn": 0, "drawn_images": 50,
    }  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 1 + 3 * (len(shift.CHANGES) + 1)
    images, labels = channels_last(dataset["test"].images), dataset["test"].labels
    answers = np.array([each.label for each in Classifier(folder).predict_batch(images)])
    assert rows[0]["default"] == pytest.approx((answers == labels).mean())
    even = labels % 2 == 0
    assert rows[-1]["default"] == pytest.approx((answers == labels)[even].mean())
    noticed = {(row["change"], row["strength"]): row["noticed"] for row in rows}
    assert noticed["none", ""] == 0


def test_changes_do_what_they_say():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    changed = {name: change(images, s[-1]) for name, (change, s, _) in shift.CHANGES.items()}
    assert all(each.shape == images.shape and each.dtype == np.uint8 for each in changed.values())
    assert changed["darker"].mean() == pytest.approx(0.4 * images.mean(), abs=1)
    assert changed["contrast"].std() == pytest.approx(0.25 * images.std(), abs=1)
    assert changed["blur"].std() < 0.5 * images.std()
    whole = shift._moved(images, 2 / 16)
    assert np.array_equal(whole[:, 2:, 2:], images[:, :-2, :-2])
