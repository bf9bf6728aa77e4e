"""The source's images -> data/dataset.safetensors."""

import sys
from pathlib import Path

from edgeke.data.dataset import load_dataset, save_dataset
from edgeke.data.sources import read_source
from edgeke.download import download
from edgeke.files import read_json
from edgeke.params import Params
from edgeke.tracking.runs import Run
from edgeke.tracking.state import flatten
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    source = params.profile.data
    if source.source not in ("digits", "cifar10", "cifar100", "elpv") and (
        metrics := kept_metrics(params)
    ):
        return metrics
    labelled = read_source(source, Path(params.data.path), params.data.bits)
    dataset, metrics, notes = download(labelled, source, params.profile_name, params.seed)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    save_dataset(dataset, Path("data/dataset.safetensors"))
    return metrics


def kept_metrics(params: Params) -> dict[str, float] | None:
    """The metrics of the dataset that is there, where a colleague pulled it without its images.

    None where there are images, or no dataset of these parameters.
    """
    record, metrics = (Path(f"results/download/{name}.json") for name in ("run", "metrics"))
    images, dataset = Path(params.data.path), Path("data/dataset.safetensors")
    if any(p.name != "README.md" and not p.name.startswith(".") for p in images.glob("*")):
        return None
    if not all(file.is_file() for file in (record, metrics, dataset)):
        return None
    load_dataset(dataset, ())  # refuses a damaged file
    before, now = read_json(record)["params"], flatten(params)
    if any(before.get(k) != v for k, v in now.items() if k == "seed" or k.startswith("data.")):
        return None
    print(
        f"note: {images} holds no images, so {dataset} stays as it was made from them. "
        "docs/sharing.md says how to share the images, too",
        file=sys.stderr,
    )
    return dict(read_json(metrics))


if __name__ == "__main__":
    sys.exit(entry("download", run))
