"""models/edgeke.onnx on the test split -> results/evaluate/."""

import sys
from pathlib import Path

from edgeke.data.dataset import load_dataset
from edgeke.evaluate import evaluate
from edgeke.files import read_json, write_json, write_table
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("test",))
    exported = read_json(Path("results/export/metrics.json"))
    macs = {name: exported[f"cost/{name}/macs"] for name in ("main", "teacher")}
    evaluation = evaluate(Path("models"), macs, dataset["test"], params.evaluate)
    headline = evaluation.headline(read_json(Path("results/calibrate/metrics.json")))
    results = Path("results/evaluate")
    for precision, suffix in (("fp32", ""), ("int8", ".int8")):
        rows = [row for row in evaluation.frontier if row["precision"] == precision]
        write_table(results / f"frontier{suffix}.csv", rows)
    write_table(results / "exit_shares.csv", evaluation.shares)
    write_json(results / "device.json", evaluation.device)
    log.headline(headline)
    log.model(Path("models"))
    return evaluation.metrics


if __name__ == "__main__":
    sys.exit(entry("evaluate", run))
