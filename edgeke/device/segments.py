"""The cascade over segments: batches that shrink at every exit, and streams of answers."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.policy import Policy
from edgeke.device.scores import Score, biased, calibrated_probabilities, vote
from edgeke.device.session import open_session

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BatchAnswers:
    """The answers to a batch: `exit` `[N]` in 0..E (E = voted), `probabilities` `[N, K]`.

    `seconds` `[N]`: from the start until each answer was ready. `first_score` `[N]` is exit 0's.
    """

    exit: NDArray[np.int64]
    probabilities: Floats
    seconds: NDArray[np.float64]
    first_score: Floats


class Segments:
    """One open session per exit, with the policy's temperatures and score."""

    def __init__(self, files: Sequence[Path], policy: Policy, threads: int) -> None:
        self._sessions = [open_session(file, threads) for file in files]
        self._inputs = [session.get_inputs()[0].name for session in self._sessions]
        self._outputs = [
            [tensor.name for tensor in session.get_outputs()] for session in self._sessions
        ]
        self._temperatures = np.asarray(policy.temperatures, np.float32)[:, None]
        self.score = Score(policy.score, policy.score_weights)

    def answer(
        self,
        images: NDArray[np.uint8],
        thresholds: Sequence[float],
        votes: Sequence[float],
        bias: Sequence[float] = (),
    ) -> BatchAnswers:
        """Answer images uint8 `[N, H, W, C]` at a point's thresholds and votes `[E]`, bias `[K]`.

        After each exit only those that it was not sure of go on, so the batch costs the sum of
        what its images need.
        """
        started = time.perf_counter()
        exits, count = len(self._sessions), len(images)
        exit_of, seconds = np.full(count, exits, np.int64), np.zeros(count)
        answers, first = np.empty((count, 0), np.float32), np.empty(0, np.float32)
        places: NDArray[Any] = np.arange(count)  # of the images that go on
        features: NDArray[Any] = images
        earlier = np.empty((0, count, 0), np.float32)  # probabilities of the images that go on
        for exit, threshold in enumerate(thresholds):
            if not len(places):
                break
            probabilities, features = self.probabilities(exit, features)
            if exit == 0:
                answers = np.empty((count, probabilities.shape[-1]), np.float32)
                earlier = probabilities[None]
            else:
                earlier = np.concatenate([earlier, probabilities[None]])
            scores = self.score.at(earlier, exit)
            first = scores if exit == 0 else first
            sure = scores > np.float32(threshold)
            if sure.any():
                leaving, on = places[sure], ~sure
                exit_of[leaving], answers[leaving] = exit, probabilities[sure]
                seconds[leaving] = time.perf_counter() - started
                places, earlier = places[on], earlier[:, on]
                features = features[on] if len(features) else features
        if len(places):
            answers[places] = vote(earlier, votes)
            seconds[places] = time.perf_counter() - started
        return BatchAnswers(exit_of, biased(answers, bias) if bias else answers, seconds, first)

    def probabilities(self, exit: int, features: NDArray[Any]) -> tuple[Floats, NDArray[Any]]:
        """An exit's probabilities `[N, K]` and the next one's features, from this one's.

        Exit 0 takes images uint8 `[N, H, W, C]`; after the last there are no features.
        """
        logits, features = self.logits(exit, features)
        return calibrated_probabilities(logits[None], self._temperatures[exit])[0], features

    def stream(self, image: NDArray[np.uint8]) -> Iterator[Floats]:
        """Each exit's probabilities `[K]` for one image uint8 `[H, W, C]`, as they are ready.

        The next segment runs only when the next answer is requested.
        """
        features: NDArray[Any] = image[None]
        for exit, temperature in enumerate(self._temperatures[:, 0]):
            logits, features = self.logits(exit, features)
            # calibrated_probabilities for one row, in half as many calls: on small networks they
            # cost as much as a layer.
            row = logits[0] / temperature
            row -= np.maximum.reduce(row)
            np.exp(row, out=row)
            row /= np.add.reduce(row)
            yield row

    def features_shape(self, exit: int) -> tuple[int, int, int]:
        """What an exit, not the last, gives to the next one: `(C, H, W)`."""
        channels, height, width = self._sessions[exit].get_outputs()[1].shape[1:]
        return channels, height, width

    def logits(self, exit: int, features: NDArray[Any]) -> tuple[Floats, NDArray[Any]]:
        """An exit's logits `[N, K]`, and the features for the next one (none after the last)."""
        logits, *rest = self._sessions[exit].run(
            self._outputs[exit], {self._inputs[exit]: features}
        )
        return logits, rest[0] if rest else features[:0]
