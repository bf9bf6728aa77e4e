import re

import pytest
from toys import replace

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.policy import OperatingPoint, Policy, Promise
from edgeke.errors import InputError

COSTS = (1.0, 2.0, 4.0)  # milliseconds


def point(name, thresholds, shares, reach, accuracy, *promises) -> OperatingPoint:
    return OperatingPoint(
        name, thresholds, (0.3, 0.3, 0.4), shares, reach, 0.0, accuracy, 0.9, (0.8, 0.95), 0.01,
        tuple(Promise(kind, bound, delta, cap) for kind, bound, delta, cap in promises),
    )  # fmt: skip


POINTS = (
    point("full", (2, 2, -1), (0, 0, 1), (1, 1, 1), 0.95,
          ("max_degradation", 0.01, 0.1, 2), ("max_error", 0.06, 0.1, 2)),
    point("middle", (0.9, 0.9, -1), (0.5, 0.3, 0.2), (1, 0.6, 0.3), 0.94,
          ("max_degradation", 0.02, 0.1, 2), ("max_error", 0.08, 0.1, 2), ("max_degradation", 0.04, 0.01, 2)),
    point("two", (0.8, -1, -1), (0.6, 0.4, 0), (1, 0.5, 0), 0.91,
          ("max_degradation", 0.05, 0.1, 1), ("max_error", 0.1, 0.1, 1)),
    point("fast", (-1, -1, -1), (1, 0, 0), (1, 0, 0), 0.85,
          ("max_degradation", 0.1, 0.1, 2), ("max_degradation", 0.09, 0.1, 0), ("max_error", 0.2, 0.1, 2)),
)  # fmt: skip
POLICY = Policy("margin", (), (1.0, 1.0, 1.0), (10, 20, 40), 32, 500, 0.1, POINTS, (), "middle")


def chosen(**asked: float) -> str:
    return choose(POLICY, Request(**asked), COSTS).name


def test_costs_by_hand():
    assert POINTS[1].expected_cost(COSTS) == pytest.approx(0.5 + 0.6 + 0.8)
    assert POINTS[1].promised_cost(COSTS) == pytest.approx(1 + 0.6 * 1 + 0.3 * 2)
    assert [p.deepest for p in POINTS] == [2, 2, 1, 0]
    assert POLICY.cost_shares == (10 / 32, 20 / 32, 40 / 32)


def test_nothing_asked_for_is_the_default():
    assert chosen() == "middle"


def test_a_mean_cost_buys_accuracy_by_the_promised_cost():
    assert chosen(mean_cost=4.0) == "full"
    assert chosen(mean_cost=2.2) == "middle"
    assert chosen(mean_cost=2.19) == "two"  # expected 1.9, but only 2.2 is promised
    assert chosen(mean_cost=1.0) == "fast"


def test_accuracy_and_loss_are_bought_cheaply():
    assert chosen(max_degradation=0.01) == "full"
    assert chosen(max_degradation=0.03) == "middle"
    assert chosen(max_degradation=0.5) == "fast"
    assert chosen(min_accuracy=0.92) == "middle"
    assert chosen(min_accuracy=0.93) == "full"
    assert chosen(max_degradation=0.02, min_accuracy=0.93) == "full"


def test_a_smaller_risk_needs_its_own_promise():
    assert chosen(max_degradation=0.04, delta=0.01) == "middle"
    with pytest.raises(UnmetError, match="nearest attainable is 0.04"):
        chosen(max_degradation=0.03, delta=0.01)
    with pytest.raises(UnmetError, match=r"certified promises for delta 0\.01, 0\.1"):
        chosen(max_degradation=0.03, delta=0.001)


def test_a_deadline_leaves_deep_exits_out():
    assert chosen(deadline=5.0) == "full"
    assert chosen(deadline=3.0) == "two"
    assert chosen(deadline=1.5) == "fast"
    worst = (1.5, 3.5, 9.0)
    assert choose(POLICY, Request(deadline=3.0), COSTS, worst).name == "fast"


def test_a_deadline_that_no_point_was_made_for():
    deep = replace(POLICY, points=POINTS[:2])
    with pytest.raises(UnmetError, match=r"no operating point stops that early; .* is 4") as caught:
        choose(deep, Request(deadline=1.5, max_degradation=0.05), COSTS)
    assert caught.value.nearest == 4


def test_promises_under_a_deadline_are_its_own():
    assert chosen(deadline=3.0, max_degradation=0.05) == "two"
    # `fast` promises 10 % among all exits and 9 % when only exit 0 is allowed; none for cap 1.
    assert chosen(deadline=1.5, max_degradation=0.09) == "fast"
    with pytest.raises(UnmetError, match=r"max_degradation 0\.04 .* nearest attainable is 0\.05"):
        chosen(deadline=3.0, max_degradation=0.04)


def test_the_nearest_is_named_and_returned():
    with pytest.raises(UnmetError, match=r"mean cost 0\.5 .* nearest attainable is 1") as caught:
        chosen(mean_cost=0.5)
    assert caught.value.nearest == 1
    with pytest.raises(UnmetError, match=r"min_accuracy 0\.99 .* is 0\.94") as caught:
        chosen(min_accuracy=0.99)
    assert caught.value.nearest == pytest.approx(0.94)
    with pytest.raises(UnmetError, match=r"500 calibration samples are too few, it takes 2302;"):
        chosen(max_degradation=0.001)
    with pytest.raises(UnmetError, match="the first exit alone takes 1"):
        chosen(deadline=0.5)
    # With a loss to keep, cheaper than `middle` is out of reach.
    with pytest.raises(UnmetError, match=r"nearest attainable is 2\.2"):
        chosen(mean_cost=1.5, max_degradation=0.03)


@pytest.mark.parametrize("scale", [1.0, 1.2345678, 0.0123456, 98765.4321, 1 / 3])
def test_the_nearest_as_it_is_written_can_be_asked_for(scale):
    costs = [cost * scale for cost in COSTS]
    for asked in ("mean_cost", "deadline"):
        with pytest.raises(UnmetError) as caught:
            choose(POLICY, Request(**{asked: 1e-9}), costs)
        written = float(
            re.search(r"(?:attainable is|alone takes) ([\d.e+-]*\d)", str(caught.value))[1]
        )
        assert written == pytest.approx(costs[0], rel=1e-3)
        assert choose(POLICY, Request(**{asked: written}), costs).name == "fast"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"mean_cost": 0}, "mean_cost = 0 must be a positive"),
        ({"deadline": float("nan")}, "deadline = nan must be"),
        ({"min_accuracy": 97}, "min_accuracy = 97 must lie between 0 and 1"),
        ({"max_degradation": 0}, "max_degradation = 0 must lie"),
        ({"max_degradation": 0.1, "delta": 1}, "delta = 1 must lie"),
    ],
)
def test_senseless_requests_are_refused(asked, words):
    with pytest.raises(InputError, match=words):
        chosen(**asked)


def test_costs_must_increase():
    for costs in ((1, 2), (2, 1, 3), (0, 1, 2)):
        with pytest.raises(InputError, match="must be 3 positive numbers that increase"):
            choose(POLICY, Request(), costs)


def test_named_points():
    assert list(POLICY.named) == ["full", "default"]
    assert replace(POLICY, default="fast").named["default"].name == "fast"
