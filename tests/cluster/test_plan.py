"""Plans: never slower than one device alone by prediction, within memory, and refused in words."""

import dataclasses

import numpy as np
import pytest

from edgeke.cluster.__main__ import main, read_checked
from edgeke.cluster.actors import check_versions, versions
from edgeke.cluster.plan import (
    expected_work,
    make_plan,
    read_cluster,
    single_plan,
    write_cluster,
)
from edgeke.cluster.serve import plan_costs
from edgeke.cluster.show import show
from edgeke.cluster.strips import own_rows
from edgeke.errors import InputError
from tests.cluster.conftest import make
from tests.cluster.profiles import even, profile


@pytest.fixture(scope="module")
def network():
    return make("resnet18", 64, (0.3, 0.6), width=8)[0]


def test_fast_links_share_by_speed_and_slow_ones_do_not_share(network):
    devices = [
        even(network, name, 0.1 * slow) for name, slow in zip("abcd", (1, 1, 2, 2), strict=True)
    ]
    fast = make_plan(network, profile(devices, 1e-5, 1e9))
    assert len(fast.devices) == 4
    rows = dict(zip(fast.devices, fast.layout.heights, strict=True))
    assert rows["a"] > rows["c"]
    bound = 0.1 / (1 + 1 + 0.5 + 0.5)
    assert bound < fast.seconds[-1] < 1.3 * bound
    slow = make_plan(network, profile(devices, 0.05, 1e5))
    assert len(slow.devices) == 1
    assert slow.seconds[-1] == min(slow.alone.values())


@pytest.mark.parametrize("latency", [1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("rate", [1e5, 1e7, 1e9])
def test_a_plan_is_never_slower_than_one_device_alone(network, latency, rate):
    devices = [even(network, name, 0.05 * (1 + place)) for place, name in enumerate("abc")]
    plan = make_plan(network, profile(devices, latency, rate))
    assert plan.seconds[-1] <= min(plan.alone.values())
    assert list(plan.seconds) == sorted(plan.seconds)
    assert len(plan.seconds) == len(network.exits)


def test_slow_links_exchange_less(network):
    """A halo costs its bytes, computing rows twice costs time: the plan weighs them."""
    devices = [even(network, name, 0.2) for name in "ab"]
    counts = [
        len(make_plan(network, profile(devices, latency, 1e8)).layout.exchanged)
        for latency in (1e-6, 1e-2)
    ]
    assert counts[0] > counts[1]


def test_work_that_is_expected_is_shared(network):
    made = profile([even(network, name, 0.1) for name in "ab"], 1e-6, 1e12)
    plan = make_plan(network, made)
    work = expected_work(network, made, plan)
    assert 0.1 <= work.sum() < 0.13, "all of it, and rows that are computed twice"
    assert work.max() < 0.08
    alone = single_plan(network, made, 0)
    assert expected_work(network, made, alone) == pytest.approx([0.1], rel=0.01)


def test_memory_limits_who_shares(network):
    small = even(network, "small", 0.05, memory=50_000_000)
    devices = [small, even(network, "large", 0.1), even(network, "other", 0.1)]
    plan = make_plan(network, profile(devices, 1e-5, 1e9))
    assert "small" not in plan.devices
    assert len(plan.devices) == 2
    with pytest.raises(
        InputError, match=r"no device has room: the network alone takes .* MB, and "
    ):
        make_plan(network, profile([small], 1e-5, 1e9))


def test_more_devices_than_rows_leaves_some_out():
    network = make("resnet10", 8, (0.5,), width=4)[0]
    devices = [even(network, str(number), 1.0) for number in range(6)]
    plan = make_plan(network, profile(devices, 1e-6, 1e12))
    assert 1 < len(plan.devices) <= max(network.height(cut) for cut in network.cuts)


def test_images_too_small_to_share_are_refused():
    network = make("resnet10", 8, (0.5,), width=4)[0]
    cuts = [cut for cut in network.cuts if network.height(cut) == 8]
    network.shapes = {**network.shapes, **dict.fromkeys(network.cuts[1:], (1, 4, 2, 2))}
    assert cuts
    with pytest.raises(InputError, match="too small to share: no map has 4 rows"):
        make_plan(network, profile([even(network, "a", 1.0)], 1e-6, 1e12))


def test_rows_are_owned_once(network):
    plan = make_plan(network, profile([even(network, n, 0.3) for n in "abc"], 1e-6, 1e12))
    for cut in network.cuts:
        rows = [own_rows(network, cut, plan.layout, device) for device in range(len(plan.devices))]
        assert rows[0][0] == 0
        assert rows[-1][1] == network.height(cut)
        assert all(a[1] == b[0] for a, b in zip(rows, rows[1:], strict=False))


def test_cluster_json_is_read_back_and_checked(network, tmp_path):
    made = profile([even(network, name, 0.1) for name in "ab"], 1e-4, 1e9)
    plan, file = make_plan(network, made), tmp_path / "cluster.json"
    write_cluster(file, made, plan)
    assert read_cluster(file) == (made, plan)
    with pytest.raises(InputError, match="is of another network or precision"):
        read_checked(file, "another model")
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 7'))
    with pytest.raises(InputError, match="another version .schema 7 is not 1"):
        read_cluster(file)
    file.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_cluster(file)
    file.unlink()
    with pytest.raises(InputError, match="missing; run `python -m edgeke.cluster profile`"):
        read_cluster(file)


def test_no_device_at_all(network):
    with pytest.raises(InputError, match="no device in the cluster; join one: ray start"):
        make_plan(network, profile([], 1e-4, 1e9))


def test_versions_that_differ_are_named():
    check_versions("oven", versions())
    with pytest.raises(InputError, match=r"device oven has onnxruntime 1.0 instead of .* install"):
        check_versions("oven", {**versions(), "onnxruntime": "1.0"})


def test_show_says_who_does_what(network):
    made = profile([even(network, name, 0.1) for name in "abc"], 1e-5, 1e9)
    plan = make_plan(network, made)
    text = "\n".join(show(network, made, plan))
    for name in plan.devices:
        assert f"{name}: 0-" in text or f"{name} leads: " in text or f"\n{name}: " in text
    assert "a -> b" in text or "b -> a" in text
    alone = dataclasses.replace(single_plan(network, made, 1), alone=plan.alone)
    assert "b works alone" in "\n".join(show(network, made, alone))


def test_requirements_compare_with_the_plans_costs(network):
    made = profile([even(network, name, 0.1) for name in "abc"], 1e-5, 1e9)
    plan = make_plan(network, made)
    costs = plan_costs(plan)
    assert np.cumsum(costs.first) == pytest.approx(plan.seconds)


def test_a_folder_that_is_no_bundle(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 1
    assert "holds no edgeke" in capsys.readouterr().err
