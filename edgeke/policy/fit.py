"""Everything that validation decides: score, temperatures, votes, and candidate thresholds."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeke.params import Calibrate
from edgeke.policy.candidates import Candidate, FixedSequence, fixed_sequences, propose
from edgeke.policy.samples import ExitLogits, Samples, check_costs
from edgeke.policy.tuning import Tuning, cross_fit, rank_scores, tune

# Below this many samples thresholds are fitted so closely that their own accuracy flatters.
_SMALL = 2000


@dataclass(frozen=True)
class FittedPolicy:
    """What is frozen before calibration is read. `macs` `[E]`.

    `sequences` are certified in their order; `proportions` promises nothing about its answers.
    `validation_accuracy` by candidate's name.
    """

    tuning: Tuning
    sequences: tuple[FixedSequence, ...]
    proportions: Candidate
    validation_accuracy: dict[str, float]
    macs: tuple[int, ...]
    main_macs: int

    @property
    def candidates(self) -> list[Candidate]:
        """Those of the sequences, each set of thresholds once, and `proportions`."""
        every = [c for sequence in self.sequences for c in sequence.candidates]
        return [
            *{candidate.thresholds: candidate for candidate in every}.values(),
            self.proportions,
        ]


def fit_policy(
    validation: ExitLogits, macs: Sequence[int], main_macs: int, settings: Calibrate
) -> tuple[FittedPolicy, dict[str, float]]:
    """Choose the score and fit all else on validation; also returns how the scores rank.

    `macs` `[E]` count as shares of the plain main network's `main_macs`. On few samples the
    accuracy of candidates is cross-fitted: everything is fitted again without each fold, and
    candidates are matched by name. Errors: InputError for costs that do not increase.
    """
    check_costs(macs, len(validation.logits))
    costs = [m / main_macs for m in macs]
    folds = cross_fit(validation, settings)
    best, ranking = rank_scores(validation, folds)
    score = best if settings.score == "best" else settings.score
    tuning = tune(validation, settings).with_score(score, validation)
    samples = tuning.samples(validation)
    proposed, proportions = propose(samples, costs, settings)
    right: Counter[str] = Counter()
    if len(validation.labels) >= _SMALL:
        right.update(_right(samples, proposed, proportions))
    else:
        for fold in folds:
            tuned = fold.tuning.with_score(score, fold.fitted)
            candidates = propose(tuned.samples(fold.fitted), costs, settings)
            right.update(_right(tuned.samples(validation.at(fold.left_out)), *candidates))
    accuracy = {name: count / len(validation.labels) for name, count in right.items()}
    sequences = fixed_sequences(samples, proposed)
    fitted = FittedPolicy(tuning, sequences, proportions, accuracy, tuple(macs), main_macs)
    return fitted, {f"validation/{key}": value for key, value in ranking.items()}


def _right(
    samples: Samples, proposed: Mapping[int, list[Candidate]], proportions: Candidate
) -> dict[str, int]:
    """How many samples each candidate answers right, by its name."""
    candidates = [proportions, *itertools.chain.from_iterable(proposed.values())]
    return {c.name: int(samples.correct_at(c.thresholds).sum()) for c in candidates}
