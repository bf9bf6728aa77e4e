"""Where labelled images come from: packages, torchvision's downloads, a folder."""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from edgeke.device.decode import BITS, fit_picture, open_picture
from edgeke.errors import InputError
from edgeke.files import scratch_array
from edgeke.params import Source

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 `[N, C, H, W]`, labels int64 `[N]` and the names of the classes.

    Images may be mapped from a temporary file.
    The first `train` images may be split further; the others are the source's own test split
    (none when `train` equals N). `names` of the images, where they have any, are their files.
    `bits`: significant bits of 16-bit pictures. `notes` are sentences for the user.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    train: int
    names: tuple[str, ...] = ()
    bits: int = BITS
    notes: tuple[str, ...] = ()


def read_source(source: Source, path: Path, bits: int = BITS) -> LabelledImages:
    """Read the source that the profile names.

    `path` is the folder of `image_folder`, `bits` are the significant bits of its 16-bit pictures.
    Errors: InputError for a missing or empty class folder, a corrupt or mis-sized image (named),
    fewer than two classes, a download that fails.
    """
    labelled = SOURCES[source.source](source, path, bits)
    if len(labelled.classes) < 2:
        raise InputError(
            f"source {source.source} has only one class ({', '.join(labelled.classes)}); a "
            "classifier needs at least two class folders"
        )
    return labelled


def _digits(source: Source, path: Path, bits: int) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 grey levels)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([_fit(Image.fromarray(image), source, bits, "digits") for image in grey])
    return LabelledImages(
        images, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)), len(images)
    )


def _cifar(source: Source, path: Path, bits: int) -> LabelledImages:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) as torchvision downloads and verifies it."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if source.source == "cifar10" else datasets.CIFAR100
    folder = Path("data/downloads")
    parts = []
    for train in (True, False):
        try:
            parts.append(kind(folder, train=train, download=True))
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
            raise InputError(
                f"{source.source} could not be downloaded and verified ({error}). With a "
                f"connection run again; offline, put torchvision's archive into {folder}, or lay "
                "the images out as class folders and use -S profile=image_folder"
            ) from error
    pixels = np.concatenate([part.data for part in parts])
    images = pixels.transpose(0, 3, 1, 2)
    if source.image_size != images.shape[-1] or source.channels != images.shape[1]:
        name = source.source
        images = _read_all(
            len(pixels),
            source,
            lambda number: _fit(Image.fromarray(pixels[number]), source, bits, name),
            f"scale {name}",
        )
    labels = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    return LabelledImages(
        np.ascontiguousarray(images), labels, tuple(parts[0].classes), len(parts[0].targets)
    )


def _image_folder(source: Source, path: Path, bits: int) -> LabelledImages:
    """`path/{train,test}/<class>/*`, or `path/<class>/*` when there is no own test split."""
    if not path.is_dir():
        raise InputError(
            f"data.path = {path} is not a folder; put class folders there, or point to them with "
            "-S data.path=/absolute/folder"
        )
    # A class may be called train, too: only a folder of folders is a split.
    has_parts = (path / "train").is_dir() and any(f.is_dir() for f in (path / "train").iterdir())
    parts = [path / "train", path / "test"] if has_parts else [path]
    files, labels, train = [], [], 0
    left_out: dict[str, list[Path]] = defaultdict(list)
    if has_parts:
        left_out["beside train/ and test/"] = [f for f in _visible(path) if f not in parts]
    classes = _classes(parts[0])
    for part in parts:
        if _classes(part) != classes:
            differing = sorted(set(_classes(part)) ^ set(classes))
            raise InputError(
                f"{parts[0]} and {part} must hold the same class folders; these are in only one "
                f"of them: {', '.join(differing)}"
            )
        left_out["beside class folders"] += [f for f in _visible(part) if not f.is_dir()]
        for label, name in enumerate(classes):
            pictures = []
            for file in _visible(part / name):
                if file.is_dir():
                    left_out["below class folders"].append(file)
                elif file.suffix.lower() not in _SUFFIXES:
                    left_out[f"ending in {file.suffix or 'nothing'}"].append(file)
                else:
                    pictures.append(file)
            if not pictures:
                raise InputError(
                    f"class folder {part / name} holds no images ({', '.join(sorted(_SUFFIXES))});"
                    " add some or remove the folder"
                )
            files += pictures
            labels += [label] * len(pictures)
        train = train or len(files)
    highest = [0]  # values of 16-bit pictures

    def read(number: int) -> NDArray[np.uint8]:
        picture = open_picture(files[number], source.channels)
        if picture.mode == "I;16":
            highest.append(int(np.asarray(picture).max()))
        return _fit(picture, source, bits, str(files[number]))

    images = _read_all(len(files), source, read, f"read {path}")
    notes = (*_about_left_out(path, left_out), *_about_bits(max(highest), bits))
    names = tuple(map(str, files))
    return LabelledImages(images, np.asarray(labels, np.int64), classes, train, names, bits, notes)


def _read_all(
    count: int, source: Source, read: Callable[[int], NDArray[np.uint8]], description: str
) -> NDArray[np.uint8]:
    """Images number 0 to `count` - 1, mapped from a temporary file.

    Read by a thread per core: Pillow decodes and scales without Python's lock. Of several images
    that cannot be read, the first one's error is raised.
    """
    side = source.image_size
    images: NDArray[np.uint8] = scratch_array((count, source.channels, side, side), np.uint8)

    def put(number: int) -> None:
        images[number] = read(number)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(put, range(count))
        for _ in tqdm(done, desc=description, total=count, unit="image", mininterval=1):
            pass
    finally:  # also after Ctrl-C: only what has begun is finished
        pool.shutdown(cancel_futures=True)
    return images


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.name[0] != ".")


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; it must hold one folder per class")
    names = tuple(child.name for child in _visible(folder) if child.is_dir())
    if not names:
        raise InputError(
            f"{folder} holds no class folders; put the images of each class into a folder of its "
            "name (queued and --temp runs work in a copy: give data.path as an absolute path)"
        )
    return names


def _about_left_out(path: Path, left_out: Mapping[str, list[Path]]) -> list[str]:
    """One sentence that counts by reason what was not read, with an example of each."""
    reasons = [
        f"{len(files)} {reason} (such as {files[0].relative_to(path)})"
        for reason, files in left_out.items()
        if files
    ]
    return [f"left out of {path}: {', '.join(reasons)}"] if reasons else []


def _about_bits(highest: int, bits: int) -> list[str]:
    """A sentence where 16-bit pictures use less than a quarter of the range they could."""
    if not highest or highest >> (bits - 2):
        return []
    used = max(8, highest.bit_length())
    return [
        f"no 16-bit picture has a value above {highest}, of {2**bits - 1}: they are read nearly "
        f"black. If the camera gives {used} bits, use -S data.bits={used}"
    ]


def _fit(picture: Image.Image, source: Source, bits: int, name: str) -> NDArray[np.uint8]:
    """One picture as uint8 `[C, H, W]` of the profile's size."""
    side = source.image_size
    if source.fit == "exact" and picture.size != (side, side):
        raise InputError(
            f"{name} is {picture.size[0]}x{picture.size[1]}, not {side}x{side}; resize it, or set "
            "`fit: resize` in the profile's data section to scale and crop every image"
        )
    return fit_picture(picture, (side, side, source.channels), bits, name).transpose(2, 0, 1)


def _elpv(source: Source, path: Path, bits: int) -> LabelledImages:
    """2,624 electroluminescence pictures of solar cells (Deitsch et al. 2019), 300x300.

    As the package elpv-dataset (CC BY-NC-SA 4.0) brings them. A cell whose defect probability its
    experts put at two thirds or more is `defective`, the others are `functional`.
    """
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or package.origin is None:
        raise InputError(
            "source elpv reads the package elpv-dataset, which is not installed; run "
            "`scripts/setup requirements-demo.txt`"
        )
    folder = Path(package.origin).parent / "data"
    rows = [row.split() for row in (folder / "labels.csv").read_text().splitlines()]
    files = [folder / name for name, *_ in rows]
    labels = np.asarray([float(probability) < 0.5 for _, probability, *_ in rows], np.int64)

    def read(number: int) -> NDArray[np.uint8]:
        picture = open_picture(files[number], source.channels)
        return _fit(picture, source, bits, str(files[number]))

    images = _read_all(len(files), source, read, "read elpv-dataset")
    names = tuple(map(str, files))
    return LabelledImages(images, labels, ("defective", "functional"), len(files), names)


SOURCES: dict[str, Callable[[Source, Path, int], LabelledImages]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "image_folder": _image_folder,
    "elpv": _elpv,
}
