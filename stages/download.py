"""The source's images -> data/dataset.safetensors."""

import sys
from pathlib import Path

from edgeke.data.dataset import load_dataset
from edgeke.data.quotas import Cuts
from edgeke.data.sources import PACKAGED, read_source
from edgeke.download import download
from edgeke.files import read_json, write_json
from edgeke.params import Params
from edgeke.tracking.runs import Run
from edgeke.tracking.state import flatten
from stages._entry import entry

# Of all profiles, since an experiment with another one must not forget them.
SPLITS = Path("results/download/splits.json")


def run(params: Params, log: Run) -> dict[str, float]:
    source, name = params.profile.data, params.profile_name
    if source.source not in PACKAGED and (metrics := kept_metrics(params)):
        return metrics
    known = read_json(SPLITS) if SPLITS.is_file() else {}
    cuts = Cuts.from_json(known[name]) if name in known else Cuts()
    labelled = read_source(source, params.data)
    path = Path("data/dataset.safetensors")
    metrics, notes, cuts = download(labelled, source, name, params.seed, path, cuts)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if labelled.listing is not None:
        known[name] = cuts.to_json()
    write_json(SPLITS, known)
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
