import re

import pytest
from toys import ROOT

from benchmarks import backbones
from edgeke import params
from edgeke.data.dataset import channels_last, load_dataset
from edgeke.data.quotas import Cuts
from edgeke.data.sources import read_source
from edgeke.device.classifier import Classifier
from edgeke.download import download

FOLDER, PICTURES = ROOT / "models" / "pretrained", ROOT.parent / "shared" / "data" / "neu"
CARD = (FOLDER / "README.md").read_text()
ROWS = re.findall(r"^\| (exit \d+|default point) \| ([\d.]+) % \|", CARD, re.MULTILINE)


@pytest.mark.skipif(not PICTURES.is_dir(), reason="needs ../shared: NEU's pictures")
@pytest.mark.skipif(not ROWS, reason="models/pretrained is older than scripts/pretrained")
def test_the_pretrained_model_is_as_often_right_as_its_card_says(tmp_path):
    steel, file = params.parse(backbones.steel()), tmp_path / "dataset.safetensors"
    source = steel.profile.data
    download(read_source(source, steel.data), source, "steel", steel.seed, file, Cuts())
    dataset = load_dataset(file, ("test",))
    images, labels = channels_last(dataset["test"].images), dataset["test"].labels
    assert (FOLDER / "edgeke.int8.onnx").stat().st_size < 12e6
    with Classifier(FOLDER) as classifier:
        assert classifier.classes == dataset.classes
        assert len(ROWS) == len(classifier.policy.macs) + 1
        for name, percent in ROWS:
            answer = classifier.predict
            if name != "default point":
                answer = classifier.forced(int(name.split()[1]))
            right = sum(answer(i).label == n for i, n in zip(images, labels, strict=True))
            # Another CPU may round a picture to the other side.
            assert 100 * right / len(labels) == pytest.approx(float(percent), abs=0.5), name
