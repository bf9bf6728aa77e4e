"""Raw frames as cameras give them, made from a picture RGB `[h, w, 3]`."""

import numpy as np


def planes(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Y `[h, w]`, and U and V `[h, w, 2]`, in the range of BT.601, before chroma is thinned."""
    matrix = np.array(
        [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]
    )
    yuv = photo / 255 @ matrix.T + [16, 128, 128]
    return np.rint(yuv[..., 0]).astype(np.uint8), np.rint(yuv[..., 1:]).astype(np.uint8)


def as_nv12(photo: np.ndarray) -> np.ndarray:
    luma, chroma = planes(photo)
    height, width = luma.shape
    thin = np.rint(chroma.reshape(height // 2, 2, width // 2, 2, 2).mean((1, 3))).astype(np.uint8)
    return np.concatenate([luma, thin.reshape(height // 2, width)])


def as_yuyv(photo: np.ndarray) -> np.ndarray:
    luma, chroma = planes(photo)
    height, width = luma.shape
    thin = np.rint(chroma.reshape(height, width // 2, 2, 2).mean(2)).astype(np.uint8)
    return np.stack([luma, thin.reshape(height, width)], -1)
