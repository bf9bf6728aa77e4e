"""Runs segments over many images, as a batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.session import open_session

Floats = NDArray[np.float32]

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


def logits_through(
    segments: Sequence[Path | bytes],
    images: NDArray[np.uint8],
    after: int,
    changes: Mapping[str, Callable[[Floats], Floats]],
    threads: int,
) -> dict[str, Floats]:
    """Logits of the last exit, `[N, K]`, when features after an exit are changed, by change.

    `changes` take features `[n, C, H, W]` and return such; `images` are uint8 `[N, H, W, C]`.
    """
    sessions = [open_session(segment, threads) for segment in segments]
    names = [session.get_inputs()[0].name for session in sessions]
    answers: dict[str, list[Floats]] = {name: [] for name in changes}
    for start in range(0, len(images), _BATCH):
        features: NDArray[Any] = images[start : start + _BATCH]
        for k in range(after + 1):
            features = sessions[k].run(None, {names[k]: features})[1]
        for change, apply in changes.items():
            changed = apply(features)
            for k in range(after + 1, len(sessions)):
                at_exit, *rest = sessions[k].run(None, {names[k]: changed})
                changed = rest[0] if rest else changed
            answers[change].append(at_exit)
    return {name: np.concatenate(parts) for name, parts in answers.items()}
