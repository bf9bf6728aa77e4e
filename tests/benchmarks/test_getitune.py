from pathlib import Path

import numpy as np
from PIL import Image
from ruamel.yaml import YAML
from toys import ROOT

from benchmarks.getitune.__main__ import pictures
from edgeke import params
from edgeke.data.dataset import load_dataset
from edgeke.data.quotas import Cuts
from edgeke.data.sources import read_source
from edgeke.download import download


def test_the_peer_gets_the_files_of_our_splits(tmp_path):
    random, names = np.random.default_rng(0), ("dent", "scratch")
    for name in names:
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(random.integers(0, 256, (24, 24), np.uint8))
            picture.save(tmp_path / "source" / name / f"{number}.png")
    content = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    content["profile"], content["data"]["path"] = "steel", str(tmp_path / "source")
    content["profiles"]["steel"]["data"]["image_size"] = 16
    YAML().dump(content, tmp_path / "params.yaml")
    (tmp_path / "data").mkdir()
    loaded, file = params.parse(content), tmp_path / "data" / "dataset.safetensors"
    source = loaded.profile.data
    download(read_source(source, loaded.data), source, "steel", 0, file, Cuts())
    subsets, classes = pictures(tmp_path)
    assert classes == names
    dataset = load_dataset(file, ("train", "validation", "test"))
    for (subset, files), split in zip(subsets.items(), dataset.splits.values(), strict=True):
        assert [label for _, label in files] == split.labels.tolist(), subset
        assert all(Path(file).parent.name == names[label] for file, label in files)
    assert len({file for files in subsets.values() for file, _ in files}) == 40 - 8
