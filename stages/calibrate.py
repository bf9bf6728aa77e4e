"""Segments -> logits, models/policy.json and the one file, models/edgeke.onnx."""

import sys
from pathlib import Path

from safetensors.numpy import save

from edgeke.calibrate import (
    Answers,
    check_composed,
    compose,
    exit_quality,
    freeze,
    point_metrics,
    reliability_rows,
)
from edgeke.data.dataset import load_dataset
from edgeke.files import write_bytes, write_json, write_table
from edgeke.graph.manifest import Manifest
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.params import Params
from edgeke.policy.certify import certify
from edgeke.tracking import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    folder, models = Path("models/segments/fp32"), Path("models")
    manifest = Manifest.read(folder)
    segments = [folder / name for name in manifest.segments]
    dataset = load_dataset(Path("data/dataset.safetensors"), ("validation", "calibration"))
    answers = {
        name: Answers(segment_logits(segments, channels_last(split.images), 0), split.labels)
        for name, split in dataset.splits.items()
    }
    validation, calibration = answers["validation"], answers["calibration"]
    settings = params.calibrate
    frozen, metrics = freeze(validation, manifest.macs, manifest.main_macs, settings)
    policy = certify(
        frozen, calibration.logits, calibration.labels, settings.delta, settings.requirements
    )
    for asked in policy.requirements:
        if asked.point is None:
            nearest = "nothing near it" if asked.nearest is None else f"{asked.nearest:.4g}"
            print(
                f"warning: requirement {asked.name} cannot be promised; attainable: {nearest}",
                file=sys.stderr,
            )
    metrics |= point_metrics(policy, validation)
    metrics |= exit_quality(validation, policy.temperatures, "validation")
    metrics |= exit_quality(calibration, policy.temperatures, "calibration")
    model = compose(segments, policy, manifest.classes, manifest.image_shape)
    metrics |= check_composed(model, policy, validation, dataset["validation"])

    write_bytes(
        models / "logits.safetensors",
        save({f"{name}.logits": of.logits for name, of in answers.items()}),
    )
    write_json(models / "policy.json", policy.to_json())
    write_bytes(models / "edgeke.onnx", model)
    rows = reliability_rows(calibration, policy.temperatures)
    write_table(Path("results/calibrate/reliability.csv"), rows)
    return metrics


if __name__ == "__main__":
    sys.exit(entry("calibrate", run))
