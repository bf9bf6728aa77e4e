"""Where labelled images come from: scikit-learn's digits, CIFAR through torchvision, a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from edgeke.errors import InputError
from edgeke.params import Source

__all__ = ["SOURCES", "LabelledImages", "read_source"]

_Bomb = Image.DecompressionBombError
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 `[N, C, H, W]`, labels int64 `[N]` and the names of the classes.

    The first `train` images may be split further; those behind are the source's own test split
    (none when `train` equals N).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    train: int


def read_source(source: Source, path: Path) -> LabelledImages:
    """Read the source that the profile names; `path` is the folder of `image_folder`.

    Errors: InputError for a missing or empty class folder, a corrupt or mis-sized image (named),
    fewer than two classes, a download that fails.
    """
    found = SOURCES[source.source](source, path)
    if len(found.classes) < 2:
        raise InputError(
            f"source {source.source} holds only one class ({', '.join(found.classes)}); a "
            "classifier needs at least two class folders"
        )
    return found


def _digits(source: Source, path: Path) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 grey levels)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([_to_array(Image.fromarray(image), source, "digits") for image in grey])
    return LabelledImages(
        images, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)), len(images)
    )


def _cifar(source: Source, path: Path) -> LabelledImages:
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
        images = np.stack(
            [_to_array(Image.fromarray(image), source, source.source) for image in tqdm(pixels)]
        )
    labels = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    return LabelledImages(
        np.ascontiguousarray(images), labels, tuple(parts[0].classes), len(parts[0])
    )


def _image_folder(source: Source, path: Path) -> LabelledImages:
    """`path/{train,test}/<class>/*`, or `path/<class>/*` when there is no own test split."""
    if not path.is_dir():
        raise InputError(
            f"data.path = {path} is not a folder; put class folders there, or point to them with "
            "-S data.path=/absolute/folder"
        )
    # A class may be called train, too: only a folder of folders is a split.
    train_folder = path / "train"
    has_parts = train_folder.is_dir() and any(child.is_dir() for child in train_folder.iterdir())
    parts = [path / "train", path / "test"] if has_parts else [path]
    files, labels, classes, train = [], [], _classes(parts[0]), 0
    for part in parts:
        if part is not parts[0] and _classes(part) != classes:
            differing = sorted(set(_classes(part)) ^ set(classes))
            raise InputError(
                f"{parts[0]} and {part} must hold the same class folders; these stand in only one "
                f"of them: {', '.join(differing)}"
            )
        for label, name in enumerate(classes):
            found = sorted(
                file
                for file in (part / name).iterdir()
                if file.suffix.lower() in _SUFFIXES and file.name[0] != "."
            )
            if not found:
                raise InputError(
                    f"class folder {part / name} holds no images ({', '.join(sorted(_SUFFIXES))});"
                    " add some or remove the folder"
                )
            files += found
            labels += [label] * len(found)
        train = train or len(files)
    with tqdm(files, desc=f"read {path}", unit="image", mininterval=1) as bar:
        images = np.stack([_read_image(file, source) for file in bar])
    return LabelledImages(images, np.asarray(labels, np.int64), classes, train)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; it must hold one folder per class")
    names = tuple(sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] != "."))
    if not names:
        raise InputError(
            f"{folder} holds no class folders; put the images of each class into a folder of its "
            "name (queued and --temp runs work in a copy: give data.path as an absolute path)"
        )
    return names


def _read_image(file: Path, source: Source) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return _to_array(ImageOps.exif_transpose(image), source, str(file))
    except InputError:
        raise
    except (UnidentifiedImageError, SyntaxError, ValueError, OSError, _Bomb) as error:
        raise InputError(
            f"{file} cannot be read as an image ({error}); replace or remove it"
        ) from error


def _to_array(image: Image.Image, source: Source, name: str) -> NDArray[np.uint8]:
    """One image as uint8 `[C, H, W]` of the profile's size."""
    size = (source.image_size, source.image_size)
    if image.mode.startswith("I;16"):  # inspection cameras; Pillow itself would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits per pixel; convert it to 8 or 16 bits")
    if image.size != size:
        if source.fit == "exact":
            raise InputError(
                f"{name} is {image.size[0]}x{image.size[1]}, not {size[0]}x{size[1]}; resize it, "
                "or set `fit: resize` in the profile's data section to scale and crop every image"
            )
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    array = np.asarray(image.convert("L" if source.channels == 1 else "RGB"), np.uint8)
    return array[None] if source.channels == 1 else array.transpose(2, 0, 1)


SOURCES: dict[str, Callable[[Source, Path], LabelledImages]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "image_folder": _image_folder,
}
