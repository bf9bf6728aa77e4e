"""The one-file models and static networks on the test split -> results/evaluate/."""

import sys
from pathlib import Path

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.evaluate import evaluate, headline, write_samples
from edgeke.files import read_json, write_json, write_table
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset, models = load_dataset(Path("data/dataset.safetensors"), ("test",)), Path("models")
    exported = read_json(Path("results/export/metrics.json"))
    static = [file.name.split(".")[0] for file in sorted((models / "static").glob("*.int8.onnx"))]
    macs = {name: exported[f"cost/{name}/macs"] for name in static}
    evaluation = evaluate(models, macs, dataset["test"], params.evaluate)
    results = Path("results/evaluate")
    for precision, suffix in (("fp32", ""), ("int8", ".int8")):
        rows = [row for row in evaluation.frontier if row["precision"] == precision]
        write_table(results / f"frontier{suffix}.csv", rows)
    write_table(results / "exit_shares.csv", evaluation.leavers)
    write_table(results / "classes.csv", evaluation.classes)
    write_table(results / "confusion.csv", evaluation.confusion)
    for words in evaluation.warnings:
        print(f"warning: {words} on the test split (results/evaluate/classes.csv)", file=sys.stderr)
    write_table(results / "profile.csv", evaluation.profile)
    write_json(results / "device.json", evaluation.device)
    test = channels_last(dataset["test"].images)
    write_samples(models / "samples", dataset.source, test, evaluation.by_certainty)
    log.headline(headline(evaluation, read_json(Path("results/calibrate/metrics.json"))))
    log.model(models)
    return evaluation.metrics


if __name__ == "__main__":
    sys.exit(entry("evaluate", run))
