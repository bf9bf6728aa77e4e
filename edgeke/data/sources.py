"""Where labelled images come from: packages, torchvision's downloads, the user's own pictures."""

import hashlib
import importlib.util
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from edgeke.data.listing import Listing, list_pictures, listed
from edgeke.data.pixels import Pixels, Stored
from edgeke.data.quotas import check_enough
from edgeke.device.decode import BITS, fit_picture, open_picture
from edgeke.errors import InputError
from edgeke.params import Data, Source

# What a crop drops of a typical picture is said from here on.
_MUCH = 0.1


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 `[N]` of `[C, H, W]`, labels int64 `[N]` and the names of the classes.

    The first `train` images may be split further; the others are the source's own test split
    (none when `train` equals N). `names` of the images, where they have any, are their files.
    `bits`: significant bits of 16-bit pictures. `notes` are sentences for the user. The user's own
    pictures have a `listing`, which says more, and `digests` `[N]`, SHA-256 of their files.
    """

    images: Pixels
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    train: int
    names: tuple[str, ...] = ()
    bits: int = BITS
    notes: tuple[str, ...] = ()
    listing: Listing | None = None
    digests: tuple[str, ...] = ()


def read_source(source: Source, data: Data) -> LabelledImages:
    """Read the source that the profile names; the user's own pictures as `data` says.

    Whatever can be checked without pixels is checked before the first picture is decoded. Errors:
    InputError for whatever is wrong with folders, names or a CSV, too few pictures of a class,
    damaged or mis-sized pictures (all named), fewer than two classes, a download that fails.
    """
    if source.source in PACKAGED:
        return PACKAGED[source.source](source)
    listing = list_pictures(source.source, data)
    if len(listing.classes) < 2:
        raise InputError(
            f"source {source.source} has only one class ({', '.join(listing.classes)}); a "
            "classifier needs at least two"
        )
    check_enough(listing, source)
    return _read_pictures(listing, source, data)


def _read_pictures(listing: Listing, source: Source, data: Data) -> LabelledImages:
    highest = [0]  # values of 16-bit pictures
    count = len(listing.files)
    sizes: list[tuple[int, int]] = [(0, 0)] * count
    digests = [""] * count

    def read(number: int) -> NDArray[np.uint8]:
        file = listing.files[number]
        picture = open_picture(file, source.shape, source.fit, data.max_megapixels)
        sizes[number] = picture.info["size"]
        with file.open("rb") as opened:
            digests[number] = hashlib.file_digest(opened, "sha256").hexdigest()
        if picture.mode == "I;16":
            highest.append(int(np.asarray(picture).max()))
        return _fit(picture, source, data.bits, str(file))

    images = _read_all(count, source, read, f"read {data.path}")
    notes = (
        *listing.notes,
        *_about_bits(max(highest), data.bits),
        *_about_shape(sizes, source),
    )
    train = count - listing.splits.count("test")
    return LabelledImages(
        images,
        listing.labels,
        listing.classes,
        train,
        listing.names,
        data.bits,
        notes,
        listing,
        tuple(digests),
    )


def _read_all(
    count: int, source: Source, read: Callable[[int], NDArray[np.uint8]], description: str
) -> Stored:
    """Images number 0 to `count` - 1.

    Read by a thread per core: Pillow decodes and scales without Python's lock. Errors: InputError
    that names all images that cannot be read.
    """
    height, width, channels = source.shape
    images = Stored(count, (channels, height, width))
    faults: dict[int, InputError] = {}

    def put(number: int) -> None:
        try:
            images[number] = read(number)
        except InputError as error:
            faults[number] = error

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        done = pool.map(put, range(count))
        for _ in tqdm(done, desc=description, total=count, unit="image", mininterval=1):
            pass
    finally:  # also after Ctrl-C: only what has begun is finished
        pool.shutdown(cancel_futures=True)
    if len(faults) == 1:
        raise next(iter(faults.values()))
    if faults:
        words = listed(str(faults[number]) for number in sorted(faults))
        raise InputError(f"{len(faults)} of {count} pictures cannot be used:{words}")
    return images


def _about_bits(highest: int, bits: int) -> list[str]:
    """A sentence where 16-bit pictures use less than a quarter of the range they could."""
    if not highest or highest >> (bits - 2):
        return []
    used = max(8, highest.bit_length())
    return [
        f"no 16-bit picture has a value above {highest}, of {2**bits - 1}: they are read nearly "
        f"black. If the camera gives {used} bits, use -S data.bits={used}"
    ]


def _about_shape(sizes: list[tuple[int, int]], source: Source) -> list[str]:
    """What share of a typical picture is dropped by a crop, or empty with `pad`."""
    height, width, _ = source.shape
    ratios = [(size[0] / size[1]) / (width / height) for size in sizes]  # wider than needed: > 1
    lost = statistics.median(1 - min(ratio, 1 / ratio) for ratio in ratios)
    typical = sizes[ratios.index(statistics.median_low(ratios))]
    which = f"a typical picture ({typical[0]}x{typical[1]}, {width}x{height} are taken)"
    if lost < _MUCH or source.fit not in ("crop", "pad"):
        return []
    if source.fit == "pad":
        return [f"fit: pad leaves {lost:.0%} of the image black around {which}; see image_size"]
    return [
        f"fit: crop drops {lost:.0%} of {which}. If that may matter, use fit: pad or "
        "stretch, or an image_size [height, width] of their shape, such as "
        f"{_alike(typical, height * width)}"
    ]


def _alike(size: tuple[int, int], area: int) -> list[int]:
    """Height and width of such a shape and about such an area, multiples of 8."""
    factor = (area / (size[0] * size[1])) ** 0.5
    return [max(8, 8 * round(side * factor / 8)) for side in (size[1], size[0])]


def _fit(picture: Image.Image, source: Source, bits: int, name: str) -> NDArray[np.uint8]:
    """One picture as uint8 `[C, H, W]` of the profile's size."""
    return fit_picture(picture, source.shape, bits, name, source.fit).transpose(2, 0, 1)


def _digits(source: Source) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits (UCI, 8x8, 17 grey levels)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([_fit(Image.fromarray(image), source, BITS, "digits") for image in grey])
    return LabelledImages(
        images, bunch.target.astype(np.int64), tuple(map(str, bunch.target_names)), len(images)
    )


def _cifar(source: Source) -> LabelledImages:
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
    images: Pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if source.shape != pixels.shape[1:]:
        name = source.source
        images = _read_all(
            len(pixels),
            source,
            lambda number: _fit(Image.fromarray(pixels[number]), source, BITS, name),
            f"scale {name}",
        )
    labels = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    return LabelledImages(images, labels, tuple(parts[0].classes), len(parts[0].targets))


def _elpv(source: Source) -> LabelledImages:
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
        picture = open_picture(files[number], source.shape, source.fit)
        return _fit(picture, source, BITS, str(files[number]))

    images = _read_all(len(files), source, read, "read elpv-dataset")
    names = tuple(map(str, files))
    return LabelledImages(images, labels, ("defective", "functional"), len(files), names)


# Sources that never change: their splits are drawn with the seed.
PACKAGED: dict[str, Callable[[Source], LabelledImages]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "elpv": _elpv,
}
