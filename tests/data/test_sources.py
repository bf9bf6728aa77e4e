import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toys import replace

from edgeke.data import sources
from edgeke.data.sources import LabelledImages
from edgeke.device.decode import open_picture
from edgeke.errors import InputError
from edgeke.params import Data, Source

FOLDER = Source(
    source="image_folder",
    image_size=8,
    channels=3,
    fit="exact",
    validation=0.2,
    calibration=0.2,
    test=0.2,
)


def data(path: Path, bits: int = 16, **changes: object) -> Data:
    return replace(Data(str(path), bits, None, 200), **changes)


def read_source(source: Source, path: Path, bits: int = 16, **changes: object) -> LabelledImages:
    return sources.read_source(source, data(path, bits, **changes))


def pixels(labelled: LabelledImages) -> np.ndarray:
    return np.stack([labelled.images[n] for n in range(len(labelled.images))])


def paint(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("bolt", "nut")):
        for i in range(4):
            paint(tmp_path / name / f"{i}.png", 100 * label + i)
    return tmp_path


def test_one_folder_is_read_in_class_order(folder: Path):
    labelled = read_source(FOLDER, folder)
    assert labelled.classes == ("bolt", "nut")
    assert labelled.labels.tolist() == [0] * 4 + [1] * 4
    assert pixels(labelled)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert labelled.train == 8


def test_train_and_test_folders_keep_their_split(tmp_path: Path):
    for part, count in (("train", 4), ("test", 2)):
        for name in ("bolt", "nut"):
            for i in range(count):
                paint(tmp_path / part / name / f"{i}.png", i)
    labelled = read_source(replace(FOLDER, test=None), tmp_path)
    assert (labelled.train, len(labelled.labels)) == (8, 12)
    (tmp_path / "test" / "washer").mkdir()
    with pytest.raises(InputError, match="only one of them: washer"):
        read_source(replace(FOLDER, test=None), tmp_path)


def test_a_class_may_be_called_train(folder: Path):
    for i in range(4):
        paint(folder / "train" / f"{i}.png", 7 + i)
    assert read_source(FOLDER, folder).classes == ("bolt", "nut", "train")


def test_grey_and_resized(folder: Path):
    paint(folder / "nut" / "large.png", 50, (20, 12))
    source = replace(FOLDER, channels=1, fit="crop")
    assert pixels(read_source(source, folder)).shape == (9, 1, 8, 8)


@pytest.mark.parametrize("bits", [12, 16])
def test_pictures_of_sixteen_bits_keep_the_upper_eight(folder: Path, bits: int):
    gradient = np.linspace(0, 2**bits - 1, 64).reshape(8, 8).astype(np.uint16)
    for name in ("nut", "bolt"):
        Image.fromarray(gradient).save(folder / name / "xray.png")
    labelled = read_source(replace(FOLDER, channels=1), folder, bits)
    assert (
        labelled.images[-1 % len(labelled.images)][0].ravel().tolist()
        == (gradient >> bits - 8).ravel().tolist()
    )
    assert labelled.bits == bits
    assert labelled.notes == ()


def test_twelve_bits_taken_for_sixteen_are_reported(folder: Path):
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "nut" / "xray.png")
    labelled = read_source(replace(FOLDER, channels=1), folder)
    assert re.search(
        "no 16-bit picture has a value above 4000.* -S data.bits=12", labelled.notes[0]
    )
    with pytest.raises(InputError, match=r"xray\.png has values up to 4000, .*the 10 bits"):
        read_source(replace(FOLDER, channels=1), folder, 10)


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("bolt", "nut"):
            for i in range(4):
                paint(tmp_path / part / name / f"{i}.TIFF", i)
    paint(tmp_path / "val" / "nut" / "0.png", 1)
    paint(tmp_path / "train" / "stray.png", 1)
    paint(tmp_path / "test" / "nut" / "more" / "0.png", 1)
    for name in ("a.gif", "b.gif", "LICENSE", ".DS_Store"):
        (tmp_path / "train" / "nut" / name).write_bytes(b"")
    labelled = read_source(replace(FOLDER, test=None), tmp_path)
    assert labelled.notes == (
        f"left out of {tmp_path}: 1 beside train/ and test/ (such as val), "
        "1 beside class folders (such as train/stray.png), "
        "1 hidden or the system's (such as train/nut/.DS_Store), "
        "1 ending in nothing (such as train/nut/LICENSE), "
        "2 ending in .gif (such as train/nut/a.gif), "
        "1 below class folders (such as test/nut/more)",
    )


def test_a_misfit_is_named_with_its_size_and_the_way_out(folder: Path):
    paint(folder / "nut" / "large.png", 50, (20, 12))
    with pytest.raises(InputError, match=r"large\.png is 20x12, not 8x8.*fit: crop"):
        read_source(FOLDER, folder)


def test_a_corrupt_image_is_named(folder: Path):
    (folder / "nut" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError, match=r"nut/bad\.png cannot be read as an image"):
        read_source(FOLDER, folder)


def test_all_corrupt_images_are_named_at_once(folder: Path):
    for number in range(20):
        (folder / "bolt" / f"bad{number:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError) as caught:
        read_source(FOLDER, folder)
    assert str(caught.value).startswith("20 of 28 pictures cannot be used:\n")
    assert all(f"bolt/bad{number:02}.png cannot" in str(caught.value) for number in range(20))


def test_ctrl_c_stops_reading(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(300):
        paint(folder / "nut" / f"{number}.png", 1)
    opened = []

    def slow(file: Path, *rest: object) -> Image.Image:
        opened.append(file)
        if len(opened) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return open_picture(file, *rest)

    monkeypatch.setattr("edgeke.data.sources.open_picture", slow)
    with pytest.raises(KeyboardInterrupt):
        read_source(FOLDER, folder)
    assert len(opened) < 100


def test_missing_empty_and_lonely_classes(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="not a folder"):
        read_source(FOLDER, folder / "nowhere")
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(InputError, match="no class folders"):
        read_source(FOLDER, empty)
    empty.rmdir()
    for file in (folder / "nut").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"(?s)class folders hold no images .*nut"):
        read_source(FOLDER, folder)
    (folder / "nut").rmdir()
    with pytest.raises(InputError, match=r"only one class \(bolt\)"):
        read_source(FOLDER, folder)


def test_cifar_offline_says_what_to_do(tmp_path: Path, monkeypatch):
    from torchvision import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets, "CIFAR100", unreachable)
    with pytest.raises(InputError, match=r"cifar100 could not be downloaded.*image_folder"):
        read_source(replace(FOLDER, source="cifar100", test=None), tmp_path)


def test_cifar_is_read_as_torchvision_gives_it(tmp_path: Path, monkeypatch):
    from torchvision import datasets

    def stored(folder: Path, train: bool, download: bool) -> SimpleNamespace:
        count = 6 if train else 2
        pixels = np.full((count, 8, 8, 3), (1, 2, 3), np.uint8)
        return SimpleNamespace(data=pixels, targets=[0, 1] * (count // 2), classes=("a", "b"))

    monkeypatch.setattr(datasets, "CIFAR10", stored)
    labelled = read_source(replace(FOLDER, source="cifar10", test=None), tmp_path)
    assert pixels(labelled).shape == (8, 3, 8, 8)
    assert labelled.images[0][:, 0, 0].tolist() == [1, 2, 3]
    assert labelled.train == 6
