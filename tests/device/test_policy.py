import json

import pytest
from toys import replace

from edgeke.device.policy import Evidence, OperatingPoint, Policy, RequirementResult, parse_policy
from edgeke.errors import InputError

POINT = OperatingPoint(
    name="full",
    thresholds=(2.0, -1.0),
    votes=(0.4, 0.6),
    samples=100,
    reached=(100, 100),
    voted=0,
    wrong=10,
    degraded=0,
    validation_accuracy=0.92,
    evidence=(Evidence(1, 0, None),),
)
FIRST = replace(POINT, name="exit_0", thresholds=(-1.0, 2.0), reached=(100, 0))
POLICY = Policy(
    score="learned",
    score_weights=((0.1,) * 4, (0.2,) * 8),
    temperatures=(1.0, 1.5),
    macs=(10, 20),
    main_macs=18,
    delta=0.1,
    points=(POINT, FIRST),
    requirements=(RequirementResult("max_cost_0.9", "max_cost", 0.9, 0.1, "full", None),),
    default="full",
)
TEXT = json.dumps(POLICY.to_json())


def changed(*path: str | int, value: object) -> str:
    """The policy's JSON with another value at a path of keys."""
    content = json.loads(TEXT)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content)


def test_policy_round_trip():
    assert parse_policy(TEXT) == POLICY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not an EdgeKE policy"),
        ("[" * 100_000, "not an EdgeKE policy"),
        (changed("surprise", value=1), "incomplete"),
        (changed("schema", value=2), "policy schema 2 is not 4.*run the stage calibrate again"),
        (changed("points", value=[]), "names of points"),
        (changed("points", value=[json.loads(TEXT)["points"][0]] * 2), "names of points"),
        (changed("points", value=json.loads(TEXT)["points"][:1]), "a point for every deadline"),
        (changed("macs", value=[20, 10]), "macs"),
        (changed("main_macs", value=10**400), "macs"),
        (TEXT.replace('"main_macs": 18', f'"main_macs": {"1" * 5000}'), "not an EdgeKE policy"),
        (changed("temperatures", value=[1.0, float("nan")]), "temperatures"),
        (changed("score", value="nonsense"), "score"),
        (changed("score_weights", value=[]), "score_weights"),
        (changed("score_weights", value=[[0.1] * 4, [0.1] * 7]), "score_weights"),
        (changed("delta", value=0), "delta"),
        (changed("points", 0, "votes", value=[1.0]), "number of exits"),
        (changed("points", 0, "votes", value=[1e-320, 0]), "votes"),
        (changed("points", 0, "votes", value=[1e308, 1e308]), "votes"),
        (changed("points", 0, "thresholds", value=[None, 1]), "thresholds"),
        (changed("points", 0, "reached", value=[100, 101]), "reached"),
        (changed("points", 0, "wrong", value=1.5), "counts"),
        (changed("points", 0, "evidence", value=[{"cap": 2, "degraded": 0, "wrong": 0}]), "evid"),
        (changed("requirements", 0, "point", value="fast"), "requirements"),
        (changed("default", value="fast"), "no operating point 'fast'; use one of full, exit_0"),
    ],
)
def test_a_broken_or_tampered_policy_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_policy(text)


def test_a_policy_names_its_points():
    assert POLICY.point("full") is POINT
    assert list(POLICY.named) == ["full", "default", "max_cost_0.9"]
    unmet = replace(POLICY.requirements[0], point=None, nearest=1.1)
    assert list(replace(POLICY, requirements=(unmet,)).named) == ["full", "default"]
    assert replace(POLICY, requirements=(unmet,)).unmet == (unmet,)
    with pytest.raises(InputError, match="use one of full, exit_0"):
        POLICY.point("none")
