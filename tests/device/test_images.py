import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgeke.device.decode import open_picture, read_image
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
    assert check_images([image, Image.fromarray(image)], GREY).shape == (2, *GREY)
    assert check_images(blank(0, 8, 6, 3), COLOUR).shape == (0, *COLOUR)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB", "CMYK", "YCbCr", "HSV"])
def test_a_pillow_picture_of_any_mode_is_converted(mode):
    """The indices of a palette, or YCbCr values, are no pixels."""
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(8, 6) * 5).convert(mode)
    assert np.array_equal(check_image(picture, COLOUR), np.asarray(picture.convert("RGB")))
    assert np.array_equal(check_image(picture, GREY)[..., 0], np.asarray(picture.convert("L")))


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "P"])
def test_a_picture_with_transparency_is_laid_over_white(mode):
    picture = Image.new("LA", (6, 8), (0, 0))
    picture.paste((200, 255), (0, 0, 3, 8))
    if mode != "La":
        picture = picture.convert("RGBA")
    picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
    for shape in (GREY, COLOUR):
        pixels = check_image(picture, shape)
        assert (pixels[:, :3] == 200).all()
        assert (pixels[:, 3:] == 255).all()


def test_blue_first_is_turned_for_arrays_alone():
    red = blank(8, 6, 3)
    red[..., 0], red[..., 1] = 200, 30
    picture = Image.fromarray(red)
    for images in ([red[..., ::-1]] * 2, np.stack([red[..., ::-1]] * 2), [picture, red[..., ::-1]]):
        assert np.array_equal(check_images(images, COLOUR, "bgr"), [red, red])
    assert np.array_equal(check_image(red, COLOUR), red)
    assert np.array_equal(
        check_image(picture.getchannel(0), GREY, order="bgr")[..., 0], red[..., 0]
    )


@pytest.mark.parametrize(
    ("image", "shape", "words"),
    [
        (blank(8, 6, kind=np.float32), GREY, r"float32, not uint8; .*rint\(255 \* image\)"),
        (np.full((8, 6), np.nan), GREY, "float64, not uint8; it holds values that are NaN"),
        (blank(8, 6, kind=np.uint16), GREY, r"uint16, not uint8; convert: \(image >> 8\)"),
        ("picture.png", GREY, "not uint8; give pixels from 0 to 255"),
        ([[1.0, 2.0], [3.0]], GREY, "cannot be read as an array"),
        (
            blank(9, 8),
            GREY,
            r"shape \[9, 8\], the model takes \[8, 6, 1\].*bits and fit, which reads",
        ),
        (blank(6, 8, 3), COLOUR, "its sides are swapped: height comes first"),
        (blank(8, 6), COLOUR, r"repeat the grey channel: numpy\.repeat\(image"),
        (blank(8, 6, 4), COLOUR, r"image\[\.\.\., :3\]; the first must be red, or .*order=\"bgr\""),
        (blank(3, 8, 6), COLOUR, r"channels last: image\.transpose\(1, 2, 0\)"),
        (blank(1, 8, 6, 3), COLOUR, "use predict_batch for several"),
    ],
)
def test_what_does_not_fit_is_told_how_to(image, shape, words):
    with pytest.raises(InputError, match=words):
        check_image(image, shape)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (blank(8, 6, 3), "of a single image; use predict"),
        ([blank(8, 6, 3), blank(8, 6, 4)], r"image 1 has shape \[8, 6, 4\]"),
        (np.array(3, "u1"), "images are of type ndarray; give an array"),
        (iter([]), "give an array"),
    ],
)
def test_bad_batches_name_the_image(images, words):
    with pytest.raises(InputError, match=words):
        check_images(images, COLOUR)


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
@pytest.mark.parametrize(
    ("error", "words"),
    [(PermissionError, "may not be read by this user"), (IsADirectoryError, "is a folder")],
)
def test_the_cause_is_named_where_the_file_is_not_damaged(monkeypatch, name, error, words):
    def refuse(*_, **__):
        raise error(13, "no")

    monkeypatch.setattr("PIL.Image.open", refuse)
    monkeypatch.setattr("edgeke.device.decode.open_memmap", refuse)
    with pytest.raises(InputError, match=words):
        read_image(Path(name), GREY)


def test_training_and_device_read_the_same_pixels(tmp_path):
    from edgeke.data.sources import read_source
    from edgeke.params import Data, Source

    random = np.random.default_rng(0)
    for place, name in enumerate(("one", "two")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        pixels = random.integers(0, 256, (13, 30 + place, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
        Image.fromarray(pixels[..., 0]).save(folder / "b.jpg")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 16).save(folder / "c.png")
        Image.fromarray(pixels).convert("P").save(folder / "d.tif")
        large = Image.fromarray(pixels).resize((300, 190))
        large.save(folder / "e.jpg", exif=struct.pack("<6s2sHIHHHIHxxI", b"Exif", b"II", 42, 8, 1,
                                                      0x0112, 3, 1, 6, 0))  # fmt: skip
    files = sorted((tmp_path / "images").glob("*/*"))
    for channels, fit in itertools.product((1, 3), ("crop", "pad", "stretch")):
        source = Source("image_folder", (8, 16), channels, fit, 0.2, 0.2, 0.2)
        labelled = read_source(source, Data(str(tmp_path / "images"), 12, None, 200))
        for number, file in enumerate(files):
            found = read_image(file, source.shape, 12, fit).transpose(2, 0, 1)
            assert np.array_equal(found, labelled.images[number]), (file, fit)


def test_palette_and_one_bit_are_scaled_as_grey_is(tmp_path):
    """Pillow itself scales both by nearest neighbour: these stripes came out all white."""
    y, x = np.mgrid[:128, :128]
    grey = Image.fromarray((((x + y) % 4 < 2) * 255).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    expected = read_image(tmp_path / "grey.png", (32, 32, 1))
    assert 100 < expected.mean() < 150
    for name, picture in {"palette": grey.quantize(2), "bit": grey.convert("1")}.items():
        picture.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_image(tmp_path / f"{name}.png", (32, 32, 1)), expected), name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("hidden", [0, 255])
def test_transparency_is_laid_over_white(tmp_path, mode, hidden):
    """Whatever colour is hidden below it, the same digit on white gives the same pixels."""
    read = []
    for name, background in (("clear", (*[hidden] * 3, 0)), ("white", (255, 255, 255, 255))):
        picture = Image.new("RGBA", (32, 32), background)
        ImageDraw.Draw(picture).rectangle((12, 4, 19, 27), fill=(0, 0, 0, 255))
        picture.convert(mode).save(tmp_path / f"{name}.png")
        read.append(read_image(tmp_path / f"{name}.png", (16, 16, 3)))
    assert np.array_equal(*read)
    assert (read[0].min(), read[0].max()) == (0, 255)


@pytest.mark.parametrize(
    "tag", [b"", struct.pack("<HHId", 0x0100, 12, 1, 1.5), struct.pack("<HHIQ", 0x010F, 5, 1, 1)]
)
def test_a_turned_photo_is_upright_whatever_its_other_tags(tmp_path, tag):
    """Pillow writes EXIF again when it turns a picture, and fails on a tag of the wrong type."""
    entries = [struct.pack("<HHIHxx", 0x0112, 3, 1, 6)]
    if tag:
        data = struct.pack("<I", 8 + 2 + 24 + 4)  # values of 8 bytes follow the directory
        entries.append(tag[:8] + data)
    content = struct.pack("<H", len(entries)) + b"".join(sorted(entries)) + bytes(4) + tag[8:]
    pixels = np.zeros((40, 60), np.uint8)
    pixels[:, :20] = 255
    exif = b"Exif\0\0II*\0\x08\0\0\0" + content
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    picture = np.asarray(open_picture(tmp_path / "a.jpg", (60, 40, 1)))
    assert picture.shape == (60, 40)
    assert picture[:15].min() > 200
    assert picture[25:].max() < 50


def test_arrays_are_read_and_must_fit(tmp_path):
    np.save(tmp_path / "a.npy", blank(8, 6))
    assert read_image(tmp_path / "a.npy", GREY).shape == GREY
    with pytest.raises(InputError, match=r"a\.npy has shape \[8, 6\], the model takes"):
        read_image(tmp_path / "a.npy", COLOUR)
    with pytest.raises(InputError, match=r"none\.npy is missing"):
        read_image(tmp_path / "none.npy", GREY)


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (8, 6"),
        header("  {'descr'\n 'a':"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"),
    ],
    ids=["empty", "bracket", "indent", "huge", "object"],
)
def test_a_damaged_array_is_named(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npy cannot be read as an array"):
        read_image(tmp_path / "a.npy", GREY)


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 6), np.float32)).save(tmp_path / "deep.tiff")
    for name, words in (
        ("text.png", "cannot be read as an image"),
        ("cut.png", "cannot be read as an image"),
        ("deep.tiff", "has 32 bits per pixel"),
        ("none.png", "is missing"),
    ):
        with pytest.raises(InputError, match=rf"{name} {words}"):
            read_image(tmp_path / name, GREY)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, MemoryError])
def test_whatever_pillow_raises_names_the_file_but_a_lack_of_memory(tmp_path, monkeypatch, error):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    named = (InputError, r"a\.png cannot be read as an image \(\w+Error")
    expected, words = (MemoryError, None) if error is MemoryError else named
    with pytest.raises(expected, match=words):
        read_image(tmp_path / "a.png", GREY)


def test_without_pillow_the_remedy_is_named(tmp_path, monkeypatch):
    Image.fromarray(blank(8, 6)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"a\.png needs Pillow .*pip install pillow, or save"):
        read_image(tmp_path / "a.png", GREY)


def test_what_fit_does_to_another_shape(tmp_path):
    """A bright bar at each end of a picture four times as wide as high."""
    pixels = np.full((20, 80), 100, np.uint8)
    pixels[:, :10] = pixels[:, -10:] = 250
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def read(fit, height=16, width=16):
        return read_image(tmp_path / "a.png", (height, width, 1), 16, fit)[..., 0]

    assert read("crop").max() < 120
    assert read("stretch")[:, [0, -1]].min() > 240
    padded = read("pad")
    assert not padded[:5].any()
    assert not padded[-5:].any()
    assert padded[8, [0, -1]].min() > 240
    assert np.array_equal(read("exact", 20, 80), pixels)
    with pytest.raises(InputError, match=r"is 80x20, not 16x16; .*`fit: crop`, `pad` or `stretch`"):
        read("exact")


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path, turn, fit):
    y, x = np.mgrid[:960, :1280]
    pixels = (128 + 60 * np.sin(x / 90) + 60 * np.cos(y / 70)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "a.png", exif=exif)
    shape = (48, 64, 1)
    opened = open_picture(tmp_path / "a.jpg", shape, fit)
    assert max(opened.size) <= 320
    assert opened.info["size"] == ((1280, 960) if turn == 1 else (960, 1280))
    close = read_image(tmp_path / "a.png", shape, 16, fit).astype(int)
    found = read_image(tmp_path / "a.jpg", shape, 16, fit)
    assert np.abs(found - close).mean() < 2


def test_a_picture_above_the_limit_is_named_with_the_parameter(tmp_path):
    Image.new("L", (2000, 1500)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png has 3 megapixels .*the 2 of data\.max_megap"):
        read_image(tmp_path / "a.png", GREY, megapixels=2)


def test_pillows_own_limit_does_not_count(tmp_path, monkeypatch):
    """180 megapixels of a line scan are no attack; Pillow would refuse them."""
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.png", GREY).shape == GREY
    assert Image.MAX_IMAGE_PIXELS == 100


def test_rows_are_scaled_before_columns_whatever_pillow_prefers(tmp_path):
    """Newer versions begin with the columns of high pictures, and round to other pixels."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 100), np.uint8))
    noise.save(tmp_path / "a.png")
    bicubic = Image.Resampling.BICUBIC
    expected = noise.resize((48, 300), bicubic).resize((48, 32), bicubic)
    found = read_image(tmp_path / "a.png", (32, 48, 1), 16, "stretch")
    assert np.array_equal(found[..., 0], np.asarray(expected))


def test_a_pillow_that_is_too_old_is_told(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.delattr(Image, "Resampling")
    with pytest.raises(InputError, match=r"needs Pillow 9\.1 or newer"):
        read_image(tmp_path / "a.png", GREY)
