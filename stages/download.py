"""The source's images -> data/dataset.safetensors."""

import sys
from pathlib import Path

from edgeke.data.dataset import save_dataset
from edgeke.data.sources import read_source
from edgeke.download import download
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    source = params.profile.data
    labelled = read_source(source, Path(params.data.path), params.data.bits)
    dataset, metrics, notes = download(labelled, source, params.profile_name, params.seed)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    save_dataset(dataset, Path("data/dataset.safetensors"))
    return metrics


if __name__ == "__main__":
    sys.exit(entry("download", run))
