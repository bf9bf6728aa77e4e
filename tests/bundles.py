"""Builds what a device gets, as the pipeline does, from segments of a toy network."""

import json
from pathlib import Path

import onnx
from toys import CLASSES, SIZE

from edgeke.calibrate import Answers, compose, freeze
from edgeke.data.dataset import Dataset, channels_last
from edgeke.device.manifest import MANIFEST, Manifest
from edgeke.graph.runner import segment_logits
from edgeke.params import Calibrate, Proportions
from edgeke.policy.certify import certify

MACS, MAIN = (60, 80, 110), 90


def build(folder: Path, segments: list, score: str, suffix: str, dataset: Dataset) -> Path:
    """A folder with the one file, policy.json and the segments of a precision."""
    place = folder / "segments" / (suffix[1:] or "fp32")
    place.mkdir(parents=True)
    files = [place / f"{number}.onnx" for number in range(len(segments))]
    for model, file in zip(segments, files, strict=True):
        onnx.save(model, file)
    names = tuple(file.name for file in files)
    manifest = Manifest(names, MACS, MAIN, CLASSES, (SIZE, SIZE, 1))
    (place / MANIFEST).write_text(manifest.to_json())
    seen, held = (
        Answers(segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels)
        for name in ("validation", "calibration")
    )
    settings = Calibrate(score, Proportions((0.5, 0.5, 0.9)), 0.05, 0.1, ())
    frozen, _ = freeze(seen, MACS, MAIN, settings)
    policy = certify(frozen, held.logits, held.labels, 0.1, ())
    model = compose(files, policy, manifest)
    (folder / f"edgeke{suffix}.onnx").write_bytes(model)
    (folder / f"policy{suffix}.json").write_text(json.dumps(policy.to_json()))
    return folder
