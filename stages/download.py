"""The source's images -> data/dataset.safetensors."""

import sys
from pathlib import Path

from edgeke.data.quotas import Cuts
from edgeke.data.sources import read_source
from edgeke.download import download
from edgeke.files import read_json, write_json
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry

# Of all profiles, since an experiment with another one must not forget them.
SPLITS = Path("results/download/splits.json")


def run(params: Params, log: Run) -> dict[str, float]:
    source, name = params.profile.data, params.profile_name
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


if __name__ == "__main__":
    sys.exit(entry("download", run))
