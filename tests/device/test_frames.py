"""What cameras give, against what the pipeline reads from a file of the same picture.

docs/device.md has the same numbers.
"""

import numpy as np
import pytest
from frames import as_nv12, as_yuyv
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from edgeke.device.decode import fit_picture
from edgeke.device.frames import fit_frame, nv12_to_rgb, yuyv_to_rgb
from edgeke.errors import InputError

SHAPES = [(224, 224, 3), (128, 128, 3), (96, 160, 3), (32, 32, 3), (33, 57, 3), (600, 600, 3)]


def ours(picture: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return fit_picture(Image.fromarray(picture), shape, 16, "picture")


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.fixture(params=["china.jpg", "flower.jpg"])
def photo(request) -> np.ndarray:
    return np.asarray(load_sample_image(request.param))[:426]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_frame_is_scaled_as_a_file_is(photo, shape):
    off = difference(fit_frame(photo, shape), ours(photo, shape))
    assert off.max() <= 2
    assert (off > 0).mean() < 0.01
    blue_first = fit_frame(photo[..., ::-1], shape)[..., ::-1]
    assert np.array_equal(blue_first, fit_frame(photo, shape))
    grey = np.asarray(Image.fromarray(photo).convert("L"))
    assert difference(fit_frame(grey, shape), ours(grey, (*shape[:2], 1))[..., 0]).max() <= 2
    upright = np.ascontiguousarray(photo.transpose(1, 0, 2))
    off = difference(fit_frame(upright, shape), ours(upright, shape))
    assert np.percentile(off, 99) <= 1
    assert (off > 0).mean() < 0.25


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_are_stretched_and_padded(photo, shape):
    height, width, _ = shape
    picture, bicubic = Image.fromarray(photo), Image.Resampling.BICUBIC
    expected = np.asarray(picture.resize((width, height), bicubic))
    assert difference(fit_frame(photo, shape, "stretch"), expected).mean() < 0.3
    padded = fit_frame(photo, shape, "pad")
    inside = ImageOps.contain(picture, (width, height), bicubic)
    expected = Image.new("RGB", (width, height))
    expected.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
    assert difference(padded, np.asarray(expected)).mean() < 0.3


def test_the_size_of_the_model_changes_nothing(photo):
    for fit in ("crop", "pad", "stretch", "exact"):
        assert np.array_equal(fit_frame(photo, photo.shape, fit), photo)


@pytest.mark.parametrize(
    ("pack", "unpack", "mean", "most"),
    [(as_nv12, nv12_to_rgb, 1.2, 8), (as_yuyv, yuyv_to_rgb, 0.5, 3)],
)
def test_raw_frames_are_as_near_as_thinned_colours_allow(photo, pack, unpack, mean, most):
    height, width = photo.shape[:2]
    frame = pack(photo)
    pixels = unpack(frame, height, width)
    assert np.array_equal(unpack(frame.tobytes(), height, width), pixels)
    for shape in SHAPES[1:4]:
        off = difference(fit_frame(pixels, shape), ours(photo, shape))
        assert off.mean() < mean
        assert np.percentile(off, 99) <= most


def test_greys_survive_yuv(photo):
    grey = np.repeat(np.asarray(Image.fromarray(photo).convert("L"))[..., None], 3, -1)
    for pack, unpack in ((as_nv12, nv12_to_rgb), (as_yuyv, yuyv_to_rgb)):
        assert difference(unpack(pack(grey), *photo.shape[:2]), grey).max() <= 2


def test_opencv_agrees_on_raw_frames_and_differs_in_scaling(photo):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    height, width = photo.shape[:2]
    for frame, code, unpack in (
        (as_nv12(photo), cv2.COLOR_YUV2RGB_NV12, nv12_to_rgb),
        (as_yuyv(photo), cv2.COLOR_YUV2RGB_YUYV, yuyv_to_rgb),
    ):
        expected = cv2.cvtColor(frame, code)
        assert difference(unpack(frame, height, width), expected).max() <= 1
    part = photo[:, (width - height) // 2 :][:, :height]
    for side in (224, 128, 32):
        expected = ours(photo, (side, side, 3))
        area = difference(cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA), expected)
        linear = difference(cv2.resize(part, (side, side)), expected)
        assert 0.3 < area.mean() < 2.5
        assert 1.5 < linear.mean() / area.mean() < 9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_frame(np.zeros((4, 4), np.float32), (2, 2, 1)), "a frame is float32"),
        (lambda: fit_frame(np.zeros((0, 4), np.uint8), (2, 2, 1)), r"of shape \[0, 4\]"),
        (lambda: fit_frame(np.zeros((4, 6), np.uint8), (2, 2, 1), "exact"), "is 6 x 4, and the mo"),
        (lambda: fit_frame(np.zeros((4, 6), np.uint8), (2, 2, 1), "cut"), "fit = 'cut' must be"),
        (lambda: nv12_to_rgb(bytes(20), 4, 4), "20 values .* no NV12 frame of 4 x 4, which has 24"),
        (lambda: nv12_to_rgb(bytes(13), 3, 3), "no NV12 frame of 3 x 3"),
        (lambda: yuyv_to_rgb(np.zeros(32, np.int16), 4, 4), "type int16 are no YUYV frame"),
    ],
)
def test_what_is_no_frame_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
