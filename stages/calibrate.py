"""Segments -> logits, models/policy[.int8].json and the one file, models/edgeke[.int8].onnx."""

import sys
from pathlib import Path

from safetensors.numpy import save

from edgeke.calibrate import calibrate
from edgeke.data.dataset import load_dataset
from edgeke.device.manifest import read_manifest
from edgeke.files import write_bytes, write_json, write_table
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("validation", "calibration"))
    splits, models = (dataset["validation"], dataset["calibration"]), Path("models")
    metrics: dict[str, float] = {}
    for precision, suffix, prefix in (("fp32", "", ""), ("int8", ".int8", "int8/")):
        folder = models / "segments" / precision
        manifest = read_manifest(folder)
        segments = [folder / name for name in manifest.segments]
        done = calibrate(segments, manifest, *splits, params.calibrate)
        for asked in done.policy.requirements:
            if asked.point is None:
                nearest = "nothing near it" if asked.nearest is None else f"{asked.nearest:.4g}"
                print(
                    f"warning: {precision} cannot promise {asked.name}; attainable: {nearest}",
                    file=sys.stderr,
                )
        for key, value in done.metrics.items():
            split, name = key.split("/", 1)
            metrics[f"{split}/{prefix}{name}"] = value
        write_bytes(
            models / f"logits{suffix}.safetensors",
            save({f"{name}.logits": logits for name, logits in done.logits.items()}),
        )
        write_json(models / f"policy{suffix}.json", done.policy.to_json())
        write_bytes(models / f"edgeke{suffix}.onnx", done.model)
        write_table(Path(f"results/calibrate/reliability{suffix}.csv"), done.reliability)
    return metrics


if __name__ == "__main__":
    sys.exit(entry("calibrate", run))
