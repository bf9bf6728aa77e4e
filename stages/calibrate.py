"""Segments -> operating points, and the one file: models/edgeke[.int8].onnx."""

import sys
from pathlib import Path

from edgeke.calibrate import calibrate
from edgeke.data.dataset import load_dataset
from edgeke.device.manifest import read_manifest
from edgeke.device.policy import Policy
from edgeke.files import write_bytes, write_table
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("validation", "calibration"))
    models, metrics = Path("models"), {}
    fp32 = None
    for precision, suffix, prefix in (("fp32", "", ""), ("int8", ".int8", "int8/")):
        folder = models / "segments" / precision
        manifest = read_manifest(folder)
        segments = [folder / name for name in manifest.segments]
        result = calibrate(segments, manifest, dataset.splits, params.calibrate, fp32)
        fp32 = fp32 or result
        if result.policy.unmet:
            print(warning(precision, result.policy), file=sys.stderr)
        for key, value in result.metrics.items():
            split, name = key.split("/", 1)
            metrics[f"{split}/{prefix}{name}"] = value
        write_bytes(models / f"edgeke{suffix}.onnx", result.model)
        write_table(Path(f"results/calibrate/reliability{suffix}.csv"), result.reliability)
    return metrics


def warning(precision: str, policy: Policy) -> str:
    """One line that says which requirements are not met, and what the default is."""
    unmet = []
    for result in policy.unmet:
        words = [] if result.nearest is None else [f"the nearest is {result.nearest:.4g}"]
        words += [result.reason] if result.reason else []
        unmet.append(result.name + (f" ({'; '.join(words)})" if words else ""))
    return (
        f"warning: {precision} cannot promise {', '.join(unmet)}; the default point is "
        f"{policy.default}"
    )


if __name__ == "__main__":
    sys.exit(entry("calibrate", run))
