"""The paper's own layout as its authors ran it, in PyTorch's eager mode, against the one file."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeke.campaign.pieces import read_network
from edgeke.data.dataset import Split
from edgeke.device.policy import OperatingPoint
from edgeke.device.session import open_session
from edgeke.graph.runner import channels_last
from edgeke.learning.checkpoints import Preprocessing
from edgeke.networks.branchynet import BranchyNet

__all__ = ["STEP", "THRESHOLDS", "EagerCascade", "compare_with_published"]

STEP = "distance.wasserstein"  # of the campaign: the paper's layout under the paper's distance
THRESHOLDS = (0.96, 0.97, 0.98)  # of the published code, on the largest probability
_TIMED = 200
_WARM_UP = 5


class EagerCascade:
    """A trained network of three exits, one image at a time, left where it is sure enough."""

    def __init__(self, network: BranchyNet, preprocessing: Preprocessing) -> None:
        self.network = network.eval()
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(preprocessing.mean).reshape(shape)
        self.std = torch.tensor(preprocessing.std).reshape(shape)

    @torch.inference_mode()
    def answer(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """Label and exit of one uint8 image `[C, H, W]`."""
        features: Tensor = (torch.from_numpy(image)[None].float() / 255 - self.mean) / self.std
        start, last = 0, len(self.network.attached) - 1
        for exit, end in enumerate(self.network.attached):
            features = self.network.through(features, start, end)
            probabilities = self.network.exits[exit](features).softmax(-1)
            confidence, label = probabilities.max(-1)
            if exit == last or confidence.item() > THRESHOLDS[exit]:
                break
            start = end
        return int(label), exit


def compare_with_published(
    weights: Path, test: Split, model: Path, point: OperatingPoint
) -> dict[str, Any]:
    """Accuracy, exits and mean latency of the published way, and of ours at `point`, in one run.

    `weights` is the stem of the step `STEP`, `model` the one file; one thread, every image of the
    first 200 answered by both in turn.
    """
    network, preprocessing, _ = read_network(weights)
    published, session = EagerCascade(network, preprocessing), open_session(model, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        answers = [published.answer(image) for image in test.images]
        labels, exits = np.array(answers).T
        fixed = {
            "thresholds": np.asarray(point.thresholds, np.float32),
            "votes": np.asarray(point.votes, np.float32),
        }
        shown = channels_last(test.images[:_TIMED])
        taken: dict[str, list[float]] = {"published": [], "ours": []}
        for turn in range(-_WARM_UP, len(shown)):
            number = abs(turn)
            calls = [
                ("published", lambda n=number: published.answer(test.images[n])),
                ("ours", lambda n=number: session.run(None, {"image": shown[n : n + 1], **fixed})),
            ]
            for name, call in calls if turn % 2 else reversed(calls):
                started = time.perf_counter()
                call()
                if turn >= 0:
                    taken[name].append((time.perf_counter() - started) * 1e3)
    finally:
        torch.set_num_threads(threads)
    mean = {name: float(np.mean(values)) for name, values in taken.items()}
    return {
        "thresholds": THRESHOLDS,
        "accuracy": float((labels == test.labels).mean()),
        "exit_shares": (np.bincount(exits, minlength=len(THRESHOLDS)) / len(exits)).tolist(),
        "latency_ms_mean": mean["published"],
        "own_latency_ms_mean": mean["ours"],
        "own_point": point.name,
        "speedup": mean["published"] / mean["ours"],
        "images_timed": len(shown),
    }
