"""Everything that validation decides: score, temperatures, votes, and candidate thresholds."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeke.errors import InputError
from edgeke.params import Calibrate
from edgeke.policy.candidates import Candidate, FixedSequence, fixed_sequences, propose
from edgeke.policy.families import Family, recall_family, sure_family
from edgeke.policy.samples import ExitLogits, Samples, check_costs
from edgeke.policy.tuning import Tuning, cross_fit, rank_scores, tune

# Below this many samples thresholds are fitted so closely that their own accuracy flatters.
_SMALL = 2000


@dataclass(frozen=True)
class FittedPolicy:
    """What is frozen before calibration is read. `macs` `[E]`.

    `sequences` are certified in their order; `proportions` promises nothing about its answers.
    `validation_accuracy` by candidate's name. `families` have candidates of their own; `miss` are
    the classes, by number, whose misses are certified.
    """

    tuning: Tuning
    sequences: tuple[FixedSequence, ...]
    proportions: Candidate
    validation_accuracy: dict[str, float]
    macs: tuple[int, ...]
    main_macs: int
    families: tuple[Family, ...] = ()
    miss: tuple[tuple[int, str], ...] = ()

    @property
    def candidates(self) -> list[Candidate]:
        """Those of the sequences, each set of thresholds once, and `proportions`."""
        every = [c for sequence in self.sequences for c in sequence.candidates]
        return [
            *{candidate.thresholds: candidate for candidate in every}.values(),
            self.proportions,
        ]

    @property
    def others(self) -> list[Candidate]:
        """Candidates of the families that are in no sequence."""
        every = [c for family in self.families for c in family.candidates if c.bias or c.unsure]
        return list(dict.fromkeys(every))


def fit_policy(
    validation: ExitLogits,
    macs: Sequence[int],
    main_macs: int,
    settings: Calibrate,
    classes: Sequence[str] = (),
) -> tuple[FittedPolicy, dict[str, float]]:
    """Choose the score and fit all else on validation; also returns how the scores rank.

    `macs` `[E]` count as shares of the plain main network's `main_macs`. On few samples the
    accuracy of candidates is cross-fitted: everything is fitted again without each fold, and
    candidates are matched by name. `classes` are the names that requirements of a class use.
    Errors: InputError for costs that do not increase, and for an unknown class.
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
    miss = {_label(c, classes): c for c in settings.classes_of("max_miss")}
    sequences = fixed_sequences(samples, proposed, tuple(miss))
    families = [
        recall_family(samples, sequences[0], name, _label(name, classes))
        for name in settings.classes_of("min_recall")
    ]
    if any(requirement.kind == "max_sure_error" for requirement in settings.requirements):
        families.append(sure_family(samples, costs, settings.delta))
    fitted = FittedPolicy(
        tuning, sequences, proportions, accuracy, tuple(macs), main_macs, tuple(families),
        tuple(miss.items()),
    )  # fmt: skip
    for each in fitted.others:
        answers = samples.labels_at(each.thresholds, each.bias, each.unsure)
        accuracy[each.name] = float(np.mean(answers == validation.labels))
    return fitted, {f"validation/{key}": value for key, value in ranking.items()}


def _label(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise InputError(
            f"calibrate.requirements names the class {name!r}, which is none of the model's: "
            f"{', '.join(classes) or 'no names are known'}; correct it"
        )
    return list(classes).index(name)


def _right(
    samples: Samples, proposed: Mapping[int, list[Candidate]], proportions: Candidate
) -> dict[str, int]:
    """How many samples each candidate answers right, by its name."""
    candidates = [proportions, *itertools.chain.from_iterable(proposed.values())]
    return {c.name: int(samples.correct_at(c.thresholds).sum()) for c in candidates}
