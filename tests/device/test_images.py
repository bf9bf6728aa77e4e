import sys

import numpy as np
import pytest
from PIL import Image

from edgeke.device.decode import read_image
from edgeke.device.images import check_image, check_images
from edgeke.errors import InputError

GREY, COLOUR = (8, 6, 1), (8, 6, 3)


def blank(*shape: int, kind: object = np.uint8) -> np.ndarray:
    return np.zeros(shape, kind)


def test_what_fits_passes_as_it_is():
    image = np.arange(48, dtype=np.uint8).reshape(8, 6)
    assert np.array_equal(check_image(image, GREY)[..., 0], image)
    assert check_image(image[..., None], GREY).shape == GREY
    transposed = np.asfortranarray(blank(8, 6, 3))
    assert check_image(transposed, COLOUR).flags.c_contiguous
    picture = Image.fromarray(image)
    assert np.array_equal(check_image(picture, GREY)[..., 0], image)
    assert check_images([picture, image], GREY).shape == (2, *GREY)
    assert check_images(blank(0, 8, 6, 3), COLOUR).shape == (0, *COLOUR)


@pytest.mark.parametrize(
    ("image", "shape", "words"),
    [
        (blank(8, 6, kind=np.float32), GREY, r"float32, not uint8; .*rint\(255 \* image\)"),
        (np.full((8, 6), np.nan), GREY, "float64, not uint8 and holds 48 values that are NaN"),
        (blank(8, 6, kind=np.uint16), GREY, r"uint16, not uint8; convert: \(image >> 8\)"),
        (blank(8, 6, kind=bool), GREY, "bool, not uint8; give pixels from 0 to 255"),
        ("picture.png", GREY, "not uint8; give pixels"),
        (None, GREY, "object, not uint8"),
        ([[1.0, 2.0], [3.0]], GREY, "cannot be read as an array"),
        (
            blank(6, 8),
            GREY,
            r"shape \[6, 8\], the model takes \[8, 6, 1\].*fit\(picture, \(6, 8",
        ),
        (blank(8, 6), COLOUR, r"repeat the grey channel: numpy\.repeat.*, 3, axis=-1"),
        (blank(8, 6, 1), COLOUR, r"repeat the grey channel: numpy\.repeat.*, 3, axis=-1"),
        (blank(8, 6, 4), COLOUR, r"drop the alpha channel: image\[\.\.\., :3\]"),
        (blank(3, 8, 6), COLOUR, r"channels last: image\.transpose\(1, 2, 0\)"),
        (blank(8, 6, 3), GREY, r"convert it to grey.*convert\('L'\)"),
        (blank(8, 6, 2), COLOUR, "convert it to 3 channels"),
        (blank(1, 8, 6, 3), COLOUR, "use predict_batch for several"),
        (blank(5), COLOUR, "resize it"),
    ],
)
def test_what_does_not_fit_is_told_how_to(image, shape, words):
    with pytest.raises(InputError, match=words):
        check_image(image, shape)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (blank(8, 6, 3), "of a single image; use predict"),
        (blank(2, 8, 6, 3, kind=np.float32), "image 0 is float32"),
        ([blank(8, 6, 3), blank(8, 6, 4)], r"image 1 has shape \[8, 6, 4\]"),
        (blank(2, 3, 8, 6), "image 0 .*channels last"),
        (7, "images are of type int; give an array"),
        (iter([]), "give an array"),
    ],
)
def test_bad_batches_name_the_image(images, words):
    with pytest.raises(InputError, match=words):
        check_images(images, COLOUR)


def test_pictures_are_fitted_as_the_pipeline_fits_them(tmp_path):
    """The same picture gives the same pixels here and in a folder of training images."""
    from edgeke.data.sources import read_source
    from edgeke.params import Source

    random = np.random.default_rng(0)
    for place, name in enumerate(("one", "two")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        pixels = random.integers(0, 256, (13, 30 + place, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
        Image.fromarray(pixels[..., 0]).save(folder / "b.jpg")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "c.png")
    for channels in (1, 3):
        source = Source("image_folder", 8, channels, "resize", 0.2, 0.2, 0.2)
        expected = read_source(source, tmp_path / "images").images.transpose(0, 2, 3, 1)
        files = sorted((tmp_path / "images").glob("*/*"))
        found = [read_image(file, (8, 8, channels)) for file in files]
        assert np.array_equal(np.stack(found), expected)


def test_arrays_are_read_and_must_fit(tmp_path):
    np.save(tmp_path / "a.npy", blank(8, 6))
    assert read_image(tmp_path / "a.npy", GREY).shape == GREY
    with pytest.raises(InputError, match=r"a\.npy has shape \[8, 6\], the model takes"):
        read_image(tmp_path / "a.npy", COLOUR)
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "broken.npy", "empty.npy"):
        with pytest.raises(InputError, match=rf"{name} cannot be read as an array"):
            read_image(tmp_path / name, GREY)
    with pytest.raises(InputError, match=r"none\.npy is missing"):
        read_image(tmp_path / "none.npy", GREY)


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(blank(40, 40, 3)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 6), np.float32)).save(tmp_path / "deep.tiff")
    for name, words in (
        ("text.png", "cannot be read as an image"),
        ("cut.png", "cannot be read as an image"),
        ("deep.tiff", "32 bits per pixel"),
        ("none.png", "is missing"),
    ):
        with pytest.raises(InputError, match=rf"{name} {words}|{name} has {words}"):
            read_image(tmp_path / name, GREY)


def test_without_pillow_the_remedy_is_named(tmp_path, monkeypatch):
    Image.fromarray(blank(8, 6)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"a\.png needs Pillow .*pip install pillow, or save"):
        read_image(tmp_path / "a.png", GREY)
