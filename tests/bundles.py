"""Builds what a device gets, as the pipeline does, from segments of a toy network."""

from pathlib import Path

import onnx
from draws import settings
from toys import CLASSES, SIZE, replace

from edgeke.calibrate import compose, with_histogram
from edgeke.data.dataset import Dataset, channels_last
from edgeke.device.manifest import MANIFEST, Manifest
from edgeke.graph.runner import segment_logits
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy
from edgeke.policy.samples import ExitLogits

MACS, MAIN = (60, 80, 110), 90


def build(
    folder: Path,
    segments: list,
    score: str,
    suffix: str,
    dataset: Dataset,
    blocks: tuple = (),
    requirements: tuple = (),
) -> Path:
    """A folder with the one file and the segments of a precision."""
    place = folder / "segments" / (suffix[1:] or "fp32")
    place.mkdir(parents=True)
    files = [place / f"{number}.onnx" for number in range(len(segments))]
    for model, file in zip(segments, files, strict=True):
        onnx.save(model, file)
    names = tuple(file.name for file in files)
    channels = dataset["test"].images.shape[1]
    manifest = Manifest(names, MACS, MAIN, CLASSES, (SIZE, SIZE, channels), blocks=blocks)
    (place / MANIFEST).write_text(manifest.to_json())
    validation, calibration = (
        ExitLogits(
            segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels
        )
        for name in ("validation", "calibration")
    )
    chosen = settings(score=score, proportions={"of_reaching": [0.5, 0.5, 0.9]})
    chosen = replace(chosen, requirements=requirements)
    fitted, _ = fit_policy(validation, MACS, MAIN, chosen, CLASSES)
    policy = with_histogram(certify(fitted, calibration, chosen), calibration)
    model = compose(files, policy, manifest)
    (folder / f"edgeke{suffix}.onnx").write_bytes(model)
    return folder
