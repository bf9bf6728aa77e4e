"""The profile of blocks: costs that add up, times that agree with the whole."""

import json
import os
import tempfile

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE

from edgeke.device import cli
from edgeke.device.blocks import profile_blocks
from edgeke.device.classifier import Classifier
from edgeke.device.policy import force_exit
from edgeke.device.scores import Score
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved
from edgeke.errors import InputError
from edgeke.graph.compose import compose_cascade
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.layouts import with_layout
from edgeke.networks.tracing import trace

TIMM = "timm/tf_efficientnet_lite0"


def build(name: str, size: int, layout: object, shared: bool = True) -> BranchyNet:
    width = None if name.startswith("timm/") else 16
    backbone = Backbone(name, 3, len(CLASSES), size, width)
    return BranchyNet(with_layout(layout, backbone, shared=shared)).eval()


@pytest.mark.parametrize(
    ("name", "layout", "shared"),
    [("resnet18", "edgeke", True), ("resnet18", "edgeke", False), (TIMM, [0.3, 0.6], True)],
)
def test_costs_of_blocks_add_up_to_those_of_the_exits(name, layout, shared):
    network = build(name, 64, layout, shared)
    rows, costs = list_blocks(network, 64), exit_costs(network, 64)
    for exit, cost in enumerate(costs):
        until = [row for row in rows if row.exit <= exit]
        assert sum(row.macs for row in until) == cost.macs
        assert sum(row.parameters for row in until) == cost.parameters
    cuts = trace(network.architecture.backbone).cuts if shared else ()
    blocks = [row for row in rows if row.kind == "block"]
    assert [(row.name, row.shape) for row in blocks[1:]] == [(cut.name, cut.shape) for cut in cuts]
    assert [row.name for row in rows if row.kind == "exit"] == ["exit_0", "exit_1", "exit_2"]
    segments = export_segments(network, [0.5] * 3, [0.2] * 3, 64)
    for row in rows:
        nodes = segments[row.exit].graph.node
        assert any(node.name.startswith(row.nodes) for node in nodes), row.name


@pytest.mark.parametrize(
    ("name", "layout", "precision"),
    [("resnet18", "edgeke", "fp32"), ("resnet18", "edgeke", "int8"), (TIMM, [0.3, 0.6], "int8")],
)
def test_blocks_add_up_to_the_whole(name, layout, precision, tmp_path):
    size = 96 if name == TIMM else 64
    network = build(name, size, layout)
    images = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), np.uint8)
    segments = export_segments(network, [0.5] * 3, [0.2] * 3, size)
    if precision == "int8":
        segments = quantise_segments(segments, images)
    model = compose_cascade(
        segments,
        score=Score("margin"),
        temperatures=[1.0] * 3,
        image_shape=(size, size, 3),
        classes=len(CLASSES),
        metadata={},
    )
    onnx.save(model, tmp_path / "model.onnx")
    session, votes = open_session(tmp_path / "model.onnx"), np.ones(3, np.float32)
    none = np.zeros(len(CLASSES), np.float32)
    early, feeds = (
        {
            "image": images[:1],
            "thresholds": np.float32(force_exit(exit, 3)),
            "votes": votes,
            "bias": none,
        }
        for exit in (0, 2)
    )
    calls = {"early": lambda: session.run(None, early), "whole": lambda: session.run(None, feeds)}
    blocks = list_blocks(network, size)
    for _ in range(10):  # other processes take time from one or the other
        profile = profile_blocks(tmp_path / "model.onnx", blocks, feeds, 1, 25, 20.0)
        quick = {name: min(ms) for name, ms in time_interleaved(calls, 25, 20.0).items()}
        until = [row.name for row in profile.cascade()].index("decision_0") + 1
        least = profile.milliseconds.min(axis=0)
        part = least[:until].sum() / least.sum()
        ratios = profile.share, part / (quick["early"] / quick["whole"])
        if all(0.9 < ratio < 1.1 for ratio in ratios):
            break
    assert ratios == (pytest.approx(1, abs=0.1), pytest.approx(1, abs=0.1))
    assert 0 <= profile.overhead_ms < 0.02
    assert all(row.median_ms > 0 for row in profile.cascade()), "every row has kernels of its own"


def test_modes_take_their_own_rows(bundle):
    profile = Classifier(bundle).profile_blocks(rounds=3)
    cascade = [row.name for row in profile.cascade()]
    assert cascade[:4] == ["normalise", "stem", "layer1.0", "layer2.0"]
    exits = [name for name in cascade if name.startswith(("exit", "decision", "whole"))]
    assert exits == [
        "exit_0", "decision_0", "exit_1", "decision_1", "exit_2", "decision_2", "whole",
    ]  # fmt: skip
    trunk = [name for name in cascade if name not in exits]
    assert [row.name for row in profile.path(-1)] == [*trunk, "exit_2"]
    assert [row.name for row in profile.path(0)] == [*trunk[: cascade.index("exit_0")], "exit_0"]
    alone = [row.median_ms for row in profile.path(-1)]
    assert profile.path(-1)[-1].cumulative_ms == pytest.approx(sum(alone))
    image = SIZE * SIZE
    first, last = profile.path(-1)[0], profile.path(-1)[-1]
    assert (first.output_bytes_fp32, first.output_bytes_int8) == (4 * image, image)
    assert (last.output_bytes_fp32, last.output_bytes_int8) == (4 * 3, 4 * 3)


def test_the_command_prints_the_rows_of_its_mode(bundles, tmp_path, monkeypatch, capsys):
    for precision in ("margin", "int8"):
        for options in ([], ["--backbone"], ["--exit", "0"]):
            folder = tmp_path / "bundle"
            folder.mkdir(exist_ok=True)
            file = next(bundles[precision].glob("*.onnx"))
            (folder / file.name).write_bytes(file.read_bytes())
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
            assert cli.main(["profile", str(folder / file.name), "--rounds", "2", *options]) == 0
            out = capsys.readouterr().out
            names = [line.split()[0] for line in out.split("bytes fp32")[1].splitlines()[1:]]
            assert ("exit_0" in names) == (options != ["--backbone"])
            assert ("decision_0" in names) == ("whole" in names) == (options == [])
            assert ("layer4.0" in names) == (options != ["--exit", "0"])
            assert "MiB at most in a fresh process" in out.splitlines()[-1]
    assert {name for _, _, files in os.walk(tmp_path) for name in files} == {
        "edgeke.onnx", "edgeke.int8.onnx", "profile.json",
    }  # fmt: skip
    assert cli.main(["profile", str(folder), "--exit", "3"]) == 1
    assert capsys.readouterr().err == "error: exit = 3 must be 0 to 2\n"


def test_a_bundle_without_the_list_is_profiled_by_exit(bundle, capsys):
    model = onnx.load(bundle / "edgeke.onnx")
    kept = [each for each in model.metadata_props if each.key != "blocks"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, bundle / "edgeke.onnx")
    manifest = bundle / "segments" / "fp32" / "segments.json"
    content = json.loads(manifest.read_text())
    del content["blocks"]
    manifest.write_text(json.dumps(content))
    assert Classifier(bundle).open_segments() is not None
    assert cli.main(["profile", str(bundle), "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "exit 2" in out
    assert "blocks     not listed in this file" in out
    assert cli.main(["profile", str(bundle), "--backbone"]) == 1
    assert "does not list its blocks" in capsys.readouterr().err
    with pytest.raises(InputError, match="export the model again"):
        Classifier(bundle).profile_blocks()
