import re

import numpy as np
import pytest
from toys import replace

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.policy import Evidence, OperatingPoint, Policy
from edgeke.device.promises import upper_bound
from edgeke.errors import InputError

COSTS = (1.0, 2.0, 4.0)  # milliseconds


def point(name, thresholds, reached, validation_accuracy, *evidence) -> OperatingPoint:
    """Evidence: cap, degraded and wrong of 1,000 calibration images."""
    return OperatingPoint(
        name, thresholds, (0.3, 0.3, 0.4), 1000, reached, 0, 70, 10, validation_accuracy,
        tuple(Evidence(*item) for item in evidence),
    )  # fmt: skip


POINTS = (
    point("full", (2, 2, -1), (1000, 1000, 1000), 0.95, (2, 0, 45)),
    point("middle", (0.9, 0.9, -1), (1000, 500, 200), 0.94, (2, 10, 60)),
    point("two", (0.8, -1, -1), (1000, 400, 0), 0.91, (1, 40, 80)),
    point("fast", (-1, -1, -1), (1000, 0, 0), 0.85, (2, 90, 180), (1, 90, 180), (0, 80, 180)),
)
POLICY = Policy("margin", (), (1.0, 1.0, 1.0), (10, 20, 40), 32, 0.1, POINTS, (), "middle")
# Bounds at delta 0.1, by SciPy: 0 -> 0.23 %, 10 -> 1.54 %, 40 -> 4.92 %, 90 -> 10.28 %.
MIDDLE_COST = 1 + upper_bound(500, 1000, 0.1 / 3) + 2 * upper_bound(200, 1000, 0.1 / 3)


def chosen(**requested: float) -> str:
    return choose(POLICY, Request(**requested), COSTS).name


def test_costs_by_hand():
    middle = POINTS[1]
    assert middle.shares == (0.5, 0.3, 0.2)
    assert middle.expected_cost(COSTS) == pytest.approx(0.5 + 0.6 + 0.8)
    # Three shares are open: two of `middle`, one of `two`; what thresholds fix is known.
    assert POLICY.promised_cost(middle, COSTS) == pytest.approx(MIDDLE_COST)
    assert POLICY.reach_bounds(POINTS[0]) == (1, 1, 1)
    assert POLICY.reach_bounds(POINTS[3]) == (1, 0, 0)
    assert [p.deepest for p in POINTS] == [2, 2, 1, 0]
    assert POLICY.cost_shares == (10 / 32, 20 / 32, 40 / 32)


def test_a_mean_cost_buys_accuracy_by_the_promised_cost():
    assert chosen(mean_cost=4.0) == "full"
    assert chosen(mean_cost=MIDDLE_COST) == "middle"
    assert chosen(mean_cost=MIDDLE_COST - 0.01) == "two"  # expected 1.9, but that is no promise
    assert chosen(mean_cost=MIDDLE_COST, delta=0.01) == "two"  # a surer promise costs more
    assert chosen(mean_cost=1.0) == "fast"


def test_accuracy_and_degradation_are_bought_cheaply():
    assert chosen(max_degradation=0.01) == "full"
    assert chosen(max_degradation=0.02) == "middle"
    assert chosen(max_degradation=0.5) == "fast"
    assert chosen(min_accuracy=0.92) == "middle"
    assert chosen(min_accuracy=0.94) == "full"


def test_two_qualities_together_are_kept_by_one_point():
    assert chosen(max_degradation=0.02, min_accuracy=0.94) == "full"
    assert chosen(max_degradation=0.01, min_accuracy=0.5) == "full"
    assert chosen(max_degradation=0.02, min_accuracy=0.92) == "middle"
    assert chosen(max_degradation=0.02, min_accuracy=0.92, mean_cost=4.0) == "full"


def test_any_delta_can_be_requested():
    assert chosen(max_degradation=0.02, delta=0.1) == "middle"
    assert chosen(max_degradation=0.02, delta=0.001) == "full"
    with pytest.raises(UnmetError, match="samples are too few .* it takes 1375"):
        chosen(max_degradation=0.01, delta=1e-6)


def test_a_deadline_leaves_deep_exits_out():
    assert chosen(deadline=5.0) == "full"
    assert chosen(deadline=3.0) == "two"
    assert chosen(deadline=1.5) == "fast"
    worst = (1.5, 3.5, 9.0)
    assert choose(POLICY, Request(deadline=3.0), COSTS, worst).name == "fast"


def test_promises_under_a_deadline_are_those_of_the_deepest_cap_within_it():
    assert chosen(deadline=3.0, max_degradation=0.05) == "two"
    # `fast` promises 10.3 % among deeper exits and 9.2 % where only exit 0 is allowed.
    assert chosen(deadline=1.5, max_degradation=0.095) == "fast"
    with pytest.raises(
        UnmetError, match=r"max_degradation 0\.04 .* nearest attainable is max_degradation 0\.04916"
    ):
        chosen(deadline=3.0, max_degradation=0.04)
    without = replace(
        POLICY, points=(*POINTS[:2], replace(POINTS[3], evidence=(Evidence(0, 80, 180),)))
    )
    request = Request(deadline=3.0, max_degradation=0.095)  # no sequence has the cap 1
    assert choose(without, request, COSTS).name == "fast"


def test_the_nearest_is_named_and_returned():
    with pytest.raises(
        UnmetError, match=r"mean cost 0\.5 .* nearest attainable is mean cost 1"
    ) as caught:
        chosen(mean_cost=0.5)
    assert caught.value.nearest == 1
    with pytest.raises(
        UnmetError, match=r"min_accuracy 0\.99 .* is min_accuracy 0\.9453"
    ) as caught:
        chosen(min_accuracy=0.99)
    assert caught.value.nearest == pytest.approx(1 - upper_bound(45, 1000, 0.1))
    with pytest.raises(UnmetError, match=r"1000 calibration samples are too few .* takes 2302;"):
        chosen(max_degradation=0.001)
    with pytest.raises(UnmetError, match="the first exit alone takes 1"):
        chosen(deadline=0.5)


def test_what_cannot_be_kept_together_names_each_way_out():
    with pytest.raises(UnmetError) as caught:  # cheaper than `middle` degrades more
        chosen(mean_cost=1.5, max_degradation=0.02)
    assert "max_degradation 0.02 and mean cost 1.5 cannot be promised together" in str(caught.value)
    assert "nearest attainable with all else kept is max_degradation 0.1028 or mean cost" in str(
        caught.value
    )
    assert caught.value.nearest == pytest.approx(MIDDLE_COST)
    with pytest.raises(UnmetError, match=r"with all else kept is min_accuracy 0\.9453$"):
        chosen(max_degradation=0.02, min_accuracy=0.99)
    with pytest.raises(UnmetError) as caught:
        chosen(max_degradation=0.001, min_accuracy=0.99, mean_cost=0.1)
    words = "alone is max_degradation 0.0023 or min_accuracy 0.9453 or mean cost 1"
    assert words in str(caught.value)
    assert caught.value.nearest is None


@pytest.mark.parametrize("scale", [1.0, 1.2345678, 0.0123456, 98765.4321, 1 / 3])
def test_the_nearest_as_it_is_written_can_be_asked_for(scale):
    costs = [cost * scale for cost in COSTS]
    for limit in ("mean_cost", "deadline"):
        with pytest.raises(UnmetError) as caught:
            choose(POLICY, Request(**{limit: 1e-9}), costs)
        written = float(
            re.search(r"(?:attainable is mean cost|alone takes) ([\d.e+-]*\d)", str(caught.value))[
                1
            ]
        )
        assert written == pytest.approx(costs[0], rel=1e-3)
        assert choose(POLICY, Request(**{limit: written}), costs).name == "fast"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"mean_cost": 0}, "mean_cost = 0 must be a positive"),
        ({"deadline": float("nan")}, "deadline = nan must be"),
        ({"deadline": 10**400}, "deadline = 1000.* must be a positive"),
        ({"mean_cost": np.array(0.5)}, "mean_cost = array.* must be a positive number"),
        ({"min_accuracy": 97}, "min_accuracy = 97 must be a number between 0 and 1"),
        ({"max_degradation": "0.5"}, "max_degradation = '0.5' must be a number between 0 and 1"),
        ({"max_degradation": [1]}, r"max_degradation = \[1\] must be a number"),
        ({"max_degradation": True}, "max_degradation = True must be a number"),
        ({"max_degradation": 0}, "max_degradation = 0 must be a number"),
        ({"max_degradation": 0.1, "delta": 1}, "delta = 1 must be a number"),
    ],
)
def test_senseless_requests_are_refused(request_, words):
    with pytest.raises(InputError, match=words):
        chosen(**request_)


def test_costs_must_increase():
    for costs in ((1, 2), (2, 1, 3), (0, 1, 2)):
        with pytest.raises(InputError, match="must be 3 positive numbers that increase"):
            choose(POLICY, Request(), costs)
