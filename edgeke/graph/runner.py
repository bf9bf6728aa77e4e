"""Runs segments over many images, as a batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeke.device.session import open_session

_BATCH = 16  # larger ones leave the processor's cache: twice as slow at 128x128


def segment_logits(
    segments: Sequence[Path | bytes], images: NDArray[np.uint8], threads: int
) -> NDArray[np.float32]:
    """Logits of every exit, `[E, N, K]`, for images uint8 `[N, H, W, C]`."""
    sessions = [open_session(segment, threads) for segment in segments]
    batches = []
    for start in range(0, len(images), _BATCH):
        features, logits = images[start : start + _BATCH], []
        for session in sessions:
            name = session.get_inputs()[0].name
            at_exit, *rest = session.run(None, {name: features})
            logits.append(at_exit)
            features = rest[0] if rest else features
        batches.append(np.stack(logits))
    return np.concatenate(batches, axis=1)
