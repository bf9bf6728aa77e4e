"""Promises about some of the images: misses and recall of a class, errors among the sure."""

import json

import numpy as np
import pytest
from draws import digits, draw, settings

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.policy import parse_policy
from edgeke.device.promises import upper_bound
from edgeke.errors import InputError
from edgeke.params import ClassShare, Requirement
from edgeke.policy.certify import certify
from edgeke.policy.families import pairs_so_far
from edgeke.policy.fit import fit_policy
from edgeke.policy.samples import ExitLogits

MACS, MAIN, COSTS = (30, 60, 100), 100, (0.3, 0.6, 1.0)
DRAWS, SAMPLES = 1000, 500
NAMES = {"known law": ("a", "b", "crack", "d", "e"), "real digits": tuple("0123456789")}
CLASS = {"known law": "crack", "real digits": "8"}
RISKS = ("max_miss", "min_recall", "max_sure_error")


def requirements(name: str) -> tuple[Requirement, ...]:
    return (
        Requirement(max_miss=ClassShare(**{"class": name, "share": 0.2})),
        Requirement(min_recall=ClassShare(**{"class": name, "share": 0.8})),
        Requirement(max_sure_error=0.1),
    )


@pytest.fixture(scope="module", params=list(NAMES))
def simulated(request):
    """Policies of 1,000 calibration draws, and the true rate of each risk by point's name."""
    name, classes = CLASS[request.param], NAMES[request.param]
    if request.param == "known law":
        validation, pool = draw(1000, 1), draw(100_000, 2)
    else:
        validation, pool = (digits().at(np.arange(*ends)) for ends in ((0, 400), (400, 1197)))
    chosen = settings(requirements=requirements(name))
    fitted, _ = fit_policy(validation, MACS, MAIN, chosen, classes)
    samples, random = fitted.tuning.samples(pool), np.random.default_rng(0)
    inside = samples.labels == classes.index(name)
    truth = {}
    for each in [*fitted.candidates, *fitted.others]:
        answers = samples.labels_at(each.thresholds, each.bias, each.unsure)
        wrong = answers != samples.labels
        truth["max_miss", each.name] = (wrong & samples.reference)[inside].mean()
        truth["min_recall", each.name] = wrong[inside].mean()
        truth["max_sure_error", each.name] = wrong[answers >= 0].mean()
    policies = [
        certify(fitted, pool.at(random.integers(0, len(pool.labels), SAMPLES)), chosen)
        for _ in range(DRAWS)
    ]
    return name, policies, truth


@pytest.mark.parametrize("delta", [0.1, 0.3])
@pytest.mark.parametrize("risk", RISKS)
def test_promises_about_some_images_are_kept(simulated, risk, delta):
    """Whatever is requested: the hardest requests are just below the truth of some candidate."""
    name, policies, truth = simulated
    about = None if risk == "max_sure_error" else name
    rows = [
        {p.name: p.promised(risk, delta, 2, about) for p in policy.points} for policy in policies
    ]
    tested = {point for row in rows for point, bound in row.items() if np.isfinite(bound)}
    epsilons = {truth[risk, point] - 1e-9 for point in tested}
    broken, certified = [], []
    for epsilon in epsilons:
        kept = [[point for point, bound in row.items() if bound <= epsilon] for row in rows]
        certified.append(np.mean([bool(points) for points in kept]))
        broken.append(
            np.mean([any(truth[risk, point] > epsilon for point in points) for points in kept])
        )
    assert max(broken) <= delta + 3 * (delta * (1 - delta) / DRAWS) ** 0.5
    assert max(certified) > 0.2
    assert max(broken) > 0.01  # a test of promises far from the truth would be empty


@pytest.fixture(scope="module")
def policy():
    chosen = settings(requirements=requirements("crack"))
    fitted, _ = fit_policy(draw(1000, 1), MACS, MAIN, chosen, NAMES["known law"])
    return certify(fitted, draw(3000, 2), chosen)


def chosen(policy, **requested):
    return choose(policy, Request(**requested), COSTS)


def test_the_policy_knows_all_of_them_and_survives_the_file(policy):
    assert parse_policy(json.dumps(policy.to_json())) == policy
    assert [result.name for result in policy.requirements] == [
        "max_miss_crack_0.2", "min_recall_crack_0.8", "max_sure_error_0.1",
    ]  # fmt: skip
    assert all(result.point for result in policy.requirements)


def test_more_recall_costs_false_alarms(policy):
    rows = []
    for share in (0.5, 0.7, 0.9):
        point = chosen(policy, min_recall=f"crack={share}")
        assert point.promised("min_recall", 0.1, 2, "crack") <= 1 - share + 1e-12
        rows.append(point.inspection("min_recall", 2, "crack").false_alarms)
    assert rows == sorted(rows)
    assert rows[-1] > rows[0]
    assert any(chosen(policy, min_recall={"class": "crack", "share": 0.9}).bias)


def test_fewer_errors_among_the_sure_leave_more_unsure(policy):
    points = [chosen(policy, max_sure_error=share) for share in (0.03, 0.06, 0.15)]
    assert all(point.unsure for point in points)
    automation = [point.automation for point in points]
    assert automation == sorted(automation)
    assert 0.05 < automation[0] < automation[-1]
    inspection = points[0].inspection("max_sure_error", 2, None)
    assert inspection.images == points[0].samples - points[0].voted
    assert inspection.bad / inspection.images < 0.03


def test_a_miss_is_certified_along_the_sequences_of_degradation(policy):
    point = chosen(policy, max_miss="crack=0.2", max_degradation=0.2)
    assert not point.bias
    assert not point.unsure
    assert point.promised("max_miss", 0.1, 2, "crack") <= 0.2
    assert point.promised("max_degradation", 0.1, 2) <= 0.2
    assert chosen(policy, max_miss="crack=0.2", deadline=0.7).deepest <= 1


def test_other_requests_never_get_points_that_are_biased_or_unsure(policy):
    for requested in ({}, {"mean_cost": 0.9}, {"min_accuracy": 0.6}, {"max_miss": "crack=0.2"}):
        point = chosen(policy, **requested)
        assert not point.unsure
        assert not point.bias


def test_nothing_else_changes_with_the_new_requirements(policy):
    chosen = settings()
    fitted, _ = fit_policy(draw(1000, 1), MACS, MAIN, chosen)
    without = certify(fitted, draw(3000, 2), chosen)
    assert all(p.inspections == () and p.bias == () and not p.unsure for p in without.points)
    known = {p.name: p for p in policy.points}
    for point in without.points:
        same = known[point.name]
        assert (same.thresholds, same.reached, same.evidence) == (
            point.thresholds, point.reached, point.evidence,
        )  # fmt: skip


def test_too_few_images_are_counted(policy):
    images = policy.points[0].inspection("min_recall", 2, "crack").images
    words = rf"{images} calibration images of class crack are too few for .*, it takes 2302"
    with pytest.raises(UnmetError, match=words):
        chosen(policy, min_recall="crack=0.999")
    with pytest.raises(UnmetError, match=words):
        chosen(policy, max_miss="crack=0.001")
    with pytest.raises(UnmetError, match=r"images that an exit is sure of are too few .* 23025"):
        chosen(policy, max_sure_error=0.0001)
    rare = ClassShare(**{"class": "crack", "share": 0.99})
    few = settings(requirements=(Requirement(min_recall=rare),))
    fitted, _ = fit_policy(draw(1000, 1), MACS, MAIN, few, NAMES["known law"])
    (result,) = certify(fitted, draw(200, 2), few).requirements
    assert result.point is None
    assert "are too few for min_recall of crack, it takes 230" in result.reason


def test_a_class_without_images_promises_nothing():
    one = settings(requirements=requirements("crack"))
    fitted, _ = fit_policy(draw(1000, 1), MACS, MAIN, one, NAMES["known law"])
    split = draw(300, 2)
    without = split.at(np.flatnonzero(split.labels != 2))
    results = certify(fitted, ExitLogits(without.logits, without.labels), one).requirements
    assert [result.point is None for result in results] == [True, True, False]
    assert results[0].reason.startswith("0 calibration images of class crack")


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ({"min_recall": "dent=0.9"}, "no points for min_recall of class dent, only of crack; add"),
        ({"min_recall": "crack"}, "min_recall = 'crack' must be a class and a share"),
        ({"max_miss": {"class": "crack"}}, "must be a class and a share"),
        ({"max_miss": {"class": "crack", "share": 1.5}}, "must be a class and a share"),
        ({"max_sure_error": 0.1, "min_accuracy": 0.5}, "cannot be requested together"),
        ({"min_recall": "crack=0.9", "max_degradation": 0.5}, "cannot be requested together"),
    ],
)
def test_senseless_requests_are_refused(policy, requested, words):
    with pytest.raises(InputError, match=words):
        chosen(policy, **requested)


def test_an_unknown_class_is_refused_before_anything_is_fitted():
    with pytest.raises(InputError, match=r"class 'dent', which is none of the model's: a, b"):
        fit_policy(
            draw(100, 1), MACS, MAIN, settings(requirements=requirements("dent")), ("a", "b")
        )


def test_only_pairs_that_matter_are_kept():
    counts = [(0, 10), (1, 40), (1, 30), (5, 60)]
    history = pairs_so_far(counts)
    assert history[2] == ((0, 10), (1, 30))
    for delta in (0.01, 0.1, 0.5):
        for n, pairs in enumerate(history, 1):
            bounds = [upper_bound(*pair, delta) for pair in counts[:n]]
            assert max(upper_bound(*pair, delta) for pair in pairs) == max(bounds)
